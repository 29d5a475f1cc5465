"""What the Triton kernels share: where chunks lie, how dimensions are split into tiles, loads and stores of tiles.

Letters, here and in every triton_*.py
    B batch, T sequence, H value heads, Hk key heads (H = GROUP * Hk), K key dim, V value dim, W conv width
    C tokens per chunk, N documents (B when dense), NC chunks of all documents together

Matrix dimensions must be powers of two in Triton. K and V are cut in two parts instead of padded: 96 = 64 + 32,
192 = 128 + 64 (`split_dim`), so that the model's own head sizes waste nothing.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

CHUNK = 64  #: C. Warpgroup matrix instructions want 64 rows; the inverse of a chunk is C x C.


class Layout(NamedTuple):
    """Where the chunks of each document are. Made on the device without a host sync.

    Dense rows need no tables: their tensors are empty. Packed documents: chunks beyond the last belong to a
    document N of length zero, so that the number of chunks is known from the shapes alone.
    """

    N: int
    num_chunks: int
    bounds: Tensor  # [N + 2] int64: cu_seqlens, then its last entry again
    chunk_doc: Tensor  # [num_chunks] int32 document of each chunk
    chunk_start: Tensor  # [N + 1] int32 first chunk of each document, then the number of chunks
    is_packed: bool


def make_layout(B: int, T: int, cu_seqlens: Tensor | None, device: torch.device, chunk: int = CHUNK) -> Layout:
    """The chunks of B dense rows of T tokens, or of the documents cu_seqlens [N + 1] of one row."""
    if cu_seqlens is None:
        nothing = torch.empty(0, dtype=torch.int32, device=device)
        return Layout(B, B * triton.cdiv(T, chunk), nothing, nothing, nothing, False)
    bounds = cu_seqlens.to(device=device, dtype=torch.int64)
    N = len(bounds) - 1
    num_chunks = T // chunk + N
    chunk_start = torch.zeros(N + 1, dtype=torch.int32, device=device)
    torch.cumsum((bounds.diff() + chunk - 1) // chunk, 0, dtype=torch.int32, out=chunk_start[1:])
    every_chunk = torch.arange(num_chunks, dtype=torch.int32, device=device)
    chunk_doc = torch.searchsorted(chunk_start[1:], every_chunk, right=True, out_int32=True)
    return Layout(N, num_chunks, torch.cat([bounds, bounds[-1:]]), chunk_doc, chunk_start, True)


def split_dim(size: int) -> tuple[int, int]:
    """Two powers of two that cover `size`, a multiple of 16 up to 256, with the least padding two parts allow."""
    if size % 16 or not 16 <= size <= 256:
        raise ValueError(
            f"head dimension {size}: the Triton kernels take multiples of 16 from 16 to 256, the reference backend any"
        )
    if size == 16:
        return 16, 16  # the second part is all padding: a product needs at least 16 columns
    first = 1 << (size - 1).bit_length() - 1
    return first, max(16, triton.next_power_of_2(size - first))


@triton.jit
def locate_chunk(i_c, T, bounds, chunk_doc, chunk_start, PACKED: tl.constexpr, C: tl.constexpr):
    """(document, batch row, first token of the document in that row, first token of the chunk there, its length)."""
    if PACKED:
        n = tl.load(chunk_doc + i_c)
        bos = tl.load(bounds + n)
        length = (tl.load(bounds + n + 1) - bos).to(tl.int32)
        return n, bos * 0, bos, (i_c - tl.load(chunk_start + n)) * C, length
    else:
        per_row = tl.cdiv(T, C)
        n = i_c // per_row
        row = n.to(tl.int64)
        return n, row, row * 0, (i_c % per_row) * C, T


@triton.jit
def locate_document(n, T, bounds, chunk_start, PACKED: tl.constexpr, C: tl.constexpr):
    """(batch row, first token in that row, length, first chunk) of document n."""
    if PACKED:
        bos = tl.load(bounds + n)
        length = (tl.load(bounds + n + 1) - bos).to(tl.int32)
        return bos * 0, bos, length, tl.load(chunk_start + n).to(tl.int64)
    else:
        row = n.to(tl.int64)
        return row, row * 0, T, row * tl.cdiv(T, C)


@triton.jit
def load_tile(base, stride, rows_left, COL: tl.constexpr, C: tl.constexpr, BC: tl.constexpr, D: tl.constexpr):
    """[C, BC] elements from column COL of C rows; zeros from row rows_left and from column D."""
    r = tl.arange(0, C)
    c = COL + tl.arange(0, BC)
    mask = (r < rows_left)[:, None]
    if COL + BC > D:
        mask = mask & (c < D)[None, :]
    return tl.load(base + r[:, None] * stride + c[None, :], mask=mask, other=0.0)


@triton.jit
def store_tile(base, x, stride, rows_left, COL: tl.constexpr, C: tl.constexpr, BC: tl.constexpr, D: tl.constexpr):
    """The inverse of load_tile; what lies outside is not written."""
    r = tl.arange(0, C)
    c = COL + tl.arange(0, BC)
    mask = (r < rows_left)[:, None]
    if COL + BC > D:
        mask = mask & (c < D)[None, :]
    tl.store(base + r[:, None] * stride + c[None, :], x.to(base.dtype.element_ty), mask=mask)


@triton.jit
def load_block(base, stride, rows_left, col, C: tl.constexpr, BC: tl.constexpr, D: tl.constexpr):
    """load_tile from a column known at run time only, a multiple of BC."""
    r = tl.arange(0, C)
    c = col + tl.arange(0, BC)
    mask = (r < rows_left)[:, None]
    if D % BC != 0:
        mask = mask & (c < D)[None, :]
    return tl.load(base + r[:, None] * stride + c[None, :], mask=mask, other=0.0)


# A warp of a product of 64 rows holds 16 of them. Stored as they are, tensors would be laid out so that a warp writes
# whole rows of memory, and in each chunk they would pass through shared memory with several barriers. In the shapes
# below the compiler (which gives lanes to the dimensions in this order: the contiguous one, the first, the second ...,
# then warps) lets each warp write what it holds.


@triton.jit
def store_columns(base, x, stride, rows_left, col, C: tl.constexpr, BC: tl.constexpr, D: tl.constexpr):
    """Stores the transpose of x [BC, C] where load_block reads."""
    x = tl.reshape(x.to(base.dtype.element_ty), [BC // 16, 16, C // 16, 16])
    r = tl.arange(0, 16)[:, None, None, None] + tl.arange(0, C // 16)[None, None, None, :] * 16
    c = col + tl.arange(0, BC // 16)[None, :, None, None] * 16 + tl.arange(0, 16)[None, None, :, None]
    mask = r < rows_left
    if D % BC != 0:
        mask = mask & (c < D)
    tl.store(base + r * stride + c, tl.permute(x, (3, 0, 1, 2)), mask=mask)


@triton.jit
def load_state(base, row, COL: tl.constexpr, BV: tl.constexpr, BK: tl.constexpr, V: tl.constexpr, K: tl.constexpr):
    """[BV, BK] of a V x K state stored row by row; zeros outside."""
    v = row + tl.arange(0, BV)
    c = COL + tl.arange(0, BK)
    if V % BV != 0 or COL + BK > K:
        return tl.load(base + v[:, None] * K + c[None, :], mask=(v < V)[:, None] & (c < K)[None, :], other=0.0)
    else:
        return tl.load(base + v[:, None] * K + c[None, :])


@triton.jit
def store_state(base, x, row, COL: tl.constexpr, BV: tl.constexpr, BK: tl.constexpr, V: tl.constexpr, K: tl.constexpr):
    """The inverse of load_state."""
    ROWS: tl.constexpr = 256 // BK  # that one instruction of a warp stores in bf16
    x = tl.reshape(x.to(base.dtype.element_ty), [BV // 16, 16 // ROWS, ROWS, BK])
    v = tl.arange(0, ROWS)[:, None, None, None] + tl.arange(0, 16 // ROWS)[None, None, None, :] * ROWS
    v += row + tl.arange(0, BV // 16)[None, :, None, None] * 16
    c = COL + tl.arange(0, BK)[None, None, :, None]
    tl.store(base + v * K + c, tl.permute(x, (2, 0, 3, 1)), mask=(v < V) & (c < K))


@triton.jit
def load_state_fp32(base, row, COL: tl.constexpr, BV: tl.constexpr, BK: tl.constexpr, V: tl.constexpr, K: tl.constexpr):
    """[BV, BK] of a K x V state (the layout of initial and final states), transposed, in fp32; zeros outside."""
    v = row + tl.arange(0, BV)
    c = COL + tl.arange(0, BK)
    mask = (v < V)[:, None] & (c < K)[None, :]
    return tl.load(base + c[None, :] * V + v[:, None], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_state_fp32(
    base, x, row, COL: tl.constexpr, BV: tl.constexpr, BK: tl.constexpr, V: tl.constexpr, K: tl.constexpr
):
    """The inverse of load_state_fp32."""
    v = row + tl.arange(0, BV)
    c = COL + tl.arange(0, BK)
    mask = (v < V)[:, None] & (c < K)[None, :]
    tl.store(base + c[None, :] * V + v[:, None], x, mask=mask)


# The scans take four numbers of each token, made once by the prepare kernel, two and two. C numbers by themselves would
# be fetched by every thread of a product for itself; 2 C are as many as four warps have threads, and each fetches one.


@triton.jit
def load_pair(rows, C: tl.constexpr):
    """Two vectors [C] fp32 from [C, 2] at rows."""
    return tl.split(tl.load(rows + tl.arange(0, C)[:, None] * 2 + tl.arange(0, 2)[None, :]))


@triton.jit
def load_pairs(rows, C: tl.constexpr):
    """Four vectors [C] fp32 from [2, C, 2] at rows, in the order of `load_pair` there and C rows on."""
    t, pair, i = tl.arange(0, C)[:, None, None], tl.arange(0, 2)[None, :, None], tl.arange(0, 2)[None, None, :]
    first, second = tl.split(tl.load(rows + pair * (2 * C) + t * 2 + i))
    x0, x2 = tl.split(first)
    x1, x3 = tl.split(second)
    return x0, x1, x2, x3


@triton.jit
def store_pair(rows, x, y, C: tl.constexpr):
    """The inverse of load_pair."""
    tl.store(rows + tl.arange(0, C)[:, None] * 2 + tl.arange(0, 2)[None, :], tl.join(x, y))


if triton.knobs.runtime.interpret:

    @triton.jit
    def exp_fp32(x):
        return tl.exp(x)

    @triton.jit
    def divide_fp32(x, y):
        return x / y

else:
    # tl.exp and / spend most of their instructions on denormals, which are below every rounding here. These are one
    # or two instructions each, good to 2 units in the last place and, for exp(x), 1.17 |x| more; the interpreter does
    # not have them.

    @triton.jit
    def exp_fp32(x):
        return libdevice.fast_expf(x)

    @triton.jit
    def divide_fp32(x, y):
        return libdevice.fast_dividef(x, y)


@triton.jit
def sigmoid_fp32(x):
    return divide_fp32(1.0, 1.0 + exp_fp32(-x))


@triton.jit
def softplus_fp32(x):
    """log(1 + exp(x)) that neither overflows nor loses small values: log1p(e) = e log(u) / (u - 1), u = fl(1 + e)."""
    e = tl.exp(-tl.abs(x))
    u = 1.0 + e
    log1p = tl.where(u == 1.0, e, e * tl.log(u) / tl.where(u == 1.0, 1.0, u - 1.0))
    return tl.maximum(x, 0.0) + log1p
