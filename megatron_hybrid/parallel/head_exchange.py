"""Context parallelism by all-to-all: each rank gets the whole sequence of its share of the heads, and gives it back.

Megatron's own way for Gated DeltaNet, here for comparison with state passing. It moves every activation of the mixer
and needs (heads / TP) % CP = 0.

Letters: W context-parallel size, T tokens over all ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from megatron_hybrid.parallel.routes import Routes


class _AllToAll(torch.autograd.Function):
    """x[w] goes to rank w, out[w] came from rank w; its own transpose, so backward does the same."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        dist.all_to_all_single(out, x.contiguous(), group=group)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _AllToAll.apply(grad, ctx.group), None


def check_heads(heads: int, group: dist.ProcessGroup) -> None:
    """Refuse heads of this tensor-parallel rank that the ranks of `group` cannot share equally.

    Raises:
        ValueError: naming the sizes and the flag to change.
    """
    if heads % group.size():
        legal = [n for n in range(1, heads + 1) if heads % n == 0]
        raise ValueError(
            f"--gdn-cp-comm-type a2a: --context-parallel-size {group.size()} does not divide the {heads} "
            f"Gated DeltaNet heads of a tensor-parallel rank; legal: {', '.join(map(str, legal))}; "
            "or leave the flag out: passing states has no such condition"
        )


def share(x: torch.Tensor, sections: Sequence[int], group: dist.ProcessGroup) -> torch.Tensor:
    """This rank's part of a per-head tensor: of dim 0, in each of its sections."""
    parts = [part.chunk(group.size())[group.rank()] for part in x.split(list(sections))]
    return torch.cat(parts)


def to_heads(x: torch.Tensor, sections: Sequence[int], routes: Routes, group: dist.ProcessGroup) -> torch.Tensor:
    """[T/W, n] of all heads to [T, n/W] of this rank's heads, tokens in the order of the documents.

    sections: sizes that n is made of, each with its heads in order.
    """
    by_rank = [part.unflatten(-1, (group.size(), -1)).transpose(0, 1) for part in x.split(list(sections), dim=-1)]
    return _AllToAll.apply(torch.cat(by_rank, dim=-1), group).flatten(0, 1)[routes.order]


def to_tokens(y: torch.Tensor, routes: Routes, group: dist.ProcessGroup) -> torch.Tensor:
    """[T, m/W] of this rank's heads to [T/W, m] of all heads: the inverse of `to_heads` for one section."""
    in_rank_order = torch.empty_like(y).index_copy(0, routes.order, y)
    received = _AllToAll.apply(in_rank_order.unflatten(0, (group.size(), -1)), group)  # [W, T/W, m/W]
    return received.transpose(0, 1).flatten(1)
