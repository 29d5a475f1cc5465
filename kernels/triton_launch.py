"""Launches of the Triton kernels without autograd. Letters as in triton_tiles.py.

What a launch fills is made beforehand, but for a summary; those of the forward take a piece of the chunks.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from megatron_hybrid.kernels.triton_backward import (
    adjoint_scan_kernel,
    inverse_gradient_kernel,
    key_gradient_kernel,
    norm_backward_kernel,
    query_gradient_kernel,
)
from megatron_hybrid.kernels.triton_conv import conv_backward_kernel, conv_kernel
from megatron_hybrid.kernels.triton_forward import norm_kernel, scan_kernel
from megatron_hybrid.kernels.triton_prepare import diagonal_kernel, prepare_kernel
from megatron_hybrid.kernels.triton_problem import (
    Adjoint,
    Conv,
    Gates,
    InverseGradient,
    Piece,
    Prepared,
    Problem,
    QueryGradient,
    Scanned,
    Solved,
    strides,
)
from megatron_hybrid.kernels.triton_tiles import CHUNK, split_dim

#: Of the products that merge diagonal inverses, 16 into 32: a warp's own, nearly free.
DIAGONAL_PRECISION = "tf32x3"


class Preparation:
    """Chunk-local part of a pass, before its scan.

    Args:
        inputs: q, k [B, T, Hk, K] and v [B, T, H, V], or with a convolution x [B, T, D] first; any strides but the
            last.
        solved: of the forward, in a backward pass, which then makes only what it needs again.

    Attributes: v [B, T, H, V]; made; solved. `run` fills them.
    """

    def __init__(
        self, problem: Problem, inputs: tuple[Tensor, Tensor, Tensor], gates: Gates, conv: Conv | None,
        solved: Solved | None = None,
    ) -> None:  # fmt: skip
        B, T, Hk, H, K, V, options, layout, *_ = problem
        NC, new = layout.num_chunks, inputs[0].new_empty
        self.problem, self.gates, self.conv, self.x = problem, gates, conv, inputs[0]
        self.is_first, self.is_normalising = solved is None, conv is None and options.qk_l2norm
        if conv is None:
            self.q, self.k, self.v = inputs
        else:
            self.q, self.k, self.v = new(B, T, Hk, K), new(B, T, Hk, K), new(B, T, H, V)
        if conv is None and not self.is_normalising:
            self.q, self.k = self.q.contiguous(), self.k.contiguous()
        self.is_scaling = not self.is_first or options.keep_intermediates
        rstd_q, rstd_k = new(2, NC, Hk, CHUNK, dtype=torch.float32)
        self.made = Prepared(
            new(B, T, Hk, K) if self.is_normalising else self.q,
            new(B, T, Hk, K) if self.is_normalising else self.k,
            new(B, T, H, K) if self.is_scaling else self.q,
            rstd_q,
            rstd_k,
            new(NC, H, CHUNK, CHUNK),
        )
        self.diagonal = self.x
        if solved is None:
            solved = Solved(
                new(NC, H, CHUNK, dtype=torch.float32),
                new(NC, H, 2, CHUNK, 2, dtype=torch.float32),
                new(NC, H, CHUNK, CHUNK),
            )
            merged_in = torch.float32 if self.x.dtype == torch.float32 else torch.float16  # fp32: the interpreter's
            self.diagonal = new(NC, H, 2, 32, 32, dtype=merged_in)
        self.solved = solved

    def run(self, piece: Piece, *, with_scores: bool = True) -> None:
        """with_scores false leaves P to `score`: what is before it then needs no q."""
        if self.conv is not None:
            self._convolve(self.conv, piece)
        if self.is_first:
            launch = self.problem.launch("diagonal")
            diagonal_kernel[(piece.length * self.problem.H * 2,)](
                self.k, *self.gates, self.diagonal, **self._arguments(piece), PRECISION=DIAGONAL_PRECISION,
                **launch.options,
            )  # fmt: skip
        self._prepare(piece, SOLVE=self.is_first, SCORES=with_scores, SCALED=self.is_scaling)

    def score(self) -> None:
        """Fills made.P, which needs no state: it can run while states are on their way. Not while normalising."""
        self._prepare(self.problem.whole, SOLVE=False, SCORES=True, SCALED=False)

    def _convolve(self, conv: Conv, piece: Piece) -> None:
        problem, x = self.problem, self.x
        launch = problem.launch("conv")
        of_head, tokens = triton.next_power_of_2(problem.K), launch.block
        of_block = max(of_head, 64)
        blocks = 2 * problem.Hk + triton.cdiv(problem.H * problem.V, of_block)
        conv_kernel[(piece.length * (CHUNK // tokens) * blocks,)](
            x, conv.weight, x if conv.halo is None else conv.halo, self.q, self.k, self.v,
            self.made.rstd_q, self.made.rstd_k, **problem.tables, T=problem.T, chunk0=piece.first,
            eps=problem.options.l2norm_eps, **strides(x=x), Hk=problem.Hk, H=problem.H, K=problem.K, V=problem.V,
            BK=of_head, BD=of_block, R=tokens, C=CHUNK, HALO=conv.halo is not None, PACKED=problem.layout.is_packed,
            **launch.options,
        )  # fmt: skip

    def _prepare(self, piece: Piece, **wanted: bool) -> None:
        problem, made = self.problem, self.made
        launch = problem.launch("prepare_normalising" if self.is_normalising else "prepare")
        prepare_kernel[(piece.length * problem.H,)](
            self.q, self.k, *self.gates, self.diagonal, *made[:5], *self.solved, made.P,
            **self._arguments(piece), **strides(q=self.q), scale=problem.options.scale, **wanted, **launch.options,
        )  # fmt: skip

    def _arguments(self, piece: Piece) -> dict[str, object]:
        """What both kernels of a chunk's inverse take; neither sees values."""
        problem, gates = self.problem, self.gates
        sizes = {name: size for name, size in problem.sizes.items() if name != "V"}
        return {
            **problem.tables, **strides(k=self.k, a=gates.a, b=gates.b), **sizes, "T": problem.T,
            "chunk0": piece.first, "eps": problem.options.l2norm_eps, "L2NORM": self.is_normalising,
            "BETA_MAX": problem.options.beta_max,
        }  # fmt: skip


def summary(problem: Problem, made: Prepared, solved: Solved, v: Tensor) -> tuple[Tensor, Tensor]:
    """M [N, H, K, K] and S [N, H, K, V] fp32: each document makes S_out = M S_in + S of the state before it."""
    _B, T, _Hk, H, K, V, _, layout, *_ = problem
    results = []
    for columns, is_map in ((K, True), (V, False)):
        launch = problem.launch("scan")
        final = torch.empty(layout.N, H, K, columns, dtype=torch.float32, device=made.k.device)
        k, nothing = made.k, final
        scan_kernel[(layout.N * H * triton.cdiv(columns, launch.block),)](
            k, k, v, solved.Tb, solved.Tb, solved.factors, nothing, k, k, k, nothing, final,
            layout.bounds, layout.chunk_start, layout.chunk_doc, layout.chunk_start, T, 0, layout.num_chunks,
            **strides(v=v), **(problem.sizes | {"V": columns}), BV=launch.block, SEGMENT=0, EVERY=0, INITIAL=False,
            FINAL=True, OUT=False, STATES=False, VALUES=False, MAP=is_map, **launch.options,
        )  # fmt: skip
        results.append(final)
    return results[0], results[1]


def unnormed(x: Tensor) -> Tensor:
    """The memory of x [B, T, H, V] for the output before its norm, until the norm's result takes its place.

    fp16 where x is bf16: eight times finer, since bf16's rounding alone takes y past its bound. fp16 ends at 65,504:
    o = scale S^T q stays below 2 K^-1/2 times the sum of |v| over the tokens a state remembers, and what is beyond
    becomes inf and so NaN in its row of y: a loss that stops the run, where a bound would be silently wrong. Below 6e-5
    it is good to 3e-8, nothing beside sqrt(norm_eps).
    """
    return x.view(torch.float16) if x.dtype == torch.bfloat16 else x


def new_states(problem: Problem, like: Tensor, kept: Tensor | None, *, want_final: bool, is_again: bool) -> Scanned:
    """For `scan` to fill. The first time states are kept as the options say; is_again, in a backward pass, h and u are
    wanted instead, and the first time with keep_intermediates. kept: what the first time kept."""
    B, T, _Hk, H, K, V, options, layout, segments, *_ = problem
    every, whole = options.states_every, is_again or options.keep_intermediates
    u = like.new_empty(B * T, H, V) if whole else None
    h = kept if every == 1 else None
    if h is None and (whole or every == 1):
        h = like.new_empty(layout.num_chunks, H, V, K)
    final = like.new_empty(layout.N, H, K, V, dtype=torch.float32) if want_final else None
    if not is_again and segments is not None:
        # fp32: from rounded states the second run would give other bits than the first.
        kept = h if every == 1 else like.new_empty(segments.num_chunks, H, V, K, dtype=torch.float32)
    return Scanned(h, u, kept, final)


def scan(
    problem: Problem, made: Prepared, solved: Solved, v: Tensor, out: Scanned, piece: Piece, *,
    initial: Tensor | None = None, o: Tensor | None = None, is_again: bool = False,
) -> None:  # fmt: skip
    """The recurrence through a piece: document by document, or is_again from states that were kept, all at once.

    initial [N, H, K, V] fp32, the state before the piece; out.final the one after it. o [B, T, H, V] of any dtype is
    written when given.
    """
    _B, T, _Hk, H, _K, V, options, layout, segments, *_ = problem
    every, k = options.states_every, made.k
    h, u, kept, final = out
    by_segment = is_again and segments is not None
    where = segments if segments is not None else layout
    programs = where.num_chunks if by_segment else layout.N
    launch = problem.launch("scan" if u is None else "scan_again")
    scan_kernel[(programs * H * triton.cdiv(V, launch.block),)](
        made.q, k, v, solved.Tb, made.P, solved.factors,
        *(k if x is None else x for x in (initial, o, h, u, kept, final)),
        layout.bounds, layout.chunk_start, where.chunk_doc, where.chunk_start, T, *piece, **strides(v=v),
        **problem.sizes, BV=launch.block, SEGMENT=every if by_segment else 0,
        EVERY=every if every > 1 and not is_again else 0,
        INITIAL=initial is not None, FINAL=final is not None, OUT=o is not None,
        STATES=h is not None and not (is_again and every == 1), VALUES=u is not None, MAP=False, **launch.options,
    )  # fmt: skip


def norm(problem: Problem, o: Tensor, z: Tensor | None, norm_weight: Tensor, y: Tensor, piece: Piece) -> None:
    """Fills y [B, T, H, V], which may be o's memory: o through the RMSNorm with weight [V], times silu(z) if any."""
    rows = y.numel() // y.shape[-1]
    first = 0
    if piece != problem.whole:
        tokens = piece.tokens
        first, rows = tokens.start * problem.H, min(rows, tokens.stop * problem.H)
    gate = y if z is None else z
    launch = problem.launch("norm")
    VA, VB = split_dim(problem.V)
    norm_kernel[(triton.cdiv(rows - first, launch.block),)](
        o, gate, norm_weight, y, problem.T, first, rows, problem.options.norm_eps, **strides(z=gate),
        H=problem.H, V=problem.V, VA=VA, VB=VB, R=launch.block, GATE=z is not None, **launch.options,
    )  # fmt: skip


def norm_backward(
    problem: Problem, o: Tensor, z: Tensor | None, norm_weight: Tensor, dy: Tensor, do: Tensor, dz: Tensor | None,
    dw: Tensor,
) -> None:  # fmt: skip
    """Fills do [B, T, H, V], which may be o's memory, dz (any strides), and the gradient of norm_weight chunk by chunk,
    dw [NC, H, V] fp32."""
    VA, VB = split_dim(problem.V)
    gate, dgate = (do, do) if z is None or dz is None else (z, dz)
    launch = problem.launch("norm_backward")
    norm_backward_kernel[(problem.layout.num_chunks * problem.H,)](
        o, gate, dy, norm_weight, do, dgate, dw, **problem.tables, T=problem.T,
        eps=problem.options.norm_eps, **strides(z=gate, dy=dy, dz=dgate), H=problem.H, V=problem.V, VA=VA, VB=VB,
        C=CHUNK, R=launch.block, GATE=z is not None, PACKED=problem.layout.is_packed, **launch.options,
    )  # fmt: skip


def new_adjoint(problem: Problem, made: Prepared, want_dinitial: bool, store: bool = True) -> Adjoint:
    """For `adjoint_scan` to fill. store false: dinitial alone; ds and dr are empty."""
    B, T, _Hk, H, K, V, _options, layout, *_ = problem
    return Adjoint(
        made.k.new_empty(layout.num_chunks if store else 0, H, V, K),
        made.k.new_empty(B, T if store else 0, H, V),
        made.k.new_empty(layout.N, H, K, V, dtype=torch.float32) if want_dinitial else None,
    )


def adjoint_scan(
    problem: Problem, made: Prepared, solved: Solved, do: Tensor, dfinal: Tensor | None, out: Adjoint
) -> None:
    """Fills `out` with the gradients of the states, last chunk first. do [B, T, H, V] of any strides but the last."""
    ds, dr, dinitial = out
    launch = problem.launch("adjoint_scan")
    layout = problem.layout
    adjoint_scan_kernel[(layout.N * problem.H * triton.cdiv(problem.V, launch.block),)](
        made.scaled_q, made.k, solved.Tb, made.P, solved.factors, do, ds if dfinal is None else dfinal, ds, dr,
        ds if dinitial is None else dinitial, layout.bounds, layout.chunk_start, problem.T, **strides(do=do),
        **problem.sizes, BV=launch.block, DFINAL=dfinal is not None, DINITIAL=dinitial is not None,
        STORE=ds.numel() > 0, **launch.options,
    )  # fmt: skip


def query_gradient(
    problem: Problem, made: Prepared, solved: Solved, states: Scanned, do: Tensor, out: QueryGradient
) -> None:
    """What needs all V columns of a chunk but nothing of the adjoint scan."""
    launch = problem.launch("query_gradient")
    query_gradient_kernel[(problem.layout.num_chunks * problem.H,)](
        made.q, made.k, made.P, out.dP, solved.G, states.u, states.h, do, made.rstd_q, out.dq, out.dG,
        **problem.tables, T=problem.T, scale=problem.options.scale, **strides(do=do),
        **problem.sizes, BV=launch.block, L2NORM=problem.options.qk_l2norm, **launch.options,
    )  # fmt: skip


def inverse_gradient(
    problem: Problem, made: Prepared, solved: Solved, states: Scanned, dr: Tensor, out: InverseGradient, db: Tensor,
) -> None:  # fmt: skip
    """Fills `out` and db [B, T, H]."""
    launch = problem.launch("inverse_gradient")
    inverse_gradient_kernel[(problem.layout.num_chunks * problem.H,)](
        made.k, solved.G, solved.factors, states.u, dr, out.D, db, out.dG, **problem.tables, T=problem.T,
        **strides(db=db), **problem.sizes, BV=launch.block, BETA_MAX=problem.options.beta_max,
        **launch.options,
    )  # fmt: skip


def key_gradient(
    problem: Problem, made: Prepared, solved: Solved, states: Scanned, query: QueryGradient, inverse: InverseGradient,
    adjoint: Adjoint, gates: Gates, dk: Tensor, da: Tensor, partial: Tensor,
) -> None:  # fmt: skip
    """Fills dk [B, T, H, K], da [B, T, H] and the gradients of A_log and dt_bias, chunk by chunk: partial [2, H, NC]
    fp32."""
    launch = problem.launch("key_gradient")
    key_gradient_kernel[(problem.layout.num_chunks * problem.H,)](
        made.q, made.k, query.dP, inverse.D, solved.G, query.dG, inverse.dG, states.u, states.h, adjoint.ds,
        adjoint.dr, gates.a, gates.A_log, gates.dt_bias, made.rstd_k, dk, da, *partial,
        **problem.tables, T=problem.T, num_chunks=problem.layout.num_chunks,
        **strides(a=gates.a, da=da), **problem.sizes, BV=launch.block, L2NORM=problem.options.qk_l2norm,
        **launch.options,
    )  # fmt: skip


def conv_backward(
    problem: Problem, x: Tensor, conv: Conv, inputs: tuple[Tensor, Tensor, Tensor], dx: Tensor, dw: Tensor,
    dhalo: Tensor | None,
) -> None:  # fmt: skip
    """Fills dx [B, T, D], dhalo [N, D, 3] fp32, and the gradient of the weight, chunk by chunk: dw [NC, D, 4] fp32.

    inputs: gradients of q, k, v.
    """
    launch = problem.launch("conv_backward")
    DQ, DV, BD = problem.Hk * problem.K, problem.H * problem.V, launch.block
    blocks = 2 * triton.cdiv(DQ, BD) + triton.cdiv(DV, BD)
    conv_backward_kernel[(problem.layout.num_chunks * blocks,)](
        x, conv.weight, x if conv.halo is None else conv.halo, *inputs, dx, dw, dw if dhalo is None else dhalo,
        **problem.tables, T=problem.T, **strides(x=x, dx=dx), DQ=DQ, DV=DV, BD=BD, C=CHUNK,
        HALO=conv.halo is not None, PACKED=problem.layout.is_packed, **launch.options,
    )  # fmt: skip
