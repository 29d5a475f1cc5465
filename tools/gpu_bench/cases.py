"""The comparisons that are published, as data: each case is a model, given by flags, and how often it is stepped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from megatron_hybrid.tools.gpu_bench.fla import UNCHECKED

Kind = Literal["train", "huggingface", "olmo_core", "profile", "decode"]


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Args:
        name: unique.
        group: rows of a group are compared; the first of a group is what ratios refer to.
        needs_gib: GPU memory below which the case is not tried.
        text: real text instead of random ids.
        longest_s: a visit that takes longer is ended: kernels that hang do not come back.
    """

    name: str
    group: str
    preset: str = "olmo-hybrid-7b"
    flags: tuple[str, ...] = ()
    kind: Kind = "train"
    warmup: int = 2
    steps: int = 4
    rounds: int = 2
    needs_gib: float = 0
    text: bool = False
    optimizer: bool = True
    longest_s: float = 150
    note: str = ""
    options: dict[str, int] = field(default_factory=dict)


def words(text: str) -> tuple[str, ...]:
    """Flags as they are typed."""
    return tuple(text.split())


_RUN = words("--mock-data --train-iters 1000 --lr 1e-4 --min-lr 1e-5 --lr-warmup-iters 0 --micro-batch-size 1")
_EIGHT = (*_RUN, *words("--num-layers 8 --hybrid-layer-pattern GGG*GGG* --no-skip-step"))
#: 2,441 million parameters in eight layers, the hybrid 2,436 million.
_TRANSFORMER = words("--num-layers 8 --hybrid-layer-pattern ********")
_MEGATRON = words("--spec megatron_hybrid.tools.gpu_bench.peer_spec megatron_gdn_stack_spec")
LEAN = words("--use-precision-aware-optimizer --main-grads-dtype bf16 --exp-avg-dtype bf16 --exp-avg-sq-dtype bf16")
#: Four sequences a step, so that the optimizer's share is nearer to a real run's, and moments in bf16, so that every
#: row fits 80 GB.
_SHORT = (*_EIGHT, *LEAN, *words("--global-batch-size 4"))


def _sequence(tokens: int) -> tuple[str, ...]:
    """One long sequence a step."""
    return words(
        f"--seq-length {tokens} --max-position-embeddings {tokens} --global-batch-size 1 --loss-chunk-tokens 8192"
    )


#: A first visit with flash-linear-attention times some 200 candidates of its kernels.
TUNING_S = 300

FP8 = {
    "tensorwise": words("--fp8-format hybrid --fp8-recipe tensorwise"),
    "delayed": words(
        "--fp8-format hybrid --fp8-recipe delayed --fp8-amax-history-len 1024 --fp8-amax-compute-algo max"
    ),
    "blockwise": words("--fp8-format e4m3 --fp8-recipe blockwise"),
}

_RECOMPUTE = {
    "none": (),
    "core_attn": words("--recompute-granularity selective --recompute-modules core_attn"),
    "mlp": words("--recompute-granularity selective --recompute-modules mlp"),
    "gdn_norm_out": words("--recompute-granularity selective --recompute-modules gdn_norm_out"),
    "gdn_norm_out, mlp": words("--recompute-granularity selective --recompute-modules gdn_norm_out mlp"),
    "full": words("--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"),
}


def _peers(flags: tuple[str, ...], **more: Any) -> list[Case]:
    """Whole models of others."""
    case = Case("Hugging Face", "8k", flags=flags, kind="huggingface", rounds=1, longest_s=TUNING_S, **more)
    core = replace(case, name="OLMo-core", kind="olmo_core", options={"compiled": 0})
    return [case, core, replace(core, name="OLMo-core, torch.compile", options={"compiled": 1})]


def _speed() -> list[Case]:
    cases = [
        Case("ours", "8k", flags=_SHORT),
        Case("ours, intermediates kept", "8k", flags=(*_SHORT, "--gdn-keep-intermediates")),
        Case(
            "Megatron-Core's GDN + FLA",
            "8k",
            flags=(*_SHORT, *_MEGATRON),
            longest_s=TUNING_S,
            note=UNCHECKED,
        ),
        Case("olmo3 transformer", "8k", "olmo3-7b", (*_SHORT, *_TRANSFORMER)),
        *(Case(f"ours, FP8 {name}", "8k", flags=(*_SHORT, *flags)) for name, flags in FP8.items()),
    ]
    cases += [
        Case(
            "ours, FP8 tensorwise, FP8 parameters",
            "8k",
            flags=(*_SHORT, *FP8["tensorwise"], "--fp8-param-gather"),
            rounds=1,
        ),
        Case("ours, with SkipStep", "8k", flags=(*_SHORT, "--skip-step"), rounds=1),
        *_peers(_SHORT, steps=3),
    ]
    return cases


def _long() -> list[Case]:
    """Beside olmo3's six layers in eight with windows of 4,096, and beside full attention everywhere."""
    cases = []
    for group, tokens in (("64k", 65536), ("128k", 131072)):
        flags = (*_EIGHT, *_sequence(tokens), *_RECOMPUTE["full"])
        ours = Case("ours", group, flags=flags, warmup=1, steps=3, rounds=1)
        windows = replace(ours, name="olmo3 transformer", preset="olmo3-7b", flags=(*flags, *_TRANSFORMER))
        full = replace(
            windows,
            name="transformer, full attention",
            flags=(*windows.flags, "--window-attn-skip-freq", "1"),
            note="no layer has olmo3's sliding window",
        )
        cases += [ours, windows, full]
    return cases


def _memory() -> list[Case]:
    flags = (*_EIGHT, *_sequence(65536))
    return [
        Case(f"recompute {name}", "64k memory", flags=(*flags, *more), warmup=1, steps=2, rounds=1)
        for name, more in _RECOMPUTE.items()
    ]


def _whole() -> list[Case]:
    flags = (*_RUN, *LEAN, *words("--global-batch-size 1 --loss-chunk-tokens 2048 --no-skip-step --lr 3e-5"))
    return [
        Case(
            "7B, 32 layers",
            "7B",
            flags=(*flags, *_RECOMPUTE["mlp"]),
            warmup=0,
            steps=20,
            rounds=1,
            needs_gib=120,
            text=True,
        )
    ]


def _profiles() -> list[Case]:
    return [
        Case("ours", "profile", flags=_SHORT, kind="profile", rounds=1),
        Case("ours, FP8 tensorwise", "profile", flags=(*_SHORT, *FP8["tensorwise"]), kind="profile", rounds=1),
        Case("Megatron-Core's GDN + FLA", "profile", flags=(*_SHORT, *_MEGATRON), kind="profile", rounds=1),
    ]


def _decoding() -> list[Case]:
    return [
        Case(f"{tokens:,} tokens", "decode", flags=_SHORT, kind="decode", rounds=1, options={"context": tokens})
        for tokens in (8192, 65536)
    ]


CASES = [*_speed(), *_profiles(), *_whole(), *_long(), *_decoding(), *_memory()]

_TWO = (*_SHORT, *words("--num-layers 2 --hybrid-layer-pattern G*"))
#: Not measured: they leave compiled kernels in triton's cache. Meant to run while something else is not timed either.
WARM_UP = [
    Case(name, "compile", flags=(*_TWO, *more), warmup=0, steps=1, rounds=1, optimizer=False)
    for name, more in (("ours", ()), ("Megatron-Core's GDN + FLA", _MEGATRON))
]


#: For trying the tool itself, on CPU too.
_TINY_RUN = words(
    "--mock-data --train-iters 10 --lr 1e-3 --min-lr 1e-4 --lr-warmup-iters 0 --micro-batch-size 1 "
    "--global-batch-size 2 --num-layers 4 --hybrid-layer-pattern GGG* --seq-length 64 "
    "--bf16 --use-distributed-optimizer"
)


def tiny() -> list[Case]:
    """The kinds of cases at sizes of the smallest preset."""
    flags = _TINY_RUN
    small = {"preset": "olmo-hybrid-tiny", "warmup": 1, "steps": 1}
    return [
        Case("ours", "8k", flags=flags, **small),  # type: ignore[arg-type]
        Case("unknown flag", "8k", flags=(*flags, "--no-such-flag"), **small),  # type: ignore[arg-type]
        Case("ours, with SkipStep", "8k", flags=(*flags, "--skip-step"), text=True, **small),  # type: ignore[arg-type]
        *_peers(flags, **small),
        Case("ours", "profile", flags=flags, kind="profile", rounds=1, **small),  # type: ignore[arg-type]
        Case("8,192 tokens", "decode", flags=flags, kind="decode", rounds=1, options={"context": 256}, **small),  # type: ignore[arg-type]
        Case("too large", "7B", flags=flags, needs_gib=1e9, **small),  # type: ignore[arg-type]
    ]


def visits(cases: Sequence[Case]) -> list[tuple[Case, int]]:
    """(case, round) in order: rounds of a group alternate, so that a slow minute falls on all of its rows."""
    groups: dict[str, list[Case]] = {}
    for case in cases:
        groups.setdefault(case.group, []).append(case)
    ordered = []
    for members in groups.values():
        for number in range(max(case.rounds for case in members)):
            ordered += [(case, number) for case in members if number < case.rounds]
    return ordered
