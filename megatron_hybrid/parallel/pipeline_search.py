"""Where to cut a row of layers into pipeline segments so that the slowest rank does the least.

L layers with integer costs are cut into S = p·v contiguous segments; segment s runs on rank s mod p (Megatron's
vp-major order). The embedding's cost is added to segment 0, the output layer's to segment S − 1; these two may be
empty of layers, the others may not.

Objective for v = 1: the largest sum of a rank; among equals the sum of squares. Solved by dynamic programming over
(segment, end), exact.

Objective for v > 1: the largest sum of a rank, where sums within `tie` of the least count as equal; among equals the
largest segment, then again the largest sum. (Uneven segments stall an interleaved schedule: with ties taken exactly, a
sum smaller by 0.2 % can cost a tenth of the time.) The sums of ranks depend on cuts far apart, so each step bisects
over the values that can occur. "Can every rank stay within X?" is refused by a relaxation (layers packed into ranks
in any order) or answered by a depth-first search over cuts that remembers where it failed. The search is bounded in
steps, so the least sum may stay unproven; `Cuts.bound` is what no cut can beat.

Last, for v > 1 and `tie` > 0: many cuts within the tie differ in how long ranks wait for each other. Single layers are
moved between segments as long as the schedule, played through (`pipeline_schedule`), gets shorter: a local search,
which keeps every rank within the tie.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, permutations, product

from megatron_hybrid.parallel.pipeline_schedule import play

#: Steps of one search before it gives up: some tenths of a second.
SEARCH_STEPS = 8_000

#: Passes played through while single layers are moved: some tenths of a second.
PLAYED_PASSES = 300_000

#: A layer is moved if that saves this share of a batch's time.
WORTH = 0.002


#: Costs predicted from FLOPs are not exact to this share.
TIE = 0.01


@dataclass(frozen=True)
class Cuts:
    """layers: how many each segment has. slowest: largest sum of a rank; no cut has less than `bound`."""

    layers: tuple[int, ...]
    slowest: int
    largest_segment: int
    bound: int


@dataclass(frozen=True)
class Row:
    """The layers and how they are to be cut. costs: positive; first, last: of embedding and output layer."""

    costs: tuple[int, ...]
    first: int
    last: int
    ranks: int
    rounds: int = 1
    prefix: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        if min(self.costs, default=1) <= 0 or self.first < 0 or self.last < 0:
            raise ValueError("layer costs must be positive, those of the ends not negative")
        if not 1 <= self.segments <= len(self.costs) + min(2, self.segments):
            raise ValueError(f"{len(self.costs)} layers cannot be cut into {self.segments} segments")
        object.__setattr__(self, "prefix", (0, *accumulate(self.costs)))

    @property
    def segments(self) -> int:
        return self.ranks * self.rounds

    @property
    def total(self) -> int:
        return self.prefix[-1] + self.first + self.last

    def may_be_empty(self, segment: int) -> bool:
        return segment in (0, self.segments - 1)

    def edge(self, segment: int) -> int:
        """What a segment costs besides its layers."""
        return self.first * (segment == 0) + self.last * (segment == self.segments - 1)

    def segment_costs(self, layers: Sequence[int]) -> list[int]:
        """The cost of each segment, edges included, when segment s has layers[s] layers."""
        ends = list(accumulate(layers))
        return [
            self.prefix[end] - self.prefix[end - count] + self.edge(segment)
            for segment, (count, end) in enumerate(zip(layers, ends, strict=True))
        ]

    def rank_costs(self, layers: Sequence[int]) -> list[int]:
        costs = self.segment_costs(layers)
        return [sum(costs[rank :: self.ranks]) for rank in range(self.ranks)]


def best_cuts(row: Row, tie: float = TIE) -> Cuts:
    """The cuts whose slowest rank does the least; the objective, and `tie`, are in the module's docstring."""
    if row.rounds == 1:
        layers = _even_cuts(row)
        slowest = bound = max(row.rank_costs(layers))
    else:
        layers, slowest, bound = _interleaved_cuts(row, tie)
    if tie and row.rounds > 1:
        layers = _polished(row, layers, int(slowest * (1 + tie)))
    return Cuts(layers, max(row.rank_costs(layers)), max(row.segment_costs(layers)), bound)


def _polished(row: Row, layers: tuple[int, ...], limit: int) -> tuple[int, ...]:
    """Moves single layers while that shortens a batch of 2·p microbatches and no rank exceeds `limit`."""
    microbatches = 2 * row.ranks
    plays = max(1, PLAYED_PASSES // (2 * microbatches * row.segments))

    def time(cut: Sequence[int]) -> float:
        return play(row.segment_costs(cut), row.ranks, microbatches, chunks=row.rounds).time

    best, shortest = list(layers), time(layers)
    moved = True
    while moved:
        moved = False
        for giver, taker in permutations(range(row.segments), 2):
            if best[giver] == (0 if row.may_be_empty(giver) else 1):
                continue
            tried = list(best)
            tried[giver] -= 1
            tried[taker] += 1
            if max(row.rank_costs(tried)) > limit:
                continue
            if plays == 0:
                return tuple(best)
            plays -= 1
            took = time(tried)
            if took < shortest * (1 - WORTH):
                best, shortest, moved = tried, took, True
    return tuple(best)


def _programme(row: Row, join: Callable[[float, int], float]) -> tuple[int, ...]:
    """Dynamic programming: the cuts with the least `join(value of the segments before, cost of this segment)`."""
    count, infinity = len(row.costs), float("inf")
    value: list[float] = [0] + [infinity] * count  # integers, which stay exact, or infinity
    starts: list[list[int]] = []
    for segment in range(row.segments):
        shortest, edge = 0 if row.may_be_empty(segment) else 1, row.edge(segment)
        after, start = [infinity] * (count + 1), [0] * (count + 1)
        for end in range(count + 1):
            for begin in range(end - shortest, -1, -1):
                if value[begin] == infinity:
                    continue
                candidate = join(value[begin], row.prefix[end] - row.prefix[begin] + edge)
                if candidate < after[end]:
                    after[end], start[end] = candidate, begin
        value = after
        starts.append(start)
    layers, end = [], count
    for start in reversed(starts):
        layers.append(end - start[end])
        end = start[end]
    return tuple(reversed(layers))


def _even_cuts(row: Row) -> tuple[int, ...]:
    """Least largest segment, then least sum of squares under it."""
    limit = max(row.segment_costs(_programme(row, lambda before, cost: max(before, cost))))
    return _programme(row, lambda before, cost: before + cost * cost if cost <= limit else float("inf"))


def _interleaved_cuts(row: Row, tie: float) -> tuple[tuple[int, ...], int, int]:
    """(cuts, least sum found, least sum that is not excluded)."""
    layers = _programme(row, lambda before, cost: max(before, cost))
    sums = _reachable_sums(row)
    least_segment = max(row.segment_costs(layers))  # no cut into as many segments has a smaller largest one
    bound = bisect_left(sums, max(least_segment, -(-row.total // row.ranks)))  # index of what no cut can beat
    highest = bisect_left(sums, max(row.rank_costs(layers)))
    while bound < highest and not _packs(row, sums[bound]):
        bound += 1
    layers, bound = _least(layers, sums, bound, row.rank_costs, lambda value: _Search(row, value, value))
    slowest = max(row.rank_costs(layers))
    limit = int(slowest * (1 + tie))
    segments = _segment_sums(row)
    layers, _ = _least(
        layers,
        segments,
        bisect_left(segments, least_segment),
        row.segment_costs,
        lambda value: _Search(row, limit, value),
    )
    widest = max(row.segment_costs(layers))
    layers, _ = _least(layers, sums, bound, row.rank_costs, lambda value: _Search(row, value, widest))
    return layers, slowest, sums[bound]


def _least(
    layers: tuple[int, ...],
    values: Sequence[int],
    bound: int,
    measure: Callable[[Sequence[int]], list[int]],
    search: Callable[[int], _Search],
) -> tuple[tuple[int, ...], int]:
    """Bisect for the smallest of the sorted `values` that `search` can keep.

    Args:
        layers: cuts to beat.
        bound: values before this index are known to be out of reach.
        measure: the costs of which the largest is to become small.

    Returns:
        The best cuts found and the bound, raised by what complete searches refused.
    """
    low = middle = bound  # the first value is often within reach: try it, then halve
    high = bisect_left(values, max(measure(layers)))
    while low < high:
        found, complete = search(values[middle]).run()
        if found:
            layers, high = found, bisect_left(values, max(measure(found)))
        else:
            low = middle + 1
            bound = low if complete else bound
        middle = (low + high) // 2
    return layers, bound


def _segment_sums(row: Row) -> list[int]:
    """Every value a segment can have."""
    inner = {b - a for i, a in enumerate(row.prefix) for b in row.prefix[i:]}
    return sorted({value + edge for value in inner for edge in (0, row.first, row.last)})


def _reachable_sums(row: Row) -> list[int]:
    """Every value the sum of a rank can take: some layers of each kind, with or without the ends."""
    kinds = Counter(row.costs)
    counts = product(*(range(count + 1) for count in kinds.values()))
    inner = {sum(n * cost for n, cost in zip(chosen, kinds, strict=True)) for chosen in counts}
    return sorted({value + edge for value in inner for edge in (0, row.first, row.last)})


def _packs(row: Row, limit: int) -> bool:
    """Relaxation: do the layers fit into the ranks, each filled up to `limit`, if they need not stay in order?"""
    kinds = sorted(Counter(row.costs).items())
    if len(kinds) > 2:
        return limit * row.ranks >= row.total
    (cost_a, count_a), (cost_b, count_b) = kinds if len(kinds) == 2 else (*kinds, (1, 0))
    most = [0] + [-1] * count_a  # most[a]: the most layers of kind b packed beside a of kind a
    for rank in range(row.ranks):
        room = limit - row.first * (rank == 0) - row.last * (rank == row.ranks - 1)
        if room < 0:
            return False
        after = [-1] * (count_a + 1)
        for before, packed in enumerate(most):
            if packed >= 0:
                for added in range(min(count_a - before, room // cost_a) + 1):
                    here = packed + (room - added * cost_a) // cost_b
                    after[before + added] = max(after[before + added], here)
        most = after
    return most[count_a] >= count_b


class _Search:
    """Depth-first: can the row be cut with every rank within `limit` and every segment within `widest`?"""

    def __init__(self, row: Row, limit: int, widest: int) -> None:
        self.row, self.limit, self.widest = row, limit, widest
        self.steps = SEARCH_STEPS
        self.failed: set[tuple[int, int, tuple[int, ...]]] = set()
        self.layers: list[int] = []

    def run(self) -> tuple[tuple[int, ...] | None, bool]:
        """(cuts or None, whether the search was complete)."""
        row = self.row
        loads = [0] * row.ranks
        loads[0] += row.first
        loads[-1] += row.last  # taken off the last rank's room from the start
        slack = self.limit * row.ranks - row.total  # what all ranks together may leave unused
        slack -= sum(self._unused(load, row.rounds) for load in loads)
        found = slack >= 0 and max(loads) <= self.limit and self._visit(0, 0, loads, slack)
        return (tuple(self.layers) if found else None), self.steps > 0

    def _unused(self, load: int, segments_left: int) -> int:
        """What a rank must leave of its room, however long its remaining segments are."""
        return max(0, self.limit - load - segments_left * self.widest)

    def _visit(self, segment: int, begin: int, loads: list[int], slack: int) -> bool:
        row = self.row
        if segment == row.segments:
            return begin == len(row.costs)
        key = (segment, begin, tuple(loads))
        if key in self.failed or self.steps <= 0:
            return False
        self.steps -= 1
        rank, left = segment % row.ranks, row.rounds - 1 - segment // row.ranks
        load, start = loads[rank], row.prefix[begin]
        slack += self._unused(load, left + 1)
        for stop in self._stops(segment, begin, load, left, slack):
            cost = row.prefix[stop] - start
            loads[rank] = load + cost
            self.layers.append(stop - begin)
            if self._visit(segment + 1, stop, loads, slack - self._unused(load + cost, left)):
                return True
            self.layers.pop()
            loads[rank] = load
        if self.steps > 0:
            self.failed.add(key)
        return False

    def _stops(self, segment: int, begin: int, load: int, left: int, slack: int) -> list[int]:
        """Where this segment may end, the most even choice first. left: segments this rank still gets after it."""
        row, last = self.row, self.row.segments - 1
        start = row.prefix[begin]
        most = min(self.limit - load, self.widest - row.edge(segment))
        least = self.limit - load - left * self.widest - slack
        end = min(
            len(row.costs) - max(0, last - segment - 1),  # one layer for each later segment but the last
            bisect_right(row.prefix, start + most) - 1,
        )
        earliest = max(begin + (not row.may_be_empty(segment)), bisect_left(row.prefix, start + least))
        if segment == last:
            earliest = max(earliest, len(row.costs))
        aim = start + (row.total / row.ranks - load) / (left + 1)
        return sorted(range(earliest, end + 1), key=lambda stop: abs(row.prefix[stop] - aim))
