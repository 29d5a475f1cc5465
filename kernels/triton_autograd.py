"""Autograd of the Triton path: the delta rule by itself, the whole mixer core, the summary of a stretch of tokens.

Letters as in triton_tiles.py. What is kept for the backward is little: the inputs, five fp32 numbers of each token
and head (`Solved`) and Tb. q, k, v, scores and states are computed again, the states from every n-th one when those are
kept. With Options.keep_intermediates nothing is computed again: all that the backward reads is kept, which v is not
part of.
Nothing that is kept is written to, and what is kept is saved as autograd saves: a graph may be run backward twice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_hybrid.kernels import triton_launch as launch
from megatron_hybrid.kernels.reference import PassStates
from megatron_hybrid.kernels.streams import beside
from megatron_hybrid.kernels.triton_launch import Preparation
from megatron_hybrid.kernels.triton_passes import run_gradients, run_scan
from megatron_hybrid.kernels.triton_problem import (
    Conv,
    Gates,
    Options,
    Piece,
    Prepared,
    Problem,
    Scanned,
    Solved,
    make_problem,
)


def with_unit_stride(x: Tensor) -> Tensor:
    """The kernels read any layout whose last dimension is dense."""
    return x if x.stride(-1) == 1 else x.contiguous()


class DeltaRule(torch.autograd.Function):
    """o and the final state from q, k, v, raw gates and an initial state."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, A_log: Tensor, dt_bias: Tensor,
        initial: Tensor | None, options: Options, cu_seqlens: Tensor | None, want_final: bool,
    ) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
        problem = make_problem(q, v, options, cu_seqlens)
        gates = Gates(a, b, A_log, dt_bias)
        preparation = Preparation(problem, (q, k, v), gates, None)
        o = torch.empty_like(v, memory_format=torch.contiguous_format)
        states = run_scan(problem, preparation, initial=initial, o=o, want_final=want_final)
        keep = options.keep_intermediates
        kept = (*preparation.made, states.h, states.u) if keep else (q, k, v, states.kept, initial)
        ctx.save_for_backward(*gates, *preparation.solved, *kept)
        ctx.problem = problem
        ctx.set_materialize_grads(False)
        return o, states.final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor | None, dfinal: Tensor | None) -> tuple[Tensor | None, ...]:
        a, b, A_log, dt_bias, G, factors, Tb, *rest = ctx.saved_tensors
        problem: Problem = ctx.problem
        gates, solved = Gates(a, b, A_log, dt_bias), Solved(G, factors, Tb)
        if problem.options.keep_intermediates:
            *parts, h, u = rest
            made, states = Prepared(*parts), Scanned(h, u)
        else:
            q, k, v, kept, initial = rest
            again = Preparation(problem, (q, k, v), gates, None, solved)
            made, states = again.made, run_scan(problem, again, initial=initial, kept=kept, o=None)
        shape = (problem.B, problem.T, problem.H, problem.V)
        do = made.k.new_zeros(shape) if do is None else with_unit_stride(do)
        dfinal = None if dfinal is None else dfinal.contiguous()
        da, db = torch.empty(2, *a.shape, dtype=a.dtype, device=a.device)
        with beside(do) as second:
            g = run_gradients(
                problem, made, solved, states, do, dfinal, gates, da, db, second,
                want_dinitial=ctx.needs_input_grad[7],
            )  # fmt: skip
        return (
            g.dq, g.dk, g.dv, da, db, g.dA_log.to(A_log.dtype), g.ddt_bias.to(dt_bias.dtype), g.dinitial,
            None, None, None,
        )  # fmt: skip


class MixerCore(torch.autograd.Function):
    """y [B, T, H, V] and the final state from the projections: qkvz [B, T, 2 Hk K + H V (+ H V)] and ab [B, T, 2 H].

    Each projection has one gradient tensor: slices given to autograd one by one would be padded and added instead.

    With pass_states each document is a stretch of one that other ranks share. Forward: the stretches' summaries go out,
    scores are computed meanwhile, and the scan starts from what came in. Backward: a stretch's own gradient of its
    incoming state goes out, what later stretches send back comes in as the gradient of its final state. Neither needs
    a gradient through the summaries: seen as a whole it is one recurrence, run once in each direction.
    """

    @staticmethod
    def forward(
        ctx: Any, qkvz: Tensor, ab: Tensor, conv_weight: Tensor, A_log: Tensor, dt_bias: Tensor, norm_weight: Tensor,
        halo: Tensor | None, initial: Tensor | None, heads: tuple[int, int, int, int], options: Options,
        cu_seqlens: Tensor | None, want_final: bool, pass_states: PassStates | None,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        q, _, v, z = split_projection(qkvz, heads)
        problem = make_problem(q, v, options, cu_seqlens)
        a, b = ab.chunk(2, dim=-1)
        gates, conv = Gates(a, b, A_log, dt_bias), Conv(conv_weight, halo)
        x = qkvz[..., : conv_weight.shape[0]]
        preparation = Preparation(problem, (x, x, x), gates, conv)
        made, solved, v = preparation.made, preparation.solved, preparation.v
        y = torch.empty_like(v)
        o = launch.unnormed(torch.empty_like(v) if options.keep_intermediates else y)

        def finish(piece: Piece) -> None:
            launch.norm(problem, o, z, norm_weight, y, piece)

        incoming, S = None, None
        if pass_states is None:
            states = run_scan(problem, preparation, initial=initial, o=o, want_final=want_final, finish=finish)
        else:
            preparation.run(problem.whole, with_scores=False)
            M, S = launch.summary(problem, made, solved, v)
            with torch.enable_grad():
                wait = pass_states(M, S.requires_grad_())
            preparation.score()  # meanwhile
            with torch.enable_grad():
                incoming = wait()
            initial = incoming.detach().contiguous()
            states = launch.new_states(problem, made.k, None, want_final=False, is_again=False)
            launch.scan(problem, made, solved, v, states, problem.whole, initial=initial, o=o)
            finish(problem.whole)
        kept = (*made, states.h, states.u, o) if options.keep_intermediates else (states.kept, initial)
        # incoming brings the graph it came through, which so lives as long as the rest of what is saved.
        ctx.save_for_backward(qkvz, ab, conv_weight, A_log, dt_bias, norm_weight, halo, incoming, S, *solved, *kept)
        ctx.problem, ctx.heads = problem, heads
        ctx.set_materialize_grads(False)
        return y, states.final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dfinal: Tensor | None) -> tuple[Tensor | None, ...]:
        qkvz, ab, conv_weight, A_log, dt_bias, norm_weight, halo, incoming, S, G, factors, Tb, *rest = ctx.saved_tensors
        problem: Problem = ctx.problem
        z = split_projection(qkvz, ctx.heads)[3]
        x = qkvz[..., : conv_weight.shape[0]]
        a, b = ab.chunk(2, dim=-1)
        gates, solved, conv = Gates(a, b, A_log, dt_bias), Solved(G, factors, Tb), Conv(conv_weight, halo)
        do = qkvz.new_empty(problem.B, problem.T, problem.H, problem.V)
        if problem.options.keep_intermediates:
            *parts, h, u, o = rest
            made, states = Prepared(*parts), Scanned(h, u)
        else:
            kept, initial = rest
            o = launch.unnormed(do)
            again = Preparation(problem, (x, x, x), gates, conv, solved)
            made, states = again.made, run_scan(problem, again, initial=initial, kept=kept, o=o)
        dqkvz = torch.empty(qkvz.shape, dtype=qkvz.dtype, device=qkvz.device)
        dab = torch.empty(ab.shape, dtype=ab.dtype, device=ab.device)
        dz = split_projection(dqkvz, ctx.heads)[3]
        dy = torch.zeros_like(do) if dy is None else with_unit_stride(dy)
        dfinal = None if dfinal is None else dfinal.contiguous()
        want_dinitial, fp32 = ctx.needs_input_grad[7], {"dtype": torch.float32, "device": x.device}
        # Of weights: chunk by chunk, and summed afterwards, in a fixed order.
        chunks, (D, taps) = problem.layout.num_chunks, conv_weight.shape
        by_chunk, dnorm = torch.empty(chunks, problem.H, problem.V, **fp32), torch.empty_like(norm_weight)
        dweight = torch.empty(chunks, D, taps, **fp32)
        # Zeros: a document without tokens sends its halo nothing.
        dhalo = None if halo is None else torch.zeros(halo.shape, **fp32)
        launch.norm_backward(problem, o, z, norm_weight, dy, do, dz, by_chunk)
        if incoming is not None:
            own = launch.new_adjoint(problem, made, want_dinitial=True, store=False)
            launch.adjoint_scan(problem, made, solved, do, None, own)
            # The chain is linear in S, and its transpose carries what each stretch sends back to the ones before it.
            (dfinal,) = torch.autograd.grad(incoming, S, own.dinitial, retain_graph=True)
        da, db = dab.chunk(2, dim=-1)
        with beside(do) as second:
            g = run_gradients(
                problem, made, solved, states, do, dfinal, gates, da, db, second, want_dinitial=want_dinitial,
                meanwhile=lambda: dnorm.copy_(by_chunk.sum((0, 1))),
            )  # fmt: skip
            launch.conv_backward(problem, x, conv, (g.dq, g.dk, g.dv), dqkvz[..., :D], dweight, dhalo)
        return (
            dqkvz, dab, dweight.sum(0).to(conv_weight.dtype), g.dA_log.to(A_log.dtype), g.ddt_bias.to(dt_bias.dtype),
            dnorm, None if halo is None or dhalo is None else dhalo.to(halo.dtype),
            g.dinitial, None, None, None, None, None,
        )  # fmt: skip


class Summary(torch.autograd.Function):
    """The state after a stretch of tokens as an affine function of the state before: [M | S] [N, H, K, K + V].

    M is what the same recurrence makes of the identity with no values. The backward carries it as K further columns
    of V.
    """

    @staticmethod
    def forward(
        ctx: Any, k: Tensor, v: Tensor, a: Tensor, b: Tensor, A_log: Tensor, dt_bias: Tensor, options: Options,
        cu_seqlens: Tensor | None,
    ) -> Tensor:  # fmt: skip
        problem = make_problem(k, v, options, cu_seqlens)
        gates = Gates(a, b, A_log, dt_bias)
        preparation = Preparation(problem, (k, k, v), gates, None)
        preparation.run(problem.whole, with_scores=False)
        ctx.save_for_backward(k, v, *gates, *preparation.solved)
        ctx.problem = problem
        return torch.cat(launch.summary(problem, preparation.made, preparation.solved, v), dim=-1)

    @staticmethod
    def widen(k: Tensor, v: Tensor, documents: int) -> tuple[Tensor, Tensor]:
        """v with K columns of zeros in front, and the initial state that is the identity there."""
        B, _, H, V = v.shape
        K = k.shape[3]
        identity = torch.eye(K, K + V, dtype=torch.float32, device=v.device)
        return torch.nn.functional.pad(v, (K, 0)), identity.expand(B * documents, H, K, K + V).contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dfinal: Tensor) -> tuple[Tensor | None, ...]:
        k, v, a, b, A_log, dt_bias, G, factors, Tb = ctx.saved_tensors
        narrow: Problem = ctx.problem
        problem = narrow._replace(V=narrow.K + narrow.V)  # launches stay: V is cut in blocks, K alone says what fits
        gates, solved = Gates(a, b, A_log, dt_bias), Solved(G, factors, Tb)
        widened, initial = Summary.widen(k, v, problem.layout.N // problem.B)
        again = Preparation(problem, (k, k, widened), gates, None, solved)
        states = run_scan(problem, again, initial=initial, o=None)
        do = torch.zeros_like(widened)
        da, db = torch.empty(2, *a.shape, dtype=a.dtype, device=a.device)
        with beside(do) as second:
            g = run_gradients(
                problem, again.made, solved, states, do, dfinal.contiguous(), gates, da, db, second,
                want_dinitial=False,
            )  # fmt: skip
        dA_log, ddt_bias = g.dA_log.to(A_log.dtype), g.ddt_bias.to(dt_bias.dtype)
        return g.dk, g.dv[..., problem.K :], da, db, dA_log, ddt_bias, None, None


def split_projection(qkvz: Tensor, heads: tuple[int, int, int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Views q, k [B, T, Hk, K], v and, when there is one, z [B, T, H, V]; heads is (Hk, H, K, V)."""
    Hk, H, K, V = heads
    parts = qkvz.split([Hk * K, Hk * K] + [H * V] * ((qkvz.shape[-1] - 2 * Hk * K) // (H * V)), dim=-1)
    q, k = (x.unflatten(2, (Hk, K)) for x in parts[:2])
    v, *z = (x.unflatten(2, (H, V)) for x in parts[2:])
    return q, k, v, z[0] if z else None
