"""Gated DeltaNet over a context-parallel group: states are passed, tokens stay where they are.

The chunked recurrence is affine in the state that comes in: S_out = M·S_in + S. Each rank reduces its part of a
document to that pair per head, the pairs are composed along the chain of parts, and each rank then runs once from its
true initial state. Everything is differentiable, so the backward pass is exact as well: gradients of states run the
chain the other way.

Letters: W context-parallel size, P chain positions, N documents, H heads, K key dim, V value dim, D conv channels.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, Literal

import torch
import torch.distributed as dist

from megatron_hybrid.kernels import reference
from megatron_hybrid.parallel.exchange_choice import scan_is_faster
from megatron_hybrid.parallel.routes import HALO, Routes

Exchange = Literal["auto", "all_gather", "scan"]
Pair = tuple[torch.Tensor, torch.Tensor]


class _Gather(torch.autograd.Function):
    """[...] on every rank to [W, ...]; backward sums each rank's part over the ranks."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        out = x.new_empty(group.size() * x.shape[0], *x.shape[1:])
        dist.all_gather_into_tensor(out, x.contiguous(), group=group)
        return out.unflatten(0, (group.size(), -1))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        out = grad.new_empty(grad.shape[1:])
        dist.reduce_scatter_tensor(out, grad.flatten(0, 1).contiguous(), group=ctx.group)
        return out, None


def all_gather(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Every rank's x, [W, *x.shape], differentiable."""
    return _Gather.apply(x, group)


def conv_halo(x_TD: torch.Tensor, routes: Routes, group: dist.ProcessGroup) -> torch.Tensor:
    """The three convolution inputs before each local segment, [S, D, 3], zeros at document starts.

    x_TD: this rank's inputs of the convolution.
    """
    published = all_gather(x_TD[routes.tails], group).flatten(0, 1)  # [W·n, D]
    with_nothing = torch.cat([published, published.new_zeros(1, published.shape[1])])
    return with_nothing[routes.halo.flatten()].view(-1, HALO, x_TD.shape[1]).transpose(1, 2)


def incoming_states(
    M: torch.Tensor, S: torch.Tensor, routes: Routes, group: dist.ProcessGroup, exchange: Exchange = "auto"
) -> torch.Tensor:
    """The state that reaches each local segment, [segments, H, K, V] fp32.

    Args:
        M, S: [slots·N, H, K, K] and [slots·N, H, K, V] fp32, the pairs of this rank's chain positions, in the order
            of `routes.summarised`.
        exchange: how the pairs travel; `auto` chooses by `choose_exchange`.
    """
    slots, documents = routes.summarised.shape
    M = M.unflatten(0, (slots, documents)) * routes.carries[..., None, None, None]
    S = S.unflatten(0, (slots, documents))
    if exchange == "auto":
        exchange = choose_exchange(routes, pair_bytes=(M[0].numel() + S[0].numel()) * M.element_size())
    pass_on = _by_all_gather if exchange == "all_gather" else _by_scan
    states = pass_on(M, S, routes, group).flatten(0, 1)  # [slots·N, H, K, V]
    with_none = torch.cat([states, states.new_zeros(1, *states.shape[1:])])
    return with_none[routes.incoming]


def passing(routes: Routes, group: dist.ProcessGroup, exchange: Exchange = "auto") -> reference.PassStates:
    """How a mixer shares its documents' states with the other ranks of `group`.

    On a GPU the pairs travel and are composed on a stream of their own, beside what the caller launches until it waits.
    """

    def start(M: torch.Tensor, S: torch.Tensor) -> Callable[[], torch.Tensor]:
        chosen = routes.summarised.flatten()
        if not M.is_cuda:
            states = incoming_states(M[chosen], S[chosen], routes, group, exchange)
            return lambda: states
        here, beside = torch.cuda.current_stream(M.device), _side_stream(M.device)
        beside.wait_stream(here)
        with torch.cuda.stream(beside):
            states = incoming_states(M[chosen], S[chosen], routes, group, exchange)

        def wait() -> torch.Tensor:
            here.wait_stream(beside)
            return states

        return wait

    return start


def observed(
    pass_states: reference.PassStates, routes: Routes, observe: Callable[[torch.Tensor], None]
) -> reference.PassStates:
    """`pass_states`; the rank with a document's end gives `observe` the states there, [N, H, K, V]. Zigzag only."""

    def start(M: torch.Tensor, S: torch.Tensor) -> Callable[[], torch.Tensor]:
        wait = pass_states(M, S)

        def waited() -> torch.Tensor:
            incoming = wait()
            if routes.rank == routes.owner[-1]:
                last = routes.summarised[-1]
                with torch.no_grad():
                    observe(M[last] @ incoming[last] + S[last])
            return incoming

        return waited

    return start


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def choose_exchange(routes: Routes, pair_bytes: int) -> Exchange:
    """`all_gather` or `scan`, whichever `exchange_choice` says is faster."""
    return "scan" if scan_is_faster(routes.world, routes.slots, pair_bytes) else "all_gather"


def _by_all_gather(M: torch.Tensor, S: torch.Tensor, routes: Routes, group: dist.ProcessGroup) -> torch.Tensor:
    """Everybody gets every pair and runs along the whole chain. [slots, N, H, K, V] states before each position."""
    key_dim = M.shape[-2]
    pairs = all_gather(torch.cat([M, S], dim=-1), group)  # [W, slots, N, H, K, K+V]
    # The empty slice ties the first position to the pairs: its rank too must join their backward collective.
    state = torch.cat([torch.zeros_like(S[0]), pairs[0, 0, ..., :0]], dim=-1)
    before = []
    for position, rank in enumerate(routes.owner):
        if rank == routes.rank:
            before.append(state)
        pair = pairs[rank, _slot(routes, position)]
        state = pair[..., :key_dim] @ state + pair[..., key_dim:]
    return torch.stack(before)


def _slot(routes: Routes, position: int) -> int:
    """Which of its owner's chain positions `position` is."""
    return routes.owner[:position].count(routes.owner[position])


class _Hop(torch.autograd.Function):
    """Pairs move `distance` positions up the chain; backward moves their gradients down again.

    held: [slots, ...], this rank's positions. Returns [slots, ...], what each of them received; zeros for the first
    `distance` positions, which receive nothing.
    """

    @staticmethod
    def forward(ctx: Any, held: torch.Tensor, routes: Routes, distance: int, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.route = (routes, distance, group)
        return _shift(held, routes, distance, group)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        routes, distance, group = ctx.route
        return _shift(grad, routes, -distance, group), None, None, None


def _shift(held: torch.Tensor, routes: Routes, distance: int, group: dist.ProcessGroup) -> torch.Tensor:
    held = held.contiguous()
    received = torch.zeros_like(held)
    operations = []
    # Every rank lists the messages in the same order, so that two between one pair of ranks cannot be mixed up.
    for source, source_rank in enumerate(routes.owner):
        target = source + distance
        if not 0 <= target < len(routes.owner):
            continue
        target_rank = routes.owner[target]
        if source_rank == routes.rank == target_rank:
            received[_slot(routes, target)] = held[_slot(routes, source)]
        elif source_rank == routes.rank:
            peer = dist.get_global_rank(group, target_rank)
            operations.append(dist.P2POp(dist.isend, held[_slot(routes, source)], peer, group, tag=target))
        elif target_rank == routes.rank:
            peer = dist.get_global_rank(group, source_rank)
            operations.append(dist.P2POp(dist.irecv, received[_slot(routes, target)], peer, group, tag=target))
    for request in dist.batch_isend_irecv(operations) if operations else []:
        request.wait()
    return received


def _by_scan(M: torch.Tensor, S: torch.Tensor, routes: Routes, group: dist.ProcessGroup) -> torch.Tensor:
    """Hillis-Steele scan over the chain: ⌈log2 P⌉ rounds, each position composing with the one 1, 2, 4, … before.

    A position that receives nothing composes with the identity.
    """
    key_dim = M.shape[-2]
    positions = [p for p, rank in enumerate(routes.owner) if rank == routes.rank]
    identity = torch.eye(key_dim, dtype=M.dtype, device=M.device).expand_as(M[0])

    def earlier(pair: Pair, distance: int) -> Pair:
        moved = _Hop.apply(torch.cat(pair, dim=-1), routes, distance, group)
        maps = [moved[i, ..., :key_dim] if p >= distance else identity for i, p in enumerate(positions)]
        return torch.stack(maps), moved[..., key_dim:]

    inclusive: Pair = (M, S)
    distance = 1
    while distance < len(routes.owner):
        inclusive = reference.compose(earlier(inclusive, distance), inclusive)
        distance *= 2
    return earlier(inclusive, 1)[1]  # the state after everything before a position
