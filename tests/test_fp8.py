"""What FP8's flags and widths refuse, by name and before a process group."""

from __future__ import annotations

import argparse
import subprocess
import sys
from typing import Any

import pytest
import torch

from megatron_hybrid.flags import FlagError, check, compose
from megatron_hybrid.fp8 import FLAGS_OF, Fp8Error, check_args, check_widths, described, starts_scales_anew
from megatron_hybrid.presets import PRESETS

FP8 = "--fp8-format hybrid --fp8-recipe"
REFUSED = {
    "--fp8-recipe blockwise": "without --fp8-format all runs in bf16",
    "--fp8-recipe mxfp8": "add --fp8-format e4m3",
    "--fp8-param-gather": "there are no such parameters",
    "--fp8-format hybrid --fp8-param-gather": "--fp8-param-gather: not with --fp8-recipe delayed",
    f"{FP8} tensorwise --no-fp8-wgrad": "--no-fp8-wgrad: does nothing with tensorwise; it is for --fp8-recipe delayed",
    f"{FP8} tensorwise --disable-fp8-wgrad": "--disable-fp8-wgrad: does nothing with tensorwise",
    f"{FP8} tensorwise --fp8-margin 1": "--fp8-margin 1: does nothing with tensorwise",
    "--fp8-format e4m3 --fp8-recipe blockwise --fp8-amax-history-len 16": "--fp8-amax-history-len 16: does nothing",
    "--fp4-format e2m1 --fp8-amax-compute-algo max": "--fp8-amax-compute-algo max: does nothing with nvfp4",
    "--fp8-amax-compute-algo max": "--fp8-amax-compute-algo max: does nothing without --fp8-format",
    "--fp8-format hybrid --fp8-interval 2": "--fp8-interval 2: Transformer Engine ignores it",
    f"{FP8} tensorwise --num-layers-at-end-in-bf16 2": "--num-layers-at-end-in-bf16 2: does nothing without "
    "--first-last-layers-bf16",
    "--num-layers-at-start-in-bf16 1": "--num-layers-at-start-in-bf16 1: does nothing without",
    "--first-last-layers-bf16 --num-layers-at-start-in-bf16 1": "--first-last-layers-bf16: does nothing without",
    f"{FP8} tensorwise --transformer-impl local": "--transformer-impl local: its linears would run in bf16",
    f"{FP8} delayed --fp4-format e2m1": "--fp4-format e2m1: not with --fp8-format hybrid; give one of them",
    f"{FP8} custom": "legal: delayed, tensorwise, blockwise, mxfp8",
    f"{FP8} delayed --first-last-layers-bf16": "use tensorwise or blockwise",
    "--fp8-format hybrid --first-last-layers-bf16": "use tensorwise or blockwise",
    f"{FP8} delayed --recompute-granularity selective --recompute-modules mlp layernorm": "Megatron refuses it with",
    f"{FP8} mxfp8": "use --fp8-format e4m3",
    f"{FP8} tensorwise --fp8-dot-product-attention": "--fp8-dot-product-attention: attention's core",
    f"{FP8} tensorwise --fp8-multi-head-attention": "--fp8-multi-head-attention: attention's core",
    "--fp8-format e4m3 --fp8-recipe mxfp8 --fp8-output-proj": "--fp8-output-proj: ",
    f"{FP8} tensorwise --overlap-param-gather-with-optimizer-step": "--overlap-param-gather-with-optimizer-step: not",
    "--fp8-format e4m3 --fp8-recipe mxfp8 --overlap-param-gather": "it gave NaN gradients",
    "--fp4-format e2m1 --fp4-recipe custom": "--fp4-recipe custom: not supported here; legal: nvfp4",
    "--fp4-format e2m1 --tp-comm-overlap": "--tp-comm-overlap: not tried with nvfp4",
    f"{FP8} tensorwise --reuse-grad-buf-for-mxfp8-param-ag": "is for --fp8-recipe mxfp8",
    "--fp8-format e4m3 --fp8-recipe mxfp8 --fp8-param-gather --reuse-grad-buf-for-mxfp8-param-ag "
    "--overlap-param-gather": "gives NaN without --overlap-grad-reduce",
}


@pytest.mark.parametrize("flags", REFUSED)
def test_refused_by_name(flags: str) -> None:
    with pytest.raises(FlagError, match=REFUSED[flags].replace("|", "\\|")):
        check(compose("olmo-hybrid-7b", [*flags.split(), "--mock-data"]))


@pytest.mark.parametrize(
    "flags",
    [
        *(f"{FP8} {recipe}" for recipe in ("delayed", "tensorwise", "blockwise")),
        *FLAGS_OF.values(),
        f"{FP8} tensorwise --fp8-param-gather --overlap-grad-reduce --overlap-param-gather --first-last-layers-bf16",
        "--fp8-format e4m3 --fp8-recipe mxfp8 --fp8-param-gather --reuse-grad-buf-for-mxfp8-param-ag "
        "--overlap-param-gather --overlap-grad-reduce",
        "--fp4-format e2m1",
        "--fp8-format hybrid --fp8-amax-history-len 1024 --fp8-amax-compute-algo max --no-fp8-wgrad --fp8-margin 1",
        f"{FP8} tensorwise --first-last-layers-bf16 --num-layers-at-start-in-bf16 2 --num-layers-at-end-in-bf16 0",
    ],
)
def test_accepted(flags: str) -> None:
    check(compose("olmo-hybrid-7b", [*flags.split(), "--mock-data"]))


def _settings(**more: Any) -> dict[str, Any]:
    flags = {name.replace("-", "_"): value for name, value in PRESETS["olmo-hybrid-7b"].items()}
    parallel = {"tensor_model_parallel_size": 1, "context_parallel_size": 1, "sequence_parallel": False}
    return {**flags, **parallel, "fp8": "hybrid", "fp8_recipe": "tensorwise", **more}


def test_the_7b_fits_fp8_on_these_tensor_parallel_sizes() -> None:
    fitting = {"tensorwise": [], "mxfp8": []}  # type: ignore[var-annotated]
    for recipe, sizes in fitting.items():
        for tp in range(1, 31):
            try:
                check_widths(_settings(tensor_model_parallel_size=tp, fp8_recipe=recipe))
                sizes.append(tp)
            except Fp8Error as error:
                assert f"--tensor-model-parallel-size {tp}: " in str(error) and "nearest legal: " in str(error)
    assert fitting["tensorwise"] == list(range(1, 31))
    assert {1, 2} <= set(fitting["mxfp8"])


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"ffn_hidden_size": 11000}, r"the MLP .* has 11000 on each rank.*multiple of 16; nearest legal: 6"),
        (
            {"ffn_hidden_size": 11072, "tensor_model_parallel_size": 8},
            r"the MLP .* has 1384 on each rank.*nearest legal: 7",
        ),
        ({"hidden_size": 3848}, r"--hidden-size has 3848.*no tensor-parallel size makes it one"),
        ({"linear_value_head_dim": 20}, r"Gated DeltaNet's output .* has 600.*nearest legal: 4"),
        ({"linear_key_head_dim": 90}, r"Gated DeltaNet's q\|k\|v\|z .* has 16920"),
    ],
)
def test_a_width_that_does_not_fit_is_named(sizes: dict[str, int], said: str) -> None:
    with pytest.raises(Fp8Error, match=said):
        check_widths(_settings(**sizes))
    check_widths(_settings(**sizes, fp8=None))  # in bf16 it is fine


def test_tokens_and_modules() -> None:
    fitting = _settings(transformer_impl="transformer_engine", fp4=None)
    check_args(argparse.Namespace(**fitting))
    with pytest.raises(Fp8Error, match="4100 tokens of a microbatch"):
        check_args(argparse.Namespace(**{**fitting, "seq_length": 4100}))
    with pytest.raises(Fp8Error, match="--transformer-impl local: its linears would run in bf16"):
        check_args(argparse.Namespace(**{**fitting, "transformer_impl": "local"}))


def test_without_transformer_engine_training_refuses_fp8() -> None:
    flags = (
        "--preset olmo-hybrid-tiny --mock-data --tokenizer-type NullTokenizer --vocab-size 127 --bf16 --no-save-optim"
    )
    command = [sys.executable, "-m", "megatron_hybrid.pretrain", *flags.split(), *FP8.split(), "tensorwise"]
    ended = subprocess.run(
        [*command, "--use-distributed-optimizer", "--transformer-impl", "local"], capture_output=True, text=True
    )
    assert ended.returncode == 2
    assert "error: --transformer-impl local" in ended.stderr


def test_what_a_checkpoint_says_of_its_precision() -> None:
    more = {"fp8_param_gather": True, "first_last_layers_bf16": True, "num_layers_at_end_in_bf16": 1}
    more |= {"use_precision_aware_optimizer": True, "exp_avg_dtype": torch.bfloat16, "fp8_amax_history_len": 1}
    found = described(_settings(**more, bf16=True))
    assert found == {
        "bf16": True,
        "fp8-format": "hybrid",
        "fp8-recipe": "tensorwise",
        "fp8-param-gather": True,
        "first-last-layers-bf16": True,
        "num-layers-at-end-in-bf16": 1,
        "use-precision-aware-optimizer": True,
        "exp-avg-dtype": "torch.bfloat16",
    }
    assert described({"fp8_recipe": "delayed", "num_layers_at_end_in_bf16": 1, "exp_avg_dtype": torch.float32}) == {}
    delayed = described({"fp8": "hybrid", "fp8_recipe": "delayed", "fp8_amax_history_len": 1024})
    assert delayed["fp8-amax-history-len"] == 1024
    assert not starts_scales_anew(delayed, delayed) and not starts_scales_anew(delayed, found)
    assert starts_scales_anew(found, delayed) and starts_scales_anew({}, delayed)
