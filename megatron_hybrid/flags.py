"""From `--preset NAME` and the command line to Megatron's flat list of flags, checked before anything heavy starts."""

from __future__ import annotations

import argparse
import difflib
import math
from collections.abc import Iterator, Mapping, Sequence

from megatron_hybrid.presets import PRESETS, FlagValue
from megatron_hybrid.tools.cli import ToolError
from megatron_hybrid.tools.indexed_dataset import require_dataset

#: Flags of which Megatron takes one: giving another on the command line drops the preset's.
ALTERNATIVES = (
    {"train-iters", "train-samples"},
    {"lr-decay-iters", "lr-decay-samples"},
    {"lr-warmup-iters", "lr-warmup-samples", "lr-warmup-fraction"},
)

_DATA_FLAGS = ("data-path", "train-data-path", "valid-data-path", "test-data-path")


class FlagError(ValueError):
    """A flag that cannot work; the message is one line: flag, value, what is legal."""


def compose(preset: str | None, command_line: Sequence[str], without: Sequence[str] = ()) -> list[str]:
    """The flat list of Megatron flags: the preset's, minus what the command line replaces, plus the command line.

    Args:
        preset: a name in `PRESETS`, or None.
        command_line: flags as typed.
        without: names of preset flags to leave out (for flags that take no value).

    Raises:
        FlagError: unknown preset, or `without` names a flag that the preset does not set.
    """
    flags = dict(_preset(preset)) if preset else {}
    for name in without:
        if flags.pop(name.removeprefix("--"), None) is None:
            raise FlagError(f"--without {name}: preset {preset} does not set it; it sets: {', '.join(sorted(flags))}")
    given = {word[2:].split("=")[0] for word in command_line if word.startswith("--")}
    for group in ALTERNATIVES:
        if given & group:
            given |= group
    return [*_flat({k: v for k, v in flags.items() if k not in given}), *command_line]


def _preset(name: str) -> Mapping[str, FlagValue]:
    if name in PRESETS:
        return PRESETS[name]
    nearest = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0.0)[0]
    raise FlagError(f"--preset {name}: unknown; nearest: {nearest}; all: {', '.join(sorted(PRESETS))}")


def _flat(flags: Mapping[str, FlagValue]) -> Iterator[str]:
    for name, value in flags.items():
        yield f"--{name}"
        if isinstance(value, list):
            yield from value
        elif value is not True:
            yield str(value)


def _peek(flags: Sequence[str]) -> argparse.Namespace:
    """The few values that can be judged before Megatron is imported."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--hybrid-layer-pattern")
    for name, default in (
        ("num-layers", None),
        ("tensor-model-parallel-size", 1),
        ("pipeline-model-parallel-size", 1),
        ("context-parallel-size", 1),
        ("num-attention-heads", None),
        ("num-query-groups", None),
        ("linear-num-key-heads", None),
        ("seq-length", None),
        ("train-iters", None),
        ("lr-decay-iters", None),
        ("lr-warmup-iters", 0),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    for name in _DATA_FLAGS:
        parser.add_argument(f"--{name}", nargs="*", default=[])
    parser.add_argument("--save")
    for name in ("mock-data", "bf16", "fp16", "use-distributed-optimizer", "no-save-optim", "sequence-parallel"):
        parser.add_argument(f"--{name}", action="store_true")
    try:
        return parser.parse_known_args(list(flags))[0]
    except argparse.ArgumentError as error:
        raise FlagError(str(error)) from None


def check(flags: Sequence[str]) -> None:
    """Refuse what cannot run, before Megatron is imported and before any process group is made.

    Raises:
        FlagError: naming the flag, its value and the nearest legal one.
    """
    values = _peek(flags)
    _check_pattern(values)
    _check_tensor_parallel(values)
    _check_pipeline(values)
    _check_schedule(values)
    _check_optimizer(values)
    _check_context_parallel(values)
    if not values.mock_data:
        for name in _DATA_FLAGS:
            for prefix in _prefixes(getattr(values, name.replace("-", "_"))):
                try:
                    require_dataset(prefix)
                except (OSError, ToolError) as error:
                    raise FlagError(f"--{name} {prefix}: {error}") from None


def _check_pattern(values: argparse.Namespace) -> None:
    pattern = values.hybrid_layer_pattern
    if pattern is None:
        raise FlagError(
            "--hybrid-layer-pattern: missing; give one (G Gated DeltaNet layer, * attention layer, | pipeline stage), "
            f"e.g. 'GGG*GGG*', or a preset: {', '.join(sorted(PRESETS))}"
        )
    strange = sorted(set(pattern) - set("G*|"))
    if strange:
        raise FlagError(
            f"--hybrid-layer-pattern {pattern}: symbol {strange[0]!r} is unknown here; legal: G, *, | "
            "(a symbol is a whole layer, mixer and MLP, so there is no '-')"
        )
    layers = len(pattern.replace("|", ""))
    if values.num_layers is not None and values.num_layers != layers:
        raise FlagError(
            f"--num-layers {values.num_layers}: --hybrid-layer-pattern {pattern} has {layers} layers; "
            f"use --num-layers {layers} or change the pattern"
        )


def _check_tensor_parallel(values: argparse.Namespace) -> None:
    """Heads need not divide (`parallel/head_padding.py`); with more ranks than heads, some would hold padding only."""
    tp = values.tensor_model_parallel_size
    heads = {"--num-attention-heads": values.num_attention_heads, "--num-query-groups": values.num_query_groups}
    if "G" in values.hybrid_layer_pattern:
        heads["--linear-num-key-heads"] = values.linear_num_key_heads
    heads = {flag: count for flag, count in heads.items() if count}
    most = min(heads.values(), default=tp)
    if not 1 <= tp <= most:
        fewest = ", ".join(f"{flag} {count}" for flag, count in heads.items() if count == most)
        raise FlagError(
            f"--tensor-model-parallel-size {tp}: must be at least 1 and at most {fewest}; "
            f"nearest legal: {min(max(tp, 1), most)}; legal: 1 to {most} (heads need not divide: they are padded)"
        )


def _check_pipeline(values: argparse.Namespace) -> None:
    pp = values.pipeline_model_parallel_size
    pattern = values.hybrid_layer_pattern
    segments = pattern.count("|") + 1
    if segments % pp and segments > 1:
        legal = [n for n in range(1, segments + 1) if segments % n == 0]
        raise FlagError(
            f"--pipeline-model-parallel-size {pp}: --hybrid-layer-pattern {pattern} has {segments} stages; "
            f"nearest legal: {min(legal, key=lambda n: abs(n - pp))}; legal: {', '.join(map(str, legal))}"
        )
    if segments == 1 and pp > 1 and len(pattern) % pp:
        legal = [n for n in range(1, len(pattern) + 1) if len(pattern) % n == 0]
        raise FlagError(
            f"--pipeline-model-parallel-size {pp}: does not divide {len(pattern)} layers; nearest legal: "
            f"{min(legal, key=lambda n: abs(n - pp))}; or --pipeline-layout auto, "
            "or mark uneven stages with | in --hybrid-layer-pattern"
        )


def _check_context_parallel(values: argparse.Namespace) -> None:
    cp, length = values.context_parallel_size, values.seq_length
    if length is None:
        return
    multiple = 2 * cp if cp > 1 else 1
    if values.sequence_parallel:
        multiple = math.lcm(multiple, cp * values.tensor_model_parallel_size)
    if cp < 1 or length % multiple:
        nearest = max(round(length / max(multiple, 1)), 1) * max(multiple, 1)
        legal = [n for n in range(1, 65) if length % (2 * n) == 0]
        raise FlagError(
            f"--context-parallel-size {cp}: --seq-length {length} must be a multiple of {multiple} (2 parts for each "
            f"context-parallel rank, 1 for each sequence-parallel one); nearest legal length: {nearest}; sizes that "
            f"divide it: {', '.join(map(str, legal))}"
        )


def _check_schedule(values: argparse.Namespace) -> None:
    decay = values.lr_decay_iters or values.train_iters
    if decay and values.lr_warmup_iters >= decay:
        flag = "--lr-decay-iters" if values.lr_decay_iters else "--train-iters"
        raise FlagError(
            f"--lr-warmup-iters {values.lr_warmup_iters}: must be less than {flag} {decay}; nearest legal: {decay - 1}"
        )


def _check_optimizer(values: argparse.Namespace) -> None:
    half = next((flag for flag in ("bf16", "fp16") if getattr(values, flag)), None)
    saves = values.save and not values.no_save_optim
    if half and saves and "G" in values.hybrid_layer_pattern and not values.use_distributed_optimizer:
        raise FlagError(
            f"--{half}: Megatron's plain optimizer cannot save a model with fp32 parameters (A_log, dt_bias); "
            "add --use-distributed-optimizer (one rank will do), or --no-save-optim"
        )


def _prefixes(words: Sequence[str]) -> Iterator[str]:
    """Dataset prefixes of a Megatron blend: `P`, `P Q`, or `weight P weight Q`."""
    for word in words:
        try:
            float(word)
        except ValueError:
            yield word
