"""How long a pipeline takes: Megatron's order of forward and backward passes played through with given stage times.

Without interleaving that order is 1F1B; with v chunks a rank it is Megatron's interleaved one, with groups of p
microbatches. Messages take no time and passes do not wait for anything but their inputs, so what comes out is the
idle time that the order and the stage times alone impose.

With equal stages the idle time over the busy time is (p − 1) / m, or (p − 1) / (m·v) interleaved.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

#: (backward?, microbatch, chunk)
Pass = tuple[bool, int, int]


@dataclass(frozen=True)
class Playback:
    """time: of the whole batch. busy: of each rank. Units: those of the costs given."""

    time: float
    busy: tuple[float, ...]

    @property
    def idle_share(self) -> float:
        """Share of all ranks' time in which they have nothing to do."""
        return 1 - sum(self.busy) / (len(self.busy) * self.time)

    @property
    def imbalance_share(self) -> float:
        """The part of `idle_share` that remains with any number of microbatches: ranks wait for the slowest."""
        return (max(self.busy) - sum(self.busy) / len(self.busy)) / self.time

    @property
    def bubble_share(self) -> float:
        """The part of `idle_share` that comes from filling and draining the pipeline."""
        return self.idle_share - self.imbalance_share


def passes(rank: int, ranks: int, chunks: int, microbatches: int) -> Iterator[Pass]:
    """The order in which Megatron runs a rank's passes (core/pipeline_parallel/schedules.py)."""
    if chunks == 1:
        forward = backward = [(microbatch, 0) for microbatch in range(microbatches)]
        warmup = ranks - rank - 1
    else:
        forward = [
            (microbatch, chunk)
            for group in range(0, microbatches, ranks)
            for chunk in range(chunks)
            for microbatch in range(group, min(group + ranks, microbatches))
        ]
        backward = [(microbatch, chunks - 1 - chunk) for microbatch, chunk in forward]
        warmup = (ranks - rank - 1) * 2 + (chunks - 1) * ranks
    warmup = min(warmup, len(forward))
    yield from ((False, *one) for one in forward[:warmup])
    for ahead, behind in zip(forward[warmup:], backward, strict=False):
        yield (False, *ahead)
        yield (True, *behind)
    yield from ((True, *one) for one in backward[len(forward) - warmup :])


def play(
    forward: Sequence[float], ranks: int, microbatches: int, backward_ratio: float = 2.0, chunks: int = 1
) -> Playback:
    """Play a batch through the pipeline.

    Args:
        forward: the forward time of each segment for one microbatch; segment s runs on rank s mod `ranks`.
        backward_ratio: backward time over forward time.
    """
    last = ranks * chunks - 1
    done: dict[tuple[bool, int, int], float] = {}  # (backward?, microbatch, segment): when
    clock, busy = [0.0] * ranks, [0.0] * ranks
    orders = [passes(rank, ranks, chunks, microbatches) for rank in range(ranks)]
    waiting: list[Pass | None] = [next(order, None) for order in orders]
    moved = True
    while moved:
        moved = False
        for rank in range(ranks):
            while (current := waiting[rank]) is not None:
                back, microbatch, chunk = current
                segment = chunk * ranks + rank
                if not back:
                    before = (False, microbatch, segment - 1) if segment else None
                else:
                    before = (True, microbatch, segment + 1) if segment < last else (False, microbatch, last)
                if before is not None and before not in done:
                    break
                takes = forward[segment] * (backward_ratio if back else 1)
                clock[rank] = max(clock[rank], done[before] if before else 0.0) + takes
                busy[rank] += takes
                done[back, microbatch, segment] = clock[rank]
                waiting[rank] = next(orders[rank], None)
                moved = True
    if any(current is not None for current in waiting):
        raise RuntimeError(f"{microbatches} microbatches do not pass through {ranks} ranks with {chunks} chunks")
    return Playback(max(clock), tuple(busy))
