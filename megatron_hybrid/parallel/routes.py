"""Who holds which tokens under context parallelism, worked out on the host once per batch.

A document is cut into parts; a rank's local tokens are a row of segments, each a contiguous piece of one document.

- `zigzag`, Megatron's layout: every document is cut into 2·W equal parts, rank r holds parts r and 2·W−1−r of each,
  document after document. Causal attention then costs every rank the same.
- `contiguous`: rank r holds tokens [r·T/W, (r+1)·T/W) of the packed batch; documents end wherever they end.

State passing sees a chain of positions that the state runs through. Zigzag: one chain per document, of 2·W positions,
the same ranks for every document. Contiguous: one chain over the ranks, a document that begins inside a rank cutting
it off from what came before.

Letters: W context-parallel size, T tokens of the batch over all ranks, N documents, P chain positions.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Literal

import torch

Layout = Literal["zigzag", "contiguous"]

#: Inputs before a token that the short convolution (width 4) looks at.
HALO = 3


@dataclass(frozen=True)
class Segment:
    """A contiguous piece of one document on one rank. start and stop are positions in the document."""

    document: int
    start: int
    stop: int

    @property
    def tokens(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Routes:
    """Everything a layer needs to know of the layout, as tensors on its device; no layer asks the device anything.

    Attributes:
        cu_segments: [S + 1] int32, bounds of this rank's segments in its local tokens.
        owner: rank of each of the P chain positions.
        summarised: [slots, chains] int64 (chains: N in zigzag, 1 in contiguous), which local segments this rank's chain
            positions stand for, in chain order.
        carries: [slots, chains] fp32, 0 where the state before the position cannot reach its end: a document begins in
            it.
        incoming: [S] int64, for each local segment the chain position (slot·chains + chain) whose incoming state it
            takes, or slots·chains for none.
        tails: [n] int64, local tokens that other ranks may need as halo; the same n on every rank.
        halo: [S, 3] int64, for each segment its three preceding tokens in the gathered tails, or W·n for none.
        documents, positions: [W, T/W] int64, document and position in it of every rank's tokens.
        order: [T] int64, the tokens rank after rank (as gathered) in the order of the documents.
        cu_documents: [N + 1] int32, bounds of the documents in that order.
    """

    world: int
    rank: int
    owner: tuple[int, ...]
    cu_segments: torch.Tensor
    summarised: torch.Tensor
    carries: torch.Tensor
    incoming: torch.Tensor
    tails: torch.Tensor
    halo: torch.Tensor
    documents: torch.Tensor
    positions: torch.Tensor
    order: torch.Tensor
    cu_documents: torch.Tensor

    @property
    def slots(self) -> int:
        """Chain positions on each rank."""
        return self.summarised.shape[0]


def segments_of(lengths: Sequence[int], world: int, rank: int, layout: Layout) -> list[Segment]:
    """A rank's segments in the order of its local tokens; empty ones (of empty documents) included in zigzag.

    Raises:
        ValueError: the layout cannot hold these documents on `world` ranks; says what it could hold.
    """
    if layout == "zigzag":
        for document, length in enumerate(lengths):
            if length % (2 * world):
                raise ValueError(
                    f"document {document} of {length} tokens: the zigzag layout on --context-parallel-size {world} "
                    f"needs a multiple of {2 * world}; pad it to {-(-length // (2 * world)) * 2 * world}"
                )
        parts = (rank, 2 * world - 1 - rank)
        sizes = [length // (2 * world) for length in lengths]
        return [Segment(d, part * size, (part + 1) * size) for d, size in enumerate(sizes) for part in parts]
    total = sum(lengths)
    if total % world:
        raise ValueError(
            f"{total} tokens: --context-parallel-size {world} must divide them; pad to {-(-total // world) * world}"
        )
    first, last = rank * total // world, (rank + 1) * total // world
    found = []
    for document, (end, length) in enumerate(zip(accumulate(lengths), lengths, strict=True)):
        start, stop = max(first, end - length), min(last, end)
        if start < stop:
            found.append(Segment(document, start - (end - length), stop - (end - length)))
    return found


def build_routes(
    lengths: Sequence[int], world: int, rank: int, layout: Layout = "zigzag", device: torch.device | None = None
) -> Routes:
    """The routes of one batch.

    Args:
        lengths: tokens of each document, all ranks together; empty documents are allowed.
        device: where the layers run; None is the CPU.

    Raises:
        ValueError: see `segments_of`.
    """
    return _build(tuple(lengths), world, rank, layout, device or torch.device("cpu"))


@lru_cache(maxsize=64)  # every layer of every microbatch of an unpacked batch asks for the same one
def _build(lengths: tuple[int, ...], world: int, rank: int, layout: Layout, device: torch.device) -> Routes:
    every = [segments_of(lengths, world, r, layout) for r in range(world)]
    mine = every[rank]
    tokens = [_per_token(segments) for segments in every]
    local_tails = [_tail_tokens(segments, layout) for segments in every]
    if layout == "zigzag":
        owner = (*range(world), *reversed(range(world)))
        # Positions in chain order: part r comes before part 2·W−1−r.
        summarised = [list(range(0, len(mine), 2)), list(range(1, len(mine), 2))]
        carries = [[1.0] * len(lengths)] * 2
        incoming = [slot * len(lengths) + d for d in range(len(lengths)) for slot in range(2)]
    else:
        owner = tuple(range(world))
        summarised = [[len(mine) - 1]]
        carries = [[float(bool(mine) and mine[-1].start > 0)]]
        incoming = [0 if i == 0 and segment.start > 0 else 1 for i, segment in enumerate(mine)]

    documents, positions = (torch.stack(column) for column in zip(*tokens, strict=True))
    order = torch.argsort(documents.flatten() * (max(lengths) + 1) + positions.flatten())

    def tensor(values: object, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    return Routes(
        world=world,
        rank=rank,
        owner=owner,
        cu_segments=tensor([0, *accumulate(segment.tokens for segment in mine)], torch.int32),
        summarised=tensor(summarised),
        carries=tensor(carries, torch.float32),
        incoming=tensor(incoming),
        tails=tensor(local_tails[rank]),
        halo=tensor(_halo(every, local_tails, rank)).view(len(mine), HALO),
        documents=documents.to(device),
        positions=positions.to(device),
        order=order.to(device),
        cu_documents=tensor([0, *accumulate(lengths)], torch.int32),
    )


def _tail_tokens(segments: Sequence[Segment], layout: Layout) -> list[int]:
    """Local tokens to publish: the last three of each segment (zigzag) or of the rank; too few are repeated."""
    ends = list(accumulate(segment.tokens for segment in segments))
    total = ends[-1] if ends else 0
    if layout == "contiguous":
        ranges = [(0, total)]
    else:
        ranges = [(end - segment.tokens, end) for end, segment in zip(ends, segments, strict=True)]
    last = max(total - 1, 0)
    return [min(max(end - back, start), last) for start, end in ranges for back in range(HALO, 0, -1)]


def _halo(every: Sequence[Sequence[Segment]], tails: Sequence[Sequence[int]], rank: int) -> list[int]:
    """For each segment of `rank`, its three preceding tokens as indices into the gathered tails, oldest first."""
    width = len(tails[0])
    published: dict[tuple[int, int], int] = {}
    for r, segments in enumerate(every):
        ends = list(accumulate(segment.tokens for segment in segments))
        for i, token in enumerate(tails[r]):
            which = bisect_right(ends, token)
            if which < len(segments):
                segment = segments[which]
                published[segment.document, segment.stop - (ends[which] - token)] = r * width + i
    nothing = len(every) * width
    return [
        published[segment.document, segment.start - back] if segment.start >= back and segment.tokens else nothing
        for segment in every[rank]
        for back in range(HALO, 0, -1)
    ]


def _per_token(segments: Sequence[Segment]) -> tuple[torch.Tensor, torch.Tensor]:
    """Document and position in it of each local token."""
    documents = torch.repeat_interleave(
        torch.tensor([segment.document for segment in segments]), torch.tensor([s.tokens for s in segments])
    )
    return documents, torch.cat([torch.arange(segment.start, segment.stop) for segment in segments])
