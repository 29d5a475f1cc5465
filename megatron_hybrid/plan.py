"""What a run would be: steps, tokens, learning rates, memory, and what differs from Ai2's. For `--dry-run`."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Mapping, Sequence

from megatron_hybrid.flops import SizeError, Sizes, parameters, training_flops_per_token
from megatron_hybrid.planning import memory
from megatron_hybrid.planning.job import Job, check_microbatches
from megatron_hybrid.presets import PRESETS

#: {start of preset names: what Ai2 did otherwise, and why}. The longest start that fits, and the shorter ones.
_DIFFERENCES = {
    "": (
        "learning rate: Megatron's first step has the rate of step 0, Ai2's that of step 1: one step later throughout",
        "A_log and dt_bias are kept in fp32; Ai2's run gathered them in bf16",
        "SkipStep: the window is in the checkpoint, and NaN stops the run or, with "
        "--no-check-for-nan-in-loss-and-grad, skips; Ai2's window was empty after restarts, and NaN went through",
    ),
    "olmo-hybrid-7b": (
        "initialisation: OLMo-core's of today (truncated normal 0.02); the released run began before it was mended",
    ),
    "olmo-hybrid-7b-long-context": (
        "documents see each other from the first step; Ai2 masked them until about step 1500 and skipped steps 961-975",
    ),
    "olmo-hybrid-7b-long-context-yarn": ("positions: YaRN, factor 8; Ai2 released the run without rotary embeddings",),
    "olmo-hybrid-7b-sft-instruct": ("steps: from the published 3.4B tokens, twice; Ai2's count is not published",),
    "ladder-": (
        "batch: rounded to 8 sequences of 8,192; Ai2 rounded to what its devices allowed",
        "decays: a tenth of each period, as in OLMo-core's code; the paper says a twentieth",
    ),
    "olmo-hybrid-tiny": ("a model and schedule of this project's own, for tests",),
    "olmo3-7b": ("the transformer it is compared with, on OLMo-Hybrid's schedule and data order",),
}


def plan(flags: Sequence[str], preset: str | None, given: Sequence[str], gpus: int) -> str:
    """The plan of a flat list of flags as text.

    Args:
        preset: the name that the flags come from, if any.
        given: what the command line gave: flags that replace the preset's.
        gpus: of the whole job.

    Raises:
        ValueError: what cannot run on so many GPUs, or sizes that are missing; the message names the flag.
    """
    v, job = _peek(flags), Job.from_flags(flags, gpus)
    check_microbatches(job)
    lines = [f"plan of {preset or 'these flags'} on {gpus} GPU{'s' * (gpus > 1)}", *_length(v), *_rates(v)]
    lines += [*_model(flags, v), *_memory(job), "differs from Ai2's run:"]
    return "\n".join([*lines, *(f"  - {line}" for line in _differences(preset, given))])


def _length(v: argparse.Namespace) -> Iterator[str]:
    batch = v.global_batch_size * v.seq_length
    yield f"  batch        {v.global_batch_size:,} sequences of {v.seq_length:,} = {batch:,} tokens"
    yield f"  steps        {v.train_iters:,} = {v.train_iters * batch:,} tokens; data seed {v.seed}"
    positions = {"rope": f"rotary, base {v.rotary_base:,}", "none": "none", "yarn": "YaRN"}
    yield f"  positions    {positions.get(v.position_embedding_type, v.position_embedding_type)}"


def learning_rate(v: argparse.Namespace, step: int) -> float:
    """After `step` steps, by Megatron's rules: cosine or linear to --min-lr, or the stable part and decays of WSD."""
    warmup = v.lr_warmup_iters
    if warmup and step <= warmup:
        return v.lr * step / warmup
    if v.lr_decay_style == "WSD":
        ends = [int(end) for end in v.wsds_periods.split(",") if end] or [v.train_iters]
        period = next(i for i, end in enumerate(ends) if step <= end)
        length = ends[period] - (ends[period - 1] if period else 0)
        decay = 0.1 * length if v.wsds_periods else v.lr_wsd_decay_iters
        share = min(1.0, (ends[period] - step) / decay)
    else:
        ratio = (step - warmup) / (v.train_iters - warmup)
        share = {"cosine": 0.5 * (1 + math.cos(math.pi * ratio)), "linear": 1 - ratio, "constant": 1.0}[
            v.lr_decay_style
        ]
    return v.min_lr + share * (v.lr - v.min_lr)


def _rates(v: argparse.Namespace) -> Iterator[str]:
    style = "WSD-S" if v.wsds_periods else v.lr_decay_style
    ends = f"first {learning_rate(v, 0):.4g}, peak {v.lr:.6g} at {v.lr_warmup_iters:,}"
    yield f"  learning rate {style}: {ends}, last {learning_rate(v, v.train_iters):.4g} at {v.train_iters:,}"
    if v.wsds_periods:
        yield f"               periods end at {v.wsds_periods}; each decays in its last tenth"
    yield (
        f"  optimizer    weight decay {v.weight_decay:g} on {v.weight_decay_on.replace('_', ' ')}, betas "
        f"{v.adam_beta1:g} {v.adam_beta2:g}, z-loss {v.z_loss:g}, SkipStep {'on' if v.skip_step else 'off'}"
    )


def _model(flags: Sequence[str], v: argparse.Namespace) -> Iterator[str]:
    count, sizes = parameters(flags), Sizes.from_flags(flags)
    layers = v.hybrid_layer_pattern.replace("|", "")
    per_token = training_flops_per_token(sizes, layers, v.seq_length)
    total = per_token * v.train_iters * v.global_batch_size * v.seq_length
    rest = count - sizes.vocabulary_rows * sizes.hidden
    yield f"  parameters   {count:,}; without the input embedding {rest:,}"
    yield f"  work         {per_token / 1e9:.1f} GFLOP a token, {total:.2e} FLOP in all"


def _memory(job: Job) -> Iterator[str]:
    rank, needed = memory.fullest(job)
    where = f" on pipeline rank {rank}, the fullest" if job.pp > 1 else ""
    yield f"  memory       {needed}{where}"


def _differences(preset: str | None, given: Sequence[str]) -> Iterator[str]:
    name = preset or ""
    for start, differences in _DIFFERENCES.items():
        if name.startswith(start):
            yield from differences
    flags: Mapping[str, object] = PRESETS.get(name, {})
    for word in given:
        flag, _, value = word.removeprefix("--").partition("=")
        if word.startswith("--") and flag in flags:
            position = list(given).index(word) + 1
            new = value or next(iter(given[position : position + 1]), "")
            yield f"--{flag}: {new} instead of {flags[flag]}, as the command line says"


def _peek(flags: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name, default in (
        *(("global-batch-size", 1), ("seq-length", 0), ("train-iters", 0), ("seed", 1234)),
        *(("lr-warmup-iters", 0), ("lr-wsd-decay-iters", 1), ("rotary-base", 10000)),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    for name, number in (
        *(("lr", 0.0), ("min-lr", 0.0), ("weight-decay", 0.01), ("z-loss", 1e-5)),
        *(("adam-beta1", 0.9), ("adam-beta2", 0.999)),
    ):
        parser.add_argument(f"--{name}", type=float, default=number)
    for name, text in (
        *(("hybrid-layer-pattern", ""), ("lr-decay-style", "linear"), ("wsds-periods", "")),
        *(("position-embedding-type", "learned_absolute"), ("weight-decay-on", "all_but_embedding")),
    ):
        parser.add_argument(f"--{name}", default=text)
    parser.add_argument("--skip-step", action=argparse.BooleanOptionalAction, default=True)
    values = parser.parse_known_args(list(flags))[0]
    for name in ("seq_length", "train_iters", "lr"):
        if not getattr(values, name):
            raise SizeError(f"--{name.replace('_', '-')}: missing; a plan needs it")
    return values
