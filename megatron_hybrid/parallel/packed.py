"""Packed documents: several in one row, none sees another; Megatron's THD parameters with the routes of the batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from megatron.core.packed_seq_params import PackedSeqParams

from megatron_hybrid.parallel.routes import Layout, Routes, build_routes


@dataclass
class PackedDocuments(PackedSeqParams):
    """Megatron's THD parameters, and who holds which token (None: one rank holds all). Build with `pack`."""

    routes: Routes | None = None

    def local_index(self) -> torch.Tensor:
        """Where in the whole packed row this rank's tokens stand, [T/W] int64: `tokens[:, index]` is its share."""
        if self.routes is None:
            return torch.arange(int(self.cu_seqlens_q[-1]), device=self.cu_seqlens_q.device)
        documents, positions = (x[self.routes.rank] for x in (self.routes.documents, self.routes.positions))
        return self.cu_seqlens_q[documents] + positions


def pack(
    lengths: Sequence[int],
    world: int = 1,
    rank: int = 0,
    layout: Layout = "zigzag",
    device: torch.device | None = None,
) -> PackedDocuments:
    """Describe one packed row of documents, on the host, once per batch.

    Args:
        lengths: tokens of each document, in order, over all context-parallel ranks; empty ones are allowed.
        world, rank: of the context-parallel group.

    Raises:
        ValueError: the layout cannot hold these documents; says what it could hold.
    """
    bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
    return PackedDocuments(
        qkv_format="thd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        max_seqlen_q=max(lengths),
        max_seqlen_kv=max(lengths),
        routes=build_routes(lengths, world, rank, layout, device) if world > 1 else None,
    )


def routes_of(
    tokens: int, rows: int, packed: PackedSeqParams | None, group: torch.distributed.ProcessGroup, device: torch.device
) -> Routes:
    """The routes of a layer's input.

    Args:
        tokens, rows: of this rank, the batch [tokens, rows] whole over tensor parallelism.
        packed: of a packed batch; without it every row is one document in Megatron's zigzag layout.

    Raises:
        ValueError: a packed batch without routes, or documents that are not the tokens of the batch.
    """
    if packed is None:
        return build_routes((tokens * group.size(),) * rows, group.size(), group.rank(), "zigzag", device)
    routes = getattr(packed, "routes", None)
    if routes is None:
        raise ValueError(
            "packed documents under context parallelism need their routes, built once per batch: "
            "make the packed_seq_params with megatron_hybrid.parallel.packed.pack"
        )
    described = routes.positions.shape[1]
    if described != tokens:
        raise ValueError(
            f"packed documents of {described * group.size()} tokens describe a sequence of {tokens * group.size()}: "
            "their lengths must add up to the sequence, padding included"
        )
    return routes
