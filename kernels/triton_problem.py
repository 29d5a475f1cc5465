"""What the launches of the Triton kernels work on: one call's sizes, and the tensors between its kernels.

Letters as in triton_tiles.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import NamedTuple

from torch import Tensor

from megatron_hybrid.kernels.configs import Launch, launch_for
from megatron_hybrid.kernels.triton_tiles import CHUNK, Layout, make_layout, split_dim

#: Chunks times heads that a piece has on average at least, and the most pieces of a row.
PIECE, MOST_PIECES = 900, 3
#: The length of a piece over that of the one before it. Beside the scan of one the next is prepared, which takes longer
#: for as many chunks.
SHRINK = 0.72


@contextmanager
def cut_finely() -> Iterator[None]:
    """Within, short rows are cut in pieces too, as training's long ones are: for what checks the kernels."""
    global PIECE
    before, PIECE = PIECE, 1
    try:
        yield
    finally:
        PIECE = before


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


class Piece(NamedTuple):
    """All chunks, or some that are neighbours in one dense row."""

    first: int
    length: int

    @property
    def tokens(self) -> slice:
        """Those of one dense row."""
        return slice(self.first * CHUNK, (self.first + self.length) * CHUNK)


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
    segments: Layout | None  #: stretches of states_every chunks, when states are kept
    tuned_V: int  #: value dim that launches are looked up by: V, or what it was before columns came to it
    pieces: list[Piece]  #: what runs beside one another, first to last

    @property
    def whole(self) -> Piece:
        return Piece(0, self.layout.num_chunks)

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
    return Problem(B, T, Hk, H, K, V, options, layout, segments, V, cut(layout, H))


def cut(layout: Layout, H: int) -> list[Piece]:
    """The scan of one row is long and narrow, so that in pieces it leaves room for what comes before and after it.
    Documents side by side, and several rows, fill a GPU at once."""
    chunks = layout.num_chunks
    if layout.N > 1 or layout.is_packed:
        return [Piece(0, chunks)]
    count = min(max(chunks * H // PIECE, 1), MOST_PIECES)
    ends = (round(chunks * (1 - SHRINK**i) / (1 - SHRINK**count)) for i in range(count + 1))
    return [Piece(first, end - first) for first, end in pairwise(sorted(set(ends)))]


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


class Adjoint(NamedTuple):
    """ds [NC, H, V, K], dr [B, T, H, V] (the gradient of v), dinitial [N, H, K, V] fp32 or None."""

    ds: Tensor
    dr: Tensor
    dinitial: Tensor | None


class QueryGradient(NamedTuple):
    """dq [B, T, H, K] before normalisation, dP [NC, H, C, C], gradient of G by scores and output [NC, H, C] fp32."""

    dq: Tensor
    dP: Tensor
    dG: Tensor


class InverseGradient(NamedTuple):
    """D = dN + dN^T [NC, H, C, C], gradient of G through N [NC, H, C] fp32."""

    D: Tensor
    dG: Tensor


class Gradients(NamedTuple):
    """dq, dk [B, T, Hk, K] before normalisation, dv [B, T, H, V]; dA_log, ddt_bias [H], dinitial [N, H, K, V] fp32."""

    dq: Tensor
    dk: Tensor
    dv: Tensor
    dA_log: Tensor
    ddt_bias: Tensor
    dinitial: Tensor | None


def strides(**tensors: Tensor) -> dict[str, int]:
    """Batch, token and (with four dimensions) head strides by the kernels' parameter names."""
    return {
        f"{name}_s{letter}": stride
        for name, x in tensors.items()
        for letter, stride in zip("bth", x.stride()[:-1], strict=False)
    }
