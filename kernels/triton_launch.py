"""Launches of the Triton kernels on whole tensors, without autograd. Letters as in triton_tiles.py."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from megatron_hybrid.kernels.configs import Launch, launch_for
from megatron_hybrid.kernels.streams import beside
from megatron_hybrid.kernels.triton_backward import (
    adjoint_scan_kernel,
    inverse_gradient_kernel,
    key_gradient_kernel,
    norm_backward_kernel,
    query_gradient_kernel,
)
from megatron_hybrid.kernels.triton_conv import conv_backward_kernel
from megatron_hybrid.kernels.triton_forward import norm_kernel, scan_kernel
from megatron_hybrid.kernels.triton_prepare import conv_kernel, diagonal_kernel, prepare_kernel
from megatron_hybrid.kernels.triton_tiles import CHUNK, Layout, make_layout, split_dim

TAPS = 4  #: width of the short convolution inside the kernels; narrower ones are padded with zero taps
#: Of the products that merge diagonal inverses, 16 into 32: a warp's own, nearly free.
DIAGONAL_PRECISION = "tf32x3"


class Options(NamedTuple):
    """What a call fixes besides its tensors."""

    scale: float
    allow_neg_eigval: bool = True
    qk_l2norm: bool = True
    states_every: int = 0  #: keep the state entering every n-th chunk for the backward; 0 keeps none
    l2norm_eps: float = 1e-6
    norm_eps: float = 1e-5
    keep_intermediates: bool = False  #: keep all that the backward reads of the forward; then states_every is 0

    @property
    def beta_max(self) -> float:
        return 2.0 if self.allow_neg_eigval else 1.0


class Problem(NamedTuple):
    """Sizes, options and where the chunks are."""

    B: int
    T: int
    Hk: int
    H: int
    K: int
    V: int
    options: Options
    layout: Layout
    segments: Layout | None  #: pieces of states_every chunks, when states are kept
    tuned_V: int  #: value dim that launches are looked up by: V, or what it was before columns came to it

    @property
    def tables(self) -> dict[str, Tensor]:
        layout = self.layout
        return {"bounds": layout.bounds, "chunk_doc": layout.chunk_doc, "chunk_start": layout.chunk_start}

    @property
    def sizes(self) -> dict[str, int]:
        """The constants every kernel takes."""
        KA, KB = split_dim(self.K)
        return {
            "H": self.H, "GROUP": self.H // self.Hk, "K": self.K, "V": self.V, "KA": KA, "KB": KB, "C": CHUNK,
            "PACKED": self.layout.is_packed,
        }  # fmt: skip

    def launch(self, kernel: str) -> Launch:
        """How a kernel is launched."""
        return launch_for(kernel, self.K, self.tuned_V)


def make_problem(q: Tensor, v: Tensor, options: Options, cu_seqlens: Tensor | None) -> Problem:
    """q [B, T, Hk, K], v [B, T, H, V]; cu_seqlens [N + 1] or None."""
    B, T, Hk, K = q.shape
    H, V = v.shape[2:]
    for size in (K, V):
        split_dim(size)  # refuses what no launch can run, before one is looked up
    every = options.states_every
    layout = make_layout(B, T, cu_seqlens, q.device)
    segments = make_layout(B, T, cu_seqlens, q.device, CHUNK * every) if every > 0 else None
    return Problem(B, T, Hk, H, K, V, options, layout, segments, V)


class Gates(NamedTuple):
    """Raw gate inputs [B, T, H], any strides but the last, and the per-head parameters [H]."""

    a: Tensor
    b: Tensor
    A_log: Tensor
    dt_bias: Tensor


class Conv(NamedTuple):
    """Four-tap weights [D, 4] of the q, k and v channels, and the inputs before each document [N, D, 3] or None."""

    weight: Tensor
    halo: Tensor | None


class Solved(NamedTuple):
    """What only the forward computes: G [NC, H, C], factors [NC, H, 2, C, 2] fp32, Tb [NC, H, C, C].

    factors: of each token (-exp(G), beta), and then of each (exp(G_C - G), scale exp(G)).
    """

    G: Tensor
    factors: Tensor
    Tb: Tensor


class Prepared(NamedTuple):
    """q, k [B, T, Hk, K] normalised, scale exp(G) q [B, T, H, K] (for the backward; q itself where a forward does not
    keep it), 1 / norms [NC, Hk, C] fp32, P [NC, H, C, C]."""

    q: Tensor
    k: Tensor
    scaled_q: Tensor
    rstd_q: Tensor
    rstd_k: Tensor
    P: Tensor


class Scanned(NamedTuple):
    """What a scan was asked for: h [NC, H, V, K], u [B * T, H, V], kept states [segments, H, V, K] (fp32 unless all
    are kept), final [N, H, K, V] fp32."""

    h: Tensor | None
    u: Tensor | None
    kept: Tensor | None = None
    final: Tensor | None = None


def strides(**tensors: Tensor) -> dict[str, int]:
    """Batch, token and (with four dimensions) head strides by the kernels' parameter names."""
    return {
        f"{name}_s{letter}": stride
        for name, x in tensors.items()
        for letter, stride in zip("bth", x.stride()[:-1], strict=False)
    }


def convolve(problem: Problem, x: Tensor, conv: Conv) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """q, k [B, T, Hk, K] normalised, v [B, T, H, V], both 1 / norms [NC, Hk, C]; from x [B, T, D] before its conv."""
    B, T, Hk, H, K, V, options, layout, *_ = problem
    launch = problem.launch("conv")
    q, k, v = x.new_empty(B, T, Hk, K), x.new_empty(B, T, Hk, K), x.new_empty(B, T, H, V)
    rstd_q, rstd_k = torch.empty(2, layout.num_chunks, Hk, CHUNK, dtype=torch.float32, device=x.device)
    sizes = {name: size for name, size in problem.sizes.items() if name != "GROUP"}
    conv_kernel[(layout.num_chunks * (2 * Hk + triton.cdiv(H * V, launch.block)),)](
        x, conv.weight.t().contiguous(), x if conv.halo is None else conv.halo, q, k, v, rstd_q, rstd_k,
        **problem.tables, T=T, eps=options.l2norm_eps, **strides(x=x), Hk=Hk, **sizes, BV=launch.block, W=TAPS,
        HALO=conv.halo is not None, **launch.options,
    )  # fmt: skip
    return q, k, v, rstd_q, rstd_k


def prepare(
    problem: Problem, inputs: tuple[Tensor, Tensor, Tensor], gates: Gates, conv: Conv | None,
    solved: Solved | None = None, *, with_scores: bool = True,
) -> tuple[Tensor, Prepared, Solved]:  # fmt: skip
    """Chunk-local part of the forward, v [B, T, H, V] first; with `solved`, only what a backward pass needs again.

    with_scores false leaves P to `score`: what is before it then needs no q.

    inputs: q, k [B, T, Hk, K] and v [B, T, H, V], or with a convolution x [B, T, D] alone; any strides but the last.
    """
    B, T, Hk, H, K, _V, options, layout, *_ = problem
    NC, solve = layout.num_chunks, solved is None
    scaled = not solve or options.keep_intermediates
    if conv is None:
        q, k, v = inputs
        normalise = options.qk_l2norm
        rstd_q, rstd_k = q.new_empty(2, NC, Hk, CHUNK, dtype=torch.float32)
    else:
        q, k, v, rstd_q, rstd_k = convolve(problem, inputs[0], conv)
        normalise = False
    if conv is None and not normalise:
        q, k = q.contiguous(), k.contiguous()
    made = Prepared(
        q.new_empty(B, T, Hk, K) if normalise else q,
        k.new_empty(B, T, Hk, K) if normalise else k,
        q.new_empty(B, T, H, K) if scaled else q,
        rstd_q,
        rstd_k,
        q.new_empty(NC, H, CHUNK, CHUNK),
    )
    diagonal = q
    if solved is None:
        solved = Solved(
            q.new_empty(NC, H, CHUNK, dtype=torch.float32),
            q.new_empty(NC, H, 2, CHUNK, 2, dtype=torch.float32),
            q.new_empty(NC, H, CHUNK, CHUNK),
        )
        merged_in = torch.float32 if q.dtype == torch.float32 else torch.float16  # fp32: the interpreter's
        diagonal = q.new_empty(NC, H, 2, 32, 32, dtype=merged_in)
        launch = problem.launch("diagonal")
        diagonal_kernel[(NC * H * 2,)](
            k, *gates, diagonal, **_chunk_arguments(problem, k, gates, normalise), PRECISION=DIAGONAL_PRECISION,
            **launch.options,
        )  # fmt: skip
    _prepare(problem, (q, k), gates, diagonal, made, solved, normalise, SOLVE=solve, SCORES=with_scores, SCALED=scaled)
    return v, made, solved


def score(problem: Problem, made: Prepared, solved: Solved, gates: Gates) -> None:
    """Fills made.P, which needs no state: it can run while states are on their way."""
    q, k = made.q, made.k
    _prepare(problem, (q, k), gates, q, made, solved, False, SOLVE=False, SCORES=True, SCALED=False)


def _prepare(
    problem: Problem, inputs: tuple[Tensor, Tensor], gates: Gates, diagonal: Tensor, made: Prepared, solved: Solved,
    normalise: bool, **wanted: bool,
) -> None:  # fmt: skip
    """inputs: q and k as given, which with `normalise` are not yet those of `made`; wanted: as the kernel has it."""
    q, k = inputs
    launch = problem.launch("prepare_normalising" if normalise else "prepare")
    prepare_kernel[(problem.layout.num_chunks * problem.H,)](
        q, k, *gates, diagonal, made.q, made.k, made.scaled_q, made.rstd_q, made.rstd_k, *solved, made.P,
        **_chunk_arguments(problem, k, gates, normalise), **strides(q=q), scale=problem.options.scale, **wanted,
        **launch.options,
    )  # fmt: skip


def _chunk_arguments(problem: Problem, k: Tensor, gates: Gates, normalise: bool) -> dict[str, object]:
    """What both kernels of a chunk's inverse take; neither sees values."""
    options = problem.options
    sizes = {name: size for name, size in problem.sizes.items() if name != "V"}
    return {
        **problem.tables, **strides(k=k, a=gates.a, b=gates.b), **sizes, "T": problem.T, "eps": options.l2norm_eps,
        "L2NORM": normalise, "BETA_MAX": options.beta_max,
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
            layout.bounds, layout.chunk_start, layout.chunk_doc, layout.chunk_start, T, **strides(v=v),
            **(problem.sizes | {"V": columns}), BV=launch.block, SEGMENT=0, EVERY=0, INITIAL=False, FINAL=True,
            OUT=False, STATES=False, VALUES=False, MAP=is_map, **launch.options,
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


def scan(
    problem: Problem, made: Prepared, solved: Solved, v: Tensor, *, initial: Tensor | None = None,
    kept: Tensor | None = None, o: Tensor | None = None, want_final: bool = False, is_again: bool = False,
) -> Scanned:  # fmt: skip
    """The recurrence through all chunks: document by document, or, from the states kept before, all pieces at once.

    initial [N, H, K, V] fp32. o [B, T, H, V] of any dtype is written when given. The first time states are kept as the
    options say; is_again, in a backward pass, h and u are wanted instead, and the first time with keep_intermediates.
    """
    B, T, _Hk, H, K, V, options, layout, segments, _ = problem
    every, k = options.states_every, made.k
    in_pieces, whole = kept is not None, is_again or options.keep_intermediates
    u = k.new_empty(B * T, H, V) if whole else None
    h = kept if every == 1 else None
    write_states = h is None and (whole or every == 1)
    if write_states:
        h = k.new_empty(layout.num_chunks, H, V, K)
    final = torch.empty(layout.N, H, K, V, dtype=torch.float32, device=k.device) if want_final else None
    if not is_again and segments is not None:
        # fp32: from rounded states the second run would give other bits than the first.
        kept = h if every == 1 else k.new_empty(segments.num_chunks, H, V, K, dtype=torch.float32)
    where = layout if segments is None else segments
    programs = where.num_chunks if in_pieces else layout.N
    launch = problem.launch("scan_again" if whole else "scan")
    scan_kernel[(programs * H * triton.cdiv(V, launch.block),)](
        made.q, k, v, solved.Tb, made.P, solved.factors,
        *(k if x is None else x for x in (initial, o, h, u, kept, final)),
        layout.bounds, layout.chunk_start, where.chunk_doc, where.chunk_start, T, **strides(v=v),
        **problem.sizes, BV=launch.block, SEGMENT=every if in_pieces else 0,
        EVERY=every if every > 1 and not is_again else 0,
        INITIAL=initial is not None, FINAL=want_final, OUT=o is not None, STATES=write_states, VALUES=whole,
        MAP=False, **launch.options,
    )  # fmt: skip
    return Scanned(h, u, kept, final)


def norm(problem: Problem, o: Tensor, z: Tensor | None, norm_weight: Tensor, y: Tensor) -> None:
    """Fills y [B, T, H, V], which may be o's memory: o through the RMSNorm with weight [V], times silu(z) if any."""
    rows = y.numel() // y.shape[-1]
    gate = y if z is None else z
    launch = problem.launch("norm")
    VA, VB = split_dim(problem.V)
    norm_kernel[(triton.cdiv(rows, launch.block),)](
        o, gate, norm_weight, y, problem.T, rows, problem.options.norm_eps, **strides(z=gate),
        H=problem.H, V=problem.V, VA=VA, VB=VB, R=launch.block, GATE=z is not None, **launch.options,
    )  # fmt: skip


def norm_backward(
    problem: Problem, o: Tensor, z: Tensor | None, norm_weight: Tensor, dy: Tensor, do: Tensor, dz: Tensor | None
) -> Tensor:
    """Gradient of norm_weight [V] fp32. do [B, T, H, V], which may be o's memory, and dz (any strides) are written."""
    _B, T, _Hk, H, _K, V, options, layout, *_ = problem
    dw = torch.empty(layout.num_chunks, H, V, dtype=torch.float32, device=o.device)
    VA, VB = split_dim(V)
    gate, dgate = (do, do) if z is None or dz is None else (z, dz)
    launch = problem.launch("norm_backward")
    norm_backward_kernel[(layout.num_chunks * H,)](
        o, gate, dy, norm_weight, do, dgate, dw, **problem.tables, T=T, eps=options.norm_eps,
        **strides(z=gate, dy=dy, dz=dgate), H=H, V=V, VA=VA, VB=VB, C=CHUNK, R=launch.block, GATE=z is not None,
        PACKED=layout.is_packed, **launch.options,
    )  # fmt: skip
    return dw.sum((0, 1))


class Adjoint(NamedTuple):
    """ds [NC, H, V, K], dr [B, T, H, V] (the gradient of v), dinitial [N, H, K, V] fp32 or None."""

    ds: Tensor
    dr: Tensor
    dinitial: Tensor | None


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
    _B, T, _Hk, H, _K, V, _options, layout, *_ = problem
    ds, dr, dinitial = out
    launch = problem.launch("adjoint_scan")
    adjoint_scan_kernel[(layout.N * H * triton.cdiv(V, launch.block),)](
        made.scaled_q, made.k, solved.Tb, made.P, solved.factors, do, ds if dfinal is None else dfinal, ds, dr,
        ds if dinitial is None else dinitial, layout.bounds, layout.chunk_start, T, **strides(do=do),
        **problem.sizes, BV=launch.block, DFINAL=dfinal is not None, DINITIAL=dinitial is not None,
        STORE=ds.numel() > 0, **launch.options,
    )  # fmt: skip


class QueryGradient(NamedTuple):
    """dq [B, T, H, K] before normalisation, dP [NC, H, C, C], gradient of G by scores and output [NC, H, C] fp32."""

    dq: Tensor
    dP: Tensor
    dG: Tensor


def query_gradient(problem: Problem, made: Prepared, solved: Solved, states: Scanned, do: Tensor) -> QueryGradient:
    """What needs all V columns of a chunk but nothing of the adjoint scan."""
    B, T, _Hk, H, K, _V, options, layout, *_ = problem
    out = QueryGradient(made.q.new_empty(B, T, H, K), torch.empty_like(made.P), torch.empty_like(solved.G))
    launch = problem.launch("query_gradient")
    query_gradient_kernel[(layout.num_chunks * H,)](
        made.q, made.k, made.P, out.dP, solved.G, states.u, states.h, do, made.rstd_q, out.dq, out.dG,
        **problem.tables, T=T, scale=options.scale, **strides(do=do), **problem.sizes, BV=launch.block,
        L2NORM=options.qk_l2norm, **launch.options,
    )  # fmt: skip
    return out


class InverseGradient(NamedTuple):
    """D = dN + dN^T [NC, H, C, C], gradient of G through N [NC, H, C] fp32."""

    D: Tensor
    dG: Tensor


def inverse_gradient(
    problem: Problem, made: Prepared, solved: Solved, states: Scanned, dr: Tensor, out: InverseGradient, db: Tensor
) -> None:
    """Fills `out` and db [B, T, H]."""
    _B, T, _Hk, H, _K, _V, options, layout, *_ = problem
    launch = problem.launch("inverse_gradient")
    inverse_gradient_kernel[(layout.num_chunks * H,)](
        made.k, solved.G, solved.factors, states.u, dr, out.D, db, out.dG, **problem.tables, T=T, **strides(db=db),
        **problem.sizes, BV=launch.block, BETA_MAX=options.beta_max, **launch.options,
    )  # fmt: skip


class Gradients(NamedTuple):
    """dq, dk [B, T, Hk, K] before normalisation, dv [B, T, H, V]; dA_log, ddt_bias [H], dinitial [N, H, K, V] fp32."""

    dq: Tensor
    dk: Tensor
    dv: Tensor
    dA_log: Tensor
    ddt_bias: Tensor
    dinitial: Tensor | None


def gradients(
    problem: Problem, made: Prepared, solved: Solved, states: Scanned, do: Tensor, dfinal: Tensor | None, gates: Gates,
    da: Tensor, db: Tensor, want_dinitial: bool,
) -> Gradients:  # fmt: skip
    """Those of everything before the output; da and db [B, T, H] are written in place.

    The adjoint scan has too few programs for all multiprocessors, and they wait for one another: what does not need it
    runs beside it.
    """
    _B, T, Hk, H, _K, _V, options, layout, *_ = problem
    adjoint = new_adjoint(problem, made, want_dinitial)
    inverse = InverseGradient(torch.empty_like(made.P), torch.empty_like(solved.G))
    with beside(do) as second:
        # In this order: with CUDA_DEVICE_MAX_CONNECTIONS=1 a launch waits for all that were made before it to start.
        with second:
            adjoint_scan(problem, made, solved, do, dfinal, adjoint)
        query = query_gradient(problem, made, solved, states, do)
        with second:
            inverse_gradient(problem, made, solved, states, adjoint.dr, inverse, db)
    dq, dk = query.dq, torch.empty_like(query.dq)
    partial = torch.empty(2, H, layout.num_chunks, dtype=torch.float32, device=dq.device)
    launch = problem.launch("key_gradient")
    key_gradient_kernel[(layout.num_chunks * H,)](
        made.q, made.k, query.dP, inverse.D, solved.G, query.dG, inverse.dG, states.u, states.h, adjoint.ds,
        adjoint.dr, gates.a, gates.A_log, gates.dt_bias, made.rstd_k, dk, da, *partial,
        **problem.tables, T=T, num_chunks=layout.num_chunks, **strides(a=gates.a, da=da), **problem.sizes,
        BV=launch.block, L2NORM=options.qk_l2norm, **launch.options,
    )  # fmt: skip
    if Hk != H:
        dq, dk = (x.unflatten(2, (Hk, H // Hk)).sum(3, dtype=torch.float32).to(x.dtype) for x in (dq, dk))
    dA_log, ddt_bias = partial.sum(-1)
    return Gradients(dq, dk, adjoint.dr, dA_log, ddt_bias, adjoint.dinitial)


def conv_backward(
    problem: Problem, x: Tensor, conv: Conv, dq: Tensor, dk: Tensor, dv: Tensor, dx: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Gradients of the conv weight [D, 4] and of the halo [N, D, 3], fp32; dx [B, T, D] is written in place."""
    _B, T, Hk, H, K, V, _, layout, *_ = problem
    launch = problem.launch("conv_backward")
    DQ, DV, BD = Hk * K, H * V, launch.block
    dw = torch.empty(layout.num_chunks, 2 * DQ + DV, TAPS, dtype=torch.float32, device=x.device)
    # Zeros: a document without tokens sends its halo nothing.
    dhalo = None if conv.halo is None else torch.zeros(conv.halo.shape, dtype=torch.float32, device=x.device)
    blocks = 2 * triton.cdiv(DQ, BD) + triton.cdiv(DV, BD)
    conv_backward_kernel[(layout.num_chunks * blocks,)](
        x, conv.weight, x if conv.halo is None else conv.halo, dq, dk, dv, dx, dw, dw if dhalo is None else dhalo,
        **problem.tables, T=T, **strides(x=x, dx=dx), DQ=DQ, DV=DV, BD=BD, C=CHUNK, HALO=conv.halo is not None,
        PACKED=layout.is_packed, **launch.options,
    )  # fmt: skip
    return dw.sum(0), dhalo
