"""Flags that cannot work are refused in one line that names flag, value and the nearest legal one."""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_hybrid import pretrain
from megatron_hybrid.config import HybridConfig
from megatron_hybrid.flags import FlagError, check, compose
from megatron_hybrid.presets import PRESETS
from megatron_hybrid.tools.indexed_dataset import IndexedDatasetWriter

#: A dataset is not what these cases are about, except where they name one.
_WITH_DATA = ["--skip-train"]

REFUSED = [
    (["--tensor-model-parallel-size", "32"], ["--tensor-model-parallel-size 32", "30", "nearest legal: 30", "1 to 30"]),
    (["--tensor-model-parallel-size", "0"], ["--tensor-model-parallel-size 0", "nearest legal: 1"]),
    (["--num-layers", "31"], ["--num-layers 31", "has 32 layers", "--num-layers 32"]),
    (["--hybrid-layer-pattern", "GGG-"], ["--hybrid-layer-pattern GGG-", "'-'", "legal: G, *, |"]),
    (["--hybrid-layer-pattern", "GGG*" * 7], ["--num-layers 32", "has 28 layers"]),
    (["--pipeline-model-parallel-size", "5"], ["--pipeline-model-parallel-size 5", "nearest legal: 4"]),
    (
        ["--context-parallel-size", "3"],
        ["--context-parallel-size 3", "8190", "nearest legal size: 2", "1, 2, 4, 8"],
    ),
    (["--seq-length", "8193", "--context-parallel-size", "4"], ["--seq-length 8193", "nearest legal length: 8192"]),
    (["--data-path", "nowhere/data"], ["--data-path nowhere/data", "nowhere/data.idx"]),
    (
        ["--without-use-distributed-optimizer", "--save", "x"],
        ["--bf16", "--use-distributed-optimizer", "--no-save-optim"],
    ),
    (["--linear-num-value-heads", "45"], ["--linear-num-value-heads 45", "30", "nearest legal: 60"]),
    (["--kv-channels", "127"], ["--kv-channels 127", "even", "128"]),
    (["--linear-conv-kernel-dim", "5", "--context-parallel-size", "2"], ["--linear-conv-kernel-dim 5", "4"]),
    (["--gdn-cp-comm-type", "a2a", "--context-parallel-size", "4"], ["a2a", "--context-parallel-size 4", "30"]),
    (["--gdn-backend", "fla", "--context-parallel-size", "2"], ["--gdn-backend fla", "triton", "a2a"]),
    (["--gdn-backend", "triton", "--without-bf16"], ["--gdn-backend triton", "--bf16", "reference"]),
    (["--pipeline-model-parallel-size", "0"], ["--pipeline-model-parallel-size 0", "nearest legal: 1"]),
    (["--save", "/dev/null/x"], ["--save /dev/null/x", "/dev/null is not a folder"]),
    (["--fp16", "--bf16"], ["--bf16 --fp16", "one of them"]),
    (["--tensor-model-parallel-size", "abc"], ["--tensor-model-parallel-size", "'abc'"]),
    (["--z-loss", "nan"], ["--z-loss nan", "finite"]),
    (["--gdn-states-every", "-1"], ["--gdn-states-every -1", "nearest legal: 0"]),
    (["--gdn-states-every", "2", "--gdn-keep-intermediates"], ["--gdn-states-every 2", "--gdn-keep-intermediates"]),
    (["--main-grads-dtype", "bf16"], ["--main-grads-dtype bf16", "--use-precision-aware-optimizer"]),
    (
        ["--use-precision-aware-optimizer", "--without-use-distributed-optimizer"],
        ["--use-precision-aware-optimizer", "--use-distributed-optimizer"],
    ),
    (["--recompute-modules", "mlp"], ["--recompute-modules mlp", "--recompute-granularity selective"]),
    (
        ["--recompute-granularity", "selective", "--recompute-modules", "mlp,core_attn"],
        ["--recompute-modules mlp,core_attn", "core_attn, mlp, layernorm, gdn_norm_out"],
    ),
    (["--recompute-granularity", "full"], ["--recompute-granularity full", "--recompute-method uniform"]),
    (
        ["--recompute-granularity", "selective", "--recompute-method", "uniform"],
        ["--recompute-method uniform", "--recompute-granularity full"],
    ),
    (["--num-experts", "8"], ["--num-experts 8", "no such thing", "leave it out"]),
    (["--rotary-percent", "0.5"], ["--rotary-percent 0.5", "leave it out"]),
    (["--qk-layernorm"], ["--qk-layernorm", "--qk-norm-width full|head|none"]),
    (["--position-embedding-type", "learned_absolute"], ["learned_absolute: legal here: rope, yarn, none"]),
    (["--normalization", "LayerNorm"], ["--normalization LayerNorm: legal here: RMSNorm"]),
    (["--without-swiglu"], ["--swiglu: missing", "add it"]),
    (["--without-normalization"], ["--normalization: missing", "RMSNorm"]),
    (["--without-position-embedding-type"], ["--position-embedding-type: missing", "learned_absolute"]),
    (["--num-query-groups", "10"], ["--num-query-groups 10", "add --group-query-attention"]),
    (["--rope-scaling-factor", "8"], ["--rope-scaling-factor 8", "--position-embedding-type yarn"]),
    (["--rotary-scaling-factor", "8"], ["--rotary-scaling-factor 8", "--position-embedding-type yarn"]),
    (["--lr-warmup-iters", "20", "--train-iters", "20"], ["--lr-warmup-iters 20", "--train-iters 20", "19"]),
]


@pytest.mark.parametrize(("given", "said"), REFUSED, ids=lambda value: "_".join(value)[:60])
def test_refused_in_one_line(given: list[str], said: list[str]) -> None:
    with pytest.raises(FlagError) as caught:
        without = [flag.removeprefix("--without-") for flag in given if flag.startswith("--without-")]
        check([*_WITH_DATA, *compose("olmo-hybrid-7b", given, without)])
    message = str(caught.value)
    assert "\n" not in message
    for part in said:
        assert part in message


def test_without_data_it_is_refused() -> None:
    with pytest.raises(FlagError, match=r"--data-path: no dataset; .* or --mock-data"):
        check(compose("olmo-hybrid-7b", []))


def test_another_precision_replaces_the_presets() -> None:
    assert "--bf16" not in compose("olmo-hybrid-7b", ["--fp16"])


def test_help_all_lists_megatrons_and_the_plugins_flags(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        pretrain.prepare(["--help-all"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert "--gdn-cp-comm-type" in printed and "--tensor-model-parallel-size" in printed


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--presett", "x"], "unrecognized arguments: --presett x"),
        (["--qk-norm-width", "heads"], "argument --qk-norm-width: invalid choice: 'heads'"),
        (
            ["--spec", "megatron_hybrid.layer_specs.nothing", "x"],
            "--spec megatron_hybrid.layer_specs.nothing x: no such",
        ),
        (
            ["--bf16", "--fp32-residual-connection", "--norm-placement", "pre"],
            "--fp32-residual-connection: needs Transformer Engine's norms",
        ),
        (["--padded-vocab-size", "98"], "--padded-vocab-size 98: the tokenizer has 99 ids, and those without a row"),
    ],
)
def test_what_is_refused_after_megatrons_parser_is_found_at_the_end(given: list[str], said: str) -> None:
    tiny = ["--preset", "olmo-hybrid-tiny", "--mock-data", "--tokenizer-type", "NullTokenizer", "--vocab-size", "99"]
    command = [sys.executable, "-m", "megatron_hybrid.pretrain", *tiny, *given]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith(f"error: {said}")
    assert done.stdout.count("\n") < 5, "Megatron's arguments bury the error"


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_the_7b_preset_passes(tp: int) -> None:
    sizes = ["--tensor-model-parallel-size", str(tp), "--pipeline-model-parallel-size", "8"]
    check(compose("olmo-hybrid-7b", [*sizes, "--mock-data"]))


@pytest.mark.parametrize(
    "given",
    [
        "--rotary-percent 1.0 --num-experts=0 --softmax-type vanilla",
        "--position-embedding-type yarn --rotary-scaling-factor 8 --yarn-beta-fast 32",
        "--num-query-groups 10 --group-query-attention",
        "--num-query-groups 30",
        "--spec my.module my_spec --num-experts 8 --normalization LayerNorm",  # what it does is not known here
    ],
)
def test_flags_of_the_architecture_that_pass(given: str) -> None:
    check(compose("olmo-hybrid-7b", [*given.split(), "--mock-data"]))


def test_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(FlagError, match=r"--preset olmo-hybrid-8b: unknown; nearest: olmo-hybrid-7b; all: .*olmo3-7b"):
        compose("olmo-hybrid-8b", [])


def test_command_line_replaces_the_preset() -> None:
    flags = compose("olmo-hybrid-7b", ["--lr", "1e-4", "--train-samples=1000"], without=["bf16"])
    assert flags.count("--lr") == 1 and flags[flags.index("--lr") + 1] == "1e-4"
    assert "--train-iters" not in flags and "--train-samples=1000" in flags
    assert "--bf16" not in flags


def test_without_a_flag_that_the_preset_does_not_set() -> None:
    with pytest.raises(FlagError, match="--without fp16: preset olmo-hybrid-7b does not set it"):
        compose("olmo-hybrid-7b", [], without=["fp16"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--preset", "olmo-hybrid-7b", "--tensor-model-parallel-size", "32"], "nearest legal: 30"),
        (["--preset", "nothing"], "--preset nothing: unknown"),
        (["--preset", "olmo-hybrid-tiny", "--mock-data"], "--tokenizer-type: missing; e.g. HuggingFaceTokenizer"),
    ],
)
def test_the_command_says_one_line_and_exits_2(arguments: list[str], said: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "megatron_hybrid.pretrain", *arguments], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and said in lines[0]


def test_other_python_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 11, 7))
    with pytest.raises(SystemExit) as stop:
        pretrain.prepare(["--preset", "olmo-hybrid-tiny"])
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("error: python 3.11.7: megatron-core 0.19.2 needs 3.12")


@pytest.mark.parametrize("flag", ["init_model_with_meta_device", "fp8_param_gather", "fp4_param_gather"])
def test_padding_that_could_not_be_zeroed_is_refused(flag: str) -> None:
    sizes = {"num_attention_heads": 30, "hidden_size": 3840, "ffn_hidden_size": 11008}
    args = argparse.Namespace(**sizes, hybrid_layer_pattern="*", padded_vocab_size=100352, rank=0, **{flag: True})
    args.tensor_model_parallel_size = 2
    pretrain._say_what_is_padded(args)
    args.tensor_model_parallel_size = 4
    with pytest.raises(FlagError, match=f"{flag.replace('_', '-')}: not supported .*heads 30 to 32"):
        pretrain._say_what_is_padded(args)


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_print_args_is_the_preset(preset: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        pretrain.prepare(["--preset", preset, "--print-args", "--lr", "0.5"])
    assert stop.value.code == 0
    printed = [line.split()[0].removeprefix("--") for line in capsys.readouterr().out.splitlines()]
    assert set(printed) == set(PRESETS[preset])


def test_flags_of_the_plugin_are_frozen() -> None:
    """A new flag changes this list, on purpose."""
    assert set(HybridConfig.__dataclass_fields__) == {
        "norm_placement",
        "qk_norm_width",
        "gdn_allow_neg_eigval",
        "gdn_output_gate",
        "gdn_cp_comm_type",
        "gdn_backend",
        "gdn_states_every",
        "gdn_keep_intermediates",
        "gdn_norm_epsilon",
        "pipeline_layout",
        "instance_data",
        "instance_valid_data",
        "instance_root",
        "instance_tokenizer_dir",
        "instance_dtype",
        "instance_epochs",
        "instance_shuffle",
        "instance_packing",
        "instance_group_files",
        "instance_file_seed",
        "instance_label_mask",
        "mixture_tokens",
        "data_seed",
        "document_masking",
        "repetition_filter",
        "weight_decay_on",
        "z_loss",
        "loss_chunk_tokens",
        "last_target",
        "skip_step",
        "log_health",
        "peak_tflops",
        "wsds_periods",
        "keep_moments",
        "fresh",
        "verify_checkpoint",
        "verify_data",
        "allow_data_change",
        "stop_file",
        "max_nonfinite_steps",
    }


@pytest.mark.parametrize(
    ("split", "said"),
    [
        (
            ["--split", "999,1,0"],
            "--split 999,1,0: validation gets none of the 40 documents of .*/text; give it a larger",
        ),
        ([], "--split 969, 30, 1: test gets none of the 40 documents"),
        (["--split", "0,100,0"], "--split 0,100,0: no share for training; give it one, or add --skip-train"),
        (["--split", "0"], "--split 0: legal: shares of training, validation and test"),
        (["--split", "99,.,1"], "--split 99,.,1: legal: shares of"),
        (["--split", "97,3,0"], ""),
        (["--split", "1"], ""),
        (["--split", "0,1,0", "--skip-train"], ""),
    ],
)
def test_a_split_with_an_empty_share(split: list[str], said: str, tmp_path: Path) -> None:
    """Without the refusal the first two build datasets forever, and the third ends with status 0 and no step."""
    with IndexedDatasetWriter(tmp_path / "text", 500) as writer:
        for _ in range(40):
            writer.add_document(np.arange(9))
        writer.commit()
    (tmp_path / "blend").write_text(f"1.0 {tmp_path}/text")
    for data in (["--data-path", str(tmp_path / "text")], ["--data-args-path", str(tmp_path / "blend")]):
        flags = compose("olmo-hybrid-7b", [*data, *split])
        with pytest.raises(FlagError, match=said) if said else contextlib.nullcontext():
            check(flags)


def test_missing_index_of_a_present_bin(tmp_path: Path) -> None:
    (tmp_path / "data.bin").write_bytes(b"\0" * 8)
    with pytest.raises(FlagError, match=r"--data-path .*data\.idx"):
        check(compose("olmo-hybrid-7b", ["--data-path", str(tmp_path / "data")]))
