"""Which layers each pipeline stage should hold: writes the `|` into --hybrid-layer-pattern.

    python -m megatron_hybrid.parallel.pipeline_layout --preset olmo-hybrid-7b --pipeline-model-parallel-size 4

prints the stages' costs, the predicted idle time and the pattern to paste; `--pipeline-layout auto` of
`megatron_hybrid.pretrain` does the same by itself. Costs are FLOPs (`megatron_hybrid.flops`) or, with --costs, measured
times. The embedding belongs to the first stage, output layer and loss to the last; these two may hold no layer, the
others must (Megatron cannot load a stage without parameters). How the cuts are found: `pipeline_search`.

What the balance does not know: memory, communication, and, with FLOPs, that parts run at different speeds (FP8 linears,
a bf16 output layer, a memory-bound delta rule). Tensor and context parallelism divide every part alike.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_hybrid import flops
from megatron_hybrid.flags import FlagError, Parser, compose, print_report
from megatron_hybrid.parallel.pipeline_schedule import Playback, play
from megatron_hybrid.parallel.pipeline_search import Row, best_cuts

#: {part: cost}; FLOPs per token or ms per microbatch, forward and backward.
Parts = Mapping[str, float]

#: Costs become integers of this share of the dearest layer, for exact sums.
_RESOLUTION = 1 << 40


@dataclass(frozen=True)
class Costs:
    """layers: of each layer, in order. embedding, output: of the ends."""

    layers: tuple[Parts, ...]
    embedding: Parts
    output: Parts
    unit: str

    @classmethod
    def from_flops(cls, sizes: flops.Sizes, pattern: str, sequence_tokens: int) -> Costs:
        """GFLOP per token, forward and backward."""

        def giga(parts: Parts) -> Parts:
            return {name: value * (1 + flops.BACKWARD) / 1e9 for name, value in parts.items()}

        layers = [
            flops.layer_parts(sizes, symbol, sequence_tokens, sizes.windowed(number))
            for number, symbol in enumerate(pattern, start=1)
        ]
        return cls(
            tuple(map(giga, layers)),
            giga(flops.embedding_parts(sizes)),
            giga(flops.output_parts(sizes)),
            "GFLOP per token",
        )

    @classmethod
    def from_file(cls, path: Path, pattern: str, sizes: flops.Sizes) -> Costs:
        """Measured ms of one microbatch, forward and backward: {"G": …, "*": …, "embedding": …, "output": …}.

        Each is a number or {part: number}; "*window" holds attention layers with a sliding window.

        Raises:
            FlagError: unreadable, an unknown name, or one missing.
        """
        try:
            measured = json.loads(path.read_text())
        except OSError as error:
            raise FlagError(f"--costs {path}: {error.strerror}; name a JSON file of measured ms") from None
        except ValueError as error:
            raise FlagError(f"--costs {path}: no JSON ({error})") from None
        names = [
            "*window" if symbol == "*" and sizes.windowed(number) else symbol
            for number, symbol in enumerate(pattern, start=1)
        ]
        found = {name: _measured_parts(path, measured, name) for name in {*names, "embedding", "output"}}
        unknown = sorted(set(measured) - {"G", "*", "*window", "embedding", "output"})
        if unknown:
            raise FlagError(f"--costs {path}: {unknown[0]!r} is unknown; legal: G, *, *window, embedding, output")
        if not all(sum(found[name].values()) > 0 for name in names):
            raise FlagError(f"--costs {path}: a layer's time must be more than 0")
        layers = tuple(found[name] for name in names)
        return cls(layers, found["embedding"], found["output"], "ms per microbatch")


def _measured_parts(path: Path, measured: object, name: str) -> Parts:
    value = measured.get(name) if isinstance(measured, dict) else None
    if value is None:
        raise FlagError(f'--costs {path}: {name!r} is missing; write {{"{name}": milliseconds, ...}}')
    parts = value if isinstance(value, dict) else {name: value}
    for part, time in parts.items():
        if isinstance(time, bool) or not isinstance(time, int | float) or not 0 <= time < float("inf"):
            raise FlagError(f"--costs {path}: {name}: {part}: {time!r} is no time in ms")
    return parts


@dataclass(frozen=True)
class Plan:
    """A pattern with `|` and what its segments cost. bound: no layout has a slowest rank below this cost."""

    segments: tuple[str, ...]
    parts: tuple[Parts, ...]
    ranks: int
    bound: float
    unit: str

    @property
    def pattern(self) -> str:
        return "|".join(self.segments)

    @property
    def chunks(self) -> int:
        return len(self.segments) // self.ranks

    @property
    def segment_costs(self) -> tuple[float, ...]:
        return tuple(sum(parts.values()) for parts in self.parts)

    @property
    def rank_costs(self) -> tuple[float, ...]:
        """Of each rank, over all its chunks; segment s belongs to rank s mod `ranks`."""
        return tuple(sum(self.segment_costs[rank :: self.ranks]) for rank in range(self.ranks))

    @property
    def imbalance(self) -> float:
        """Slowest rank over the mean: 1 is perfect."""
        return max(self.rank_costs) * self.ranks / sum(self.rank_costs)

    def play(self, microbatches: int) -> Playback:
        """The predicted course of one batch."""
        return play(self.segment_costs, self.ranks, microbatches, flops.BACKWARD, self.chunks)


def plan(pattern: str, costs: Costs, ranks: int, chunks: int = 1) -> Plan:
    """The balanced layout of `pattern` (without `|`) over `ranks` pipeline ranks with `chunks` virtual stages each.

    Raises:
        FlagError: fewer than 1, or more stages than layers can fill.
    """
    _check_stages(len(pattern), ranks, chunks)
    unit = _RESOLUTION / max(sum(parts.values()) for parts in costs.layers)

    def whole(parts: Parts) -> int:
        return round(sum(parts.values()) * unit)

    row = Row(tuple(map(whole, costs.layers)), whole(costs.embedding), whole(costs.output), ranks, chunks)
    cuts = best_cuts(row)
    segments, parts, begin = [], [], 0
    for index, count in enumerate(cuts.layers):
        segments.append(pattern[begin : begin + count])
        held = [*costs.layers[begin : begin + count]]
        held = [costs.embedding, *held] if index == 0 else held
        held = [*held, costs.output] if index == row.segments - 1 else held
        parts.append(_added(held))
        begin += count
    return Plan(tuple(segments), tuple(parts), ranks, cuts.bound / unit, costs.unit)


def _added(many: Sequence[Parts]) -> Parts:
    total: dict[str, float] = {}
    for parts in many:
        for name, value in parts.items():
            total[name] = total.get(name, 0) + value
    return total


def _check_stages(layers: int, ranks: int, chunks: int) -> None:
    if ranks < 1:
        raise FlagError(f"--pipeline-model-parallel-size {ranks}: nearest legal: 1")
    most = layers + 2 if ranks > 1 else 1  # first and last may hold none
    if ranks > most:
        raise FlagError(
            f"--pipeline-model-parallel-size {ranks}: {layers} layers fill at most {most} stages (embedding and "
            f"output layer may stand alone); nearest legal: {most}"
        )
    legal = [n for n in range(1, most // ranks + 1) if n == 1 or ranks > 1]
    if chunks not in legal:
        nearest = min(legal, key=lambda n: abs(n - chunks))
        raise FlagError(
            f"{chunks} virtual stages (--virtual-stages {chunks}, --pipeline-layout auto:{chunks}) with "
            f"--pipeline-model-parallel-size {ranks} and {layers} layers: nearest legal: {nearest}; legal: "
            f"{', '.join(map(str, legal))}"
        )


def check_microbatches(microbatches: int, ranks: int, chunks: int) -> None:
    """Megatron's interleaved schedule takes microbatches in groups of `ranks`.

    Raises:
        FlagError: fewer than 1; interleaved, not a multiple of `ranks`.
    """
    if microbatches < 1 or (chunks > 1 and microbatches % ranks):
        step = ranks if chunks > 1 else 1
        nearest = max(step, round(microbatches / step) * step)
        raise FlagError(
            f"--microbatches {microbatches}: must be at least 1, and with virtual stages a multiple of "
            f"--pipeline-model-parallel-size {ranks}; nearest legal: {nearest}"
        )


def _bare_pattern(pattern: str | None, flag: str) -> str:
    if not pattern or set(pattern) - set("G*|"):
        raise FlagError(f"--hybrid-layer-pattern {pattern}: give G and * layers, e.g. 'GGG*GGG*', or a --preset")
    if "|" in pattern:
        bare = pattern.replace("|", "")
        raise FlagError(f"--hybrid-layer-pattern {pattern}: {flag} sets the | itself; give {bare}, or leave {flag} out")
    return pattern


def _numbers(flags: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--hybrid-layer-pattern")
    parser.add_argument("--pipeline-layout")
    parser.add_argument("--pipeline-model-parallel-size", type=int, default=1)
    parser.add_argument("--seq-length", type=int)
    try:
        return parser.parse_known_args(list(flags))[0]
    except argparse.ArgumentError as error:
        raise FlagError(str(error)) from None


def _plan_flags(flags: Sequence[str], chunks: int, flag: str, costs: Path | None = None) -> Plan:
    values = _numbers(flags)
    pattern = _bare_pattern(values.hybrid_layer_pattern, flag)
    if values.seq_length is None or values.seq_length < 1:
        raise FlagError(f"--seq-length {values.seq_length}: {flag} needs it; give the tokens of a sequence, e.g. 8192")
    try:
        sizes = flops.Sizes.from_flags(flags)
    except flops.SizeError as error:
        raise FlagError(str(error)) from None
    if costs is not None:
        per_layer = Costs.from_file(costs, pattern, sizes)
    else:
        per_layer = Costs.from_flops(sizes, pattern, values.seq_length)
    return plan(pattern, per_layer, values.pipeline_model_parallel_size, chunks)


def resolve(flags: Sequence[str]) -> tuple[list[str], str | None]:
    """A flat list of flags with --pipeline-layout replaced by what it stands for.

    Returns:
        The flags, with the planned --hybrid-layer-pattern, and a line for the log; unchanged and None where there is
        nothing to plan.

    Raises:
        FlagError: a value that is unknown, `|` in the pattern beside `auto`, stages that the layers cannot fill.
    """
    values = _numbers(flags)
    layout = values.pipeline_layout
    if layout is None:
        return list(flags), None
    rest = _without(flags, "--pipeline-layout")
    if layout == "pattern":
        return rest, None
    name, _, number = layout.partition(":")
    if name != "auto" or (":" in layout and not number.isdecimal()):
        raise FlagError(
            f"--pipeline-layout {layout}: nearest legal: auto; legal: pattern, auto, auto:V with V virtual stages"
        )
    planned = _plan_flags(rest, int(number) if number else 1, f"--pipeline-layout {layout}")
    if planned.ranks == 1:
        return rest, None
    rest = [*_without(rest, "--hybrid-layer-pattern"), "--hybrid-layer-pattern", planned.pattern]
    rows = flops.Sizes.from_flags(rest).vocabulary_rows
    said = (
        f"--pipeline-layout {layout}: --hybrid-layer-pattern '{planned.pattern}' (slowest stage "
        f"{planned.imbalance:.3f} times the mean by FLOPs, output layer with {rows:,} rows)"
    )
    return rest, said


def _without(flags: Sequence[str], name: str) -> list[str]:
    kept, words = [], iter(flags)
    for word in words:
        if word == name:
            next(words, None)
        elif not word.startswith(f"{name}="):
            kept.append(word)
    return kept


def table(planned: Plan) -> str:
    """One row a rank: its layers (chunks apart), the cost of each part, the sum, the sum over the mean."""
    names = list(_added(planned.parts))
    mean = sum(planned.rank_costs) / planned.ranks
    rows = [["rank", "layers", *names, "sum", "/ mean"]]
    for rank, cost in enumerate(planned.rank_costs):
        parts = _added(planned.parts[rank :: planned.ranks])
        held = "  ".join(segment or "-" for segment in planned.segments[rank :: planned.ranks])
        cells = [f"{parts[name]:.3f}" if name in parts else "" for name in names]
        rows.append([str(rank), held, *cells, f"{cost:.3f}", f"{cost / mean:.3f}"])
    total = _added(planned.parts)
    cells = [f"{total[name]:.3f}" for name in names]
    rows.append(["all", "", *cells, f"{sum(planned.rank_costs):.3f}", ""])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def report(planned: Plan, microbatches: int) -> str:
    """The table, the balance, the predicted idle time and the pattern."""
    played = planned.play(microbatches)
    equal_bubble = (planned.ranks - 1) / (microbatches * planned.chunks)
    slowest = max(planned.rank_costs)
    predicted = "measured times" if planned.unit.startswith("ms") else "FLOPs"
    lines = [
        f"costs: {planned.unit}, forward and backward",
        table(planned),
        f"slowest rank: {planned.imbalance:.3f} times the mean; no layout is below "
        f"{planned.bound * planned.ranks / sum(planned.rank_costs):.3f}"
        + (" (this is the optimum)" if slowest <= planned.bound * (1 + 1e-9) else ""),
        f"prediction from {predicted}, {microbatches} microbatches, Megatron's schedule without communication: "
        f"{played.idle_share:.1%} of the ranks' time is idle",
        f"  {played.imbalance_share:.1%} waiting for the slowest rank, {played.bubble_share:.1%} filling and draining "
        f"(equal stages: bubble (p-1)/(m·v) = {equal_bubble:.1%} of the busy time)",
    ]
    if planned.chunks > 1:
        largest = max(planned.segment_costs) * len(planned.segments) / sum(planned.segment_costs)
        lines.insert(3, f"largest chunk: {largest:.3f} times the mean chunk")
    return "\n".join([*lines, "", f"--hybrid-layer-pattern '{planned.pattern}'"])


def _arguments(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = Parser(
        prog="python -m megatron_hybrid.parallel.pipeline_layout",
        description="Balance pipeline stages. Size flags of Megatron (--hidden-size, --seq-length, ...) are understood "
        "and replace the preset's.",
        allow_abbrev=False,
    )
    parser.add_argument("--preset", metavar="NAME", help="named set of flags to take the sizes from")
    parser.add_argument("--virtual-stages", type=int, default=1, metavar="V", help="chunks a rank (default: 1)")
    parser.add_argument(
        "--microbatches", type=int, default=32, metavar="M", help="a batch's microbatches on one pipeline (default: 32)"
    )
    parser.add_argument("--costs", type=Path, metavar="FILE", help="JSON with measured ms; see Costs.from_file")
    return parser.parse_known_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    own, rest = _arguments(argv)
    try:
        flags = compose(own.preset, rest)
        planned = _plan_flags(flags, own.virtual_stages, "this command", own.costs)
        check_microbatches(own.microbatches, planned.ranks, planned.chunks)
    except FlagError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    print_report(report(planned, own.microbatches))


if __name__ == "__main__":
    main()
