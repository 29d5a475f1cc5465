"""FP8 and FP4 by Megatron's own flags: what is refused, and which widths a model's FP8 GEMMs need.

In FP8 run q|k|v|z and the output projection of Gated DeltaNet, attention's two projections and the MLP: 94 % of the
weights. a|b (60 rows at 7B, no multiple of 16), convolution, norms, the recurrence, attention's core, embedding and
output layer stay in bf16 or fp32; they are no modules of Transformer Engine, or are left out by what is refused here.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from megatron_hybrid.parallel.padded_sizes import Sizes

RECIPES = ("delayed", "tensorwise", "blockwise", "mxfp8")

#: What each was accepted with (docs/fp8.md). Megatron's own history of delayed scaling is one step, its most recent.
FLAGS_OF = {
    "delayed": "--fp8-format hybrid --fp8-recipe delayed --fp8-amax-history-len 1024 --fp8-amax-compute-algo max",
    "tensorwise": "--fp8-format hybrid --fp8-recipe tensorwise",
    "blockwise": "--fp8-format e4m3 --fp8-recipe blockwise",
    "mxfp8": "--fp8-format e4m3 --fp8-recipe mxfp8",
    "nvfp4": "--fp4-format e2m1",
}

#: {recipe: (least compute capability, what has it)}
NEEDS = {
    "delayed": ((8, 9), "Ada, Hopper or Blackwell"),
    "tensorwise": ((8, 9), "Ada, Hopper or Blackwell"),
    "blockwise": ((9, 0), "Hopper or Blackwell"),
    "mxfp8": ((10, 0), "Blackwell"),
    "nvfp4": ((10, 0), "Blackwell"),
}

_SWITCHES = (
    *("bf16", "fp8-param-gather", "fp4-param-gather", "reuse-grad-buf-for-mxfp8-param-ag"),
    *("overlap-grad-reduce", "overlap-param-gather", "overlap-param-gather-with-optimizer-step", "tp-comm-overlap"),
    *("first-last-layers-bf16", "fp8-dot-product-attention", "fp8-multi-head-attention", "fp8-output-proj"),
)
#: Megatron hands these to delayed scaling alone.
_OF_DELAYED = ("fp8-margin", "fp8-amax-history-len", "fp8-amax-compute-algo")
_WGRAD = ("no-fp8-wgrad", "disable-fp8-wgrad")  # two names of one flag
_EDGES = ("num-layers-at-start-in-bf16", "num-layers-at-end-in-bf16")

_LOCAL = (
    "--transformer-impl local: its linears would run in bf16 without a word; {} needs a GPU and Transformer Engine "
    "(pip install -e '.[gpu]')"
)


class Fp8Error(ValueError):
    """A flag or size with which FP8 cannot work; one line."""


def alignment(recipe: str) -> int:
    """Of both dimensions of a GEMM's weight on each rank, and of a microbatch's tokens."""
    return 32 if recipe in ("mxfp8", "nvfp4") else 16


def tokens_multiple(settings: Mapping[str, Any]) -> int:
    """Of a microbatch's tokens on a rank; 1 in bf16. settings: see `check_widths`."""
    recipe = _recipe(settings)
    return alignment(recipe) if recipe else 1


def recomputable(modules: Sequence[str], recipe: str) -> tuple[str, ...]:
    """Those of --recompute-modules that Megatron takes with this recipe, "" for bf16."""
    return tuple(name for name in modules if recipe != "delayed" or name != "layernorm")


def check_flags(flags: Sequence[str]) -> None:
    """Refuse combinations that are known to go wrong, from the flags alone.

    Raises:
        Fp8Error: naming the flag and what to do.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in ("fp8-format", "fp8-recipe", "fp4-format", "fp4-recipe", "transformer-impl"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--recompute-modules", nargs="*", default=())
    for name in (*_OF_DELAYED, *_EDGES, "fp8-interval"):
        parser.add_argument(f"--{name}")
    for name in (*_SWITCHES, *_WGRAD):
        parser.add_argument(f"--{name}", action="store_true")
    try:
        values = parser.parse_known_args(list(flags))[0]
    except argparse.ArgumentError as error:
        raise Fp8Error(f"{error.argument_name}: {error.message}") from None
    for problem in (*_problems(values), *_without_effect(values)):
        raise Fp8Error(problem)


def _problems(v: argparse.Namespace) -> Iterator[str]:
    if not v.fp8_format and not v.fp4_format:
        if v.fp8_recipe:
            flag = " ".join(FLAGS_OF.get(v.fp8_recipe, FLAGS_OF["tensorwise"]).split()[:2])
            yield f"--fp8-recipe {v.fp8_recipe}: without --fp8-format all runs in bf16; add {flag}"
        if v.fp8_param_gather or v.fp4_param_gather:
            flag = "--fp8-param-gather" if v.fp8_param_gather else "--fp4-param-gather"
            yield f"{flag}: there are no such parameters without --{flag[2:5]}-format; add it, or leave this out"
        return
    if v.fp8_format and v.fp4_format:
        yield f"--fp4-format {v.fp4_format}: not with --fp8-format {v.fp8_format}; give one of them"
    recipe = "nvfp4" if v.fp4_format else v.fp8_recipe or "delayed"
    if v.transformer_impl == "local":
        yield _LOCAL.format(recipe)
    if recipe not in (*RECIPES, "nvfp4"):
        yield f"--fp8-recipe {recipe}: not supported here; legal: {', '.join(RECIPES)}"
    if v.fp4_recipe not in (None, "nvfp4"):
        yield f"--fp4-recipe {v.fp4_recipe}: not supported here; legal: nvfp4"
    if not v.bf16:
        yield f"--{'fp4' if v.fp4_format else 'fp8'}-format: needs --bf16 beside it"
    if recipe == "delayed" and v.first_last_layers_bf16:
        yield (
            "--first-last-layers-bf16: not with --fp8-recipe delayed, whose scales are reduced for all layers at once; "
            "use tensorwise or blockwise"
        )
    if len(recomputable(v.recompute_modules, recipe)) < len(v.recompute_modules):
        yield (
            "--recompute-modules layernorm: Megatron refuses it with --fp8-recipe delayed; leave it "
            "out, or use tensorwise or blockwise"
        )
    if recipe == "delayed" and v.fp8_param_gather:
        yield (
            "--fp8-param-gather: not with --fp8-recipe delayed, whose scales are not there yet when its weights are "
            "loaded; use tensorwise, or leave it out"
        )
    if recipe == "mxfp8" and v.fp8_format == "hybrid":
        yield "--fp8-format hybrid: gradients in E5M2 diverge with --fp8-recipe mxfp8; use --fp8-format e4m3"
    for flag in ("fp8-dot-product-attention", "fp8-multi-head-attention", "fp8-output-proj"):
        if getattr(v, flag.replace("-", "_")):
            yield f"--{flag}: attention's core and the output layer stay in bf16 here; leave it out"
    if v.overlap_param_gather_with_optimizer_step:
        yield f"--overlap-param-gather-with-optimizer-step: not with {recipe} (NaN gradients upstream); leave it out"
    if recipe in ("mxfp8", "nvfp4") and v.tp_comm_overlap:
        yield f"--tp-comm-overlap: not tried with {recipe}; leave it out"
    if v.reuse_grad_buf_for_mxfp8_param_ag:
        missing = [flag for flag in ("overlap-grad-reduce", "overlap-param-gather") if not _given(v, flag)]
        if recipe != "mxfp8" or not v.fp8_param_gather:
            yield "--reuse-grad-buf-for-mxfp8-param-ag: is for --fp8-recipe mxfp8 with --fp8-param-gather; leave it out"
        elif missing:
            yield f"--reuse-grad-buf-for-mxfp8-param-ag: gives NaN without --{missing[0]}; add it"
    elif recipe == "mxfp8" and v.overlap_param_gather:
        yield (
            "--overlap-param-gather: with --fp8-recipe mxfp8 it gave NaN gradients; leave it out, or add "
            "--fp8-param-gather --reuse-grad-buf-for-mxfp8-param-ag --overlap-grad-reduce"
        )


def _without_effect(v: argparse.Namespace) -> Iterator[str]:
    """Flags that Megatron takes and would not follow."""
    recipe = "nvfp4" if v.fp4_format else (v.fp8_recipe or "delayed") if v.fp8_format else ""
    if v.fp8_interval:
        yield f"--fp8-interval {v.fp8_interval}: Transformer Engine ignores it; leave it out"
    if recipe != "delayed":
        where = f"with {recipe}" if recipe else "without --fp8-format"
        given = [f"--{flag}" for flag in _WGRAD if _given(v, flag)]
        given += [f"--{flag} {getattr(v, flag.replace('-', '_'))}" for flag in _OF_DELAYED if _given(v, flag)]
        for flag in given:
            yield f"{flag}: does nothing {where}; it is for --fp8-recipe delayed; leave it out"
    if v.first_last_layers_bf16 and not recipe:
        yield "--first-last-layers-bf16: does nothing without --fp8-format or --fp4-format; leave it out"
    for flag in _EDGES:
        if _given(v, flag) and not v.first_last_layers_bf16:
            value = getattr(v, flag.replace("-", "_"))
            yield f"--{flag} {value}: does nothing without --first-last-layers-bf16; add it, or leave this out"


def _given(v: argparse.Namespace, flag: str) -> bool:
    return bool(getattr(v, flag.replace("-", "_")))


def check_args(args: Any) -> None:
    """What parsed arguments and this machine say: modules, GPU, widths on each rank. Before any process group.

    Raises:
        Fp8Error: naming the flag, its value and what is legal.
    """
    recipe = _recipe(vars(args))
    if recipe is None:
        return
    import torch

    if args.transformer_impl == "local":
        raise Fp8Error(_LOCAL.format(recipe))
    least, kinds = NEEDS[recipe]
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < least:
        raise Fp8Error(
            f"--{'fp4' if recipe == 'nvfp4' else 'fp8'}-recipe {recipe}: needs {kinds}, this is "
            f"{torch.cuda.get_device_name()}; legal: {', '.join(possible(torch.cuda.get_device_capability()))}"
        )
    check_widths(vars(args))
    check_tokens(vars(args))


def check_tokens(settings: Mapping[str, Any]) -> None:
    """A microbatch's tokens on a rank are a multiple of what the recipe needs. settings, raises: see `check_widths`."""
    recipe = _recipe(settings)
    if recipe is None:
        return
    tokens = settings["micro_batch_size"] * settings["seq_length"] // settings["context_parallel_size"]
    if settings["sequence_parallel"]:
        tokens //= settings["tensor_model_parallel_size"]
    if tokens % alignment(recipe):
        raise Fp8Error(
            f"--seq-length {settings['seq_length']}: {tokens} tokens of a microbatch on each rank, and {recipe} needs "
            f"a multiple of {alignment(recipe)}; change --seq-length or --micro-batch-size "
            f"{settings['micro_batch_size']}"
        )


def possible(capability: tuple[int, int]) -> list[str]:
    """Recipes that a GPU of this compute capability runs."""
    return [name for name, (least, _) in NEEDS.items() if capability >= least] or ["none"]


def _recipe(settings: Mapping[str, Any]) -> str | None:
    """The recipe by name; None in bf16. settings: Megatron's names, of arguments or of a config."""
    if settings.get("fp4"):
        return "nvfp4"
    found = settings.get("fp8_recipe") if settings.get("fp8") else None
    return getattr(found, "value", found)


def check_widths(settings: Mapping[str, Any]) -> None:
    """Both dimensions of every FP8 GEMM's weight on a rank, after padding, are multiples of what the recipe needs.

    Args:
        settings: Megatron's names with the true sizes, of arguments or of a config.

    Raises:
        Fp8Error: naming the dimension and the nearest legal tensor-parallel size.
    """
    recipe = _recipe(settings)
    if recipe is None:
        return
    sizes, tp, multiple = Sizes.of(settings), settings["tensor_model_parallel_size"], alignment(recipe)
    wrong = _misaligned(settings, sizes, tp, multiple)
    if not wrong:
        return
    most = min(n for n in (sizes.heads, sizes.groups, sizes.gdn_key_heads or sizes.heads) if n)
    legal = [n for n in range(1, most + 1) if not _misaligned(settings, sizes, n, multiple)]
    name, width = wrong
    advice = (
        f"nearest legal: {min(legal, key=lambda n: abs(n - tp))}; legal: {', '.join(map(str, legal))}"
        if legal
        else f"no tensor-parallel size makes it one; change the model's size or leave {recipe} out"
    )
    raise Fp8Error(
        f"--tensor-model-parallel-size {tp}: {name} has {width} on each rank, and {recipe} needs a multiple of "
        f"{multiple}; {advice}"
    )


def _misaligned(settings: Mapping[str, Any], sizes: Sizes, tp: int, multiple: int) -> tuple[str, int] | None:
    """The first width that is none, or None."""
    for name, width in _widths(settings, sizes, sizes.padded(tp), tp).items():
        if width % multiple:
            return name, width
    return None


def _widths(settings: Mapping[str, Any], sizes: Sizes, padded: Sizes, tp: int) -> dict[str, int]:
    """{dimension: elements on a rank} of all FP8 GEMMs."""
    hidden = settings["hidden_size"]
    head = settings.get("kv_channels") or hidden // sizes.heads
    found = {
        "--hidden-size": hidden,
        "attention's q|k|v (rows of linear_qkv)": (padded.heads + 2 * padded.groups) * head // tp,
        "attention's output (columns of linear_proj)": padded.heads * head // tp,
        "the MLP (--ffn-hidden-size, columns of linear_fc2)": padded.ffn // tp,
    }
    if padded.gdn_value_heads:
        key, value = settings["linear_key_head_dim"], settings["linear_value_head_dim"]
        keys, values = padded.gdn_key_heads * key, padded.gdn_value_heads * value
        gates = 2 if settings.get("gdn_output_gate", True) else 1
        found["Gated DeltaNet's q|k|v|z (rows of in_proj)"] = (2 * keys + gates * values) // tp
        found["Gated DeltaNet's output (columns of out_proj)"] = values // tp
    return found


def described(settings: Mapping[str, Any]) -> dict[str, Any]:
    """In which precision a run computes and keeps its state: {flag: value} of what is switched on.

    Args:
        settings: Megatron's arguments.
    """
    recipe = _recipe(settings)
    names = ["bf16", "fp16"]
    if recipe:
        names += ["fp8_param_gather", "fp4_param_gather", "first_last_layers_bf16"]
        if settings.get("first_last_layers_bf16"):
            names += [flag.replace("-", "_") for flag in _EDGES]
    if recipe == "delayed":
        names += [flag.replace("-", "_") for flag in _OF_DELAYED]
    if settings.get("use_precision_aware_optimizer"):
        names += ["use_precision_aware_optimizer", "main_params_dtype", "main_grads_dtype"]
        names += ["exp_avg_dtype", "exp_avg_sq_dtype"]
    found = {name.replace("_", "-"): settings[name] for name in names if settings.get(name)}
    if recipe:
        kind = "fp4" if recipe == "nvfp4" else "fp8"
        found |= {f"{kind}-format": settings[kind], f"{kind}-recipe": recipe}
    return {name: value if isinstance(value, bool | int | str) else str(value) for name, value in found.items()}


def starts_scales_anew(saved: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether delayed scaling finds none in a checkpoint. Both as `described`."""
    return now.get("fp8-recipe") == "delayed" != saved.get("fp8-recipe")
