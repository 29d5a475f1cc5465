"""The short causal convolution with SiLU, and its gradients. Letters as in triton_tiles.py; the width is 4 taps.

Narrower convolutions are padded with zero taps by the caller. A program goes through its channels token by token: every
value is loaded once. Four tokens at a time, so that their loads are under way together and the history needs no copying
around.
"""

import triton
import triton.language as tl

from megatron_hybrid.kernels.triton_tiles import locate_chunk, sigmoid_fp32


@triton.jit
def load_row(base, stride, pos, length, c, in_row):
    """One token's channels in fp32; zeros outside the document."""
    return tl.load(base + pos.to(tl.int64) * stride + c, mask=in_row & (pos >= 0) & (pos < length), other=0.0)


@triton.jit
def load_taps(weight, c, in_row):
    """The four of each channel, from weight [D, 4], in fp32."""
    w = weight + c * 4
    w0 = tl.load(w, mask=in_row, other=0.0).to(tl.float32)
    w1 = tl.load(w + 1, mask=in_row, other=0.0).to(tl.float32)
    w2 = tl.load(w + 2, mask=in_row, other=0.0).to(tl.float32)
    w3 = tl.load(w + 3, mask=in_row, other=0.0).to(tl.float32)
    return w0, w1, w2, w3


@triton.jit
def load_history(x, stride, pos, length, past, c, in_row, HALO: tl.constexpr):
    """The three tokens before token pos in fp32; those before the document from past [D, 3] with HALO, else zeros."""
    x0 = load_row(x, stride, pos - 3, length, c, in_row).to(tl.float32)
    x1 = load_row(x, stride, pos - 2, length, c, in_row).to(tl.float32)
    x2 = load_row(x, stride, pos - 1, length, c, in_row).to(tl.float32)
    if HALO:
        past += c * 3
        at_start = in_row & (pos == 0)
        x0 += tl.load(past, mask=at_start, other=0.0).to(tl.float32)
        x1 += tl.load(past + 1, mask=at_start, other=0.0).to(tl.float32)
        x2 += tl.load(past + 2, mask=at_start, other=0.0).to(tl.float32)
    return x0, x1, x2


@triton.jit
def convolved(x0, x1, x2, x3, w0, w1, w2, w3):
    """silu of the convolution's sum."""
    total = w0 * x0 + w1 * x1 + w2 * x2 + w3 * x3
    return total * sigmoid_fp32(total)


@triton.jit
def convolve_rows(
    x, x_st, weight, past, y_out, y_st, rstd, first, length, width, eps,
    BD: tl.constexpr, R: tl.constexpr, NORM: tl.constexpr, HALO: tl.constexpr,
):  # fmt: skip
    """R tokens of a document from token `first` on, `width` channels, a multiple of 16. x, y_out point at the first
    channel of the document's first token, weight [D, 4] and past [D, 3] at that channel.

    With NORM y is divided by its norm over the channels, and 1 / norm goes to rstd, one number a token from `first` on.
    """
    c = tl.arange(0, BD)
    in_row = c < width
    w0, w1, w2, w3 = load_taps(weight, c, in_row)
    x0, x1, x2 = load_history(x, x_st, first, length, past, c, in_row, HALO)
    for i in range(0, R, 4):
        pos = first + i
        x3 = load_row(x, x_st, pos, length, c, in_row).to(tl.float32)
        x4 = load_row(x, x_st, pos + 1, length, c, in_row).to(tl.float32)
        x5 = load_row(x, x_st, pos + 2, length, c, in_row).to(tl.float32)
        x6 = load_row(x, x_st, pos + 3, length, c, in_row).to(tl.float32)
        y0 = convolved(x0, x1, x2, x3, w0, w1, w2, w3)
        y1 = convolved(x1, x2, x3, x4, w0, w1, w2, w3)
        y2 = convolved(x2, x3, x4, x5, w0, w1, w2, w3)
        y3 = convolved(x3, x4, x5, x6, w0, w1, w2, w3)
        if NORM:
            r0 = tl.rsqrt(tl.sum(y0 * y0, 0) + eps)
            r1 = tl.rsqrt(tl.sum(y1 * y1, 0) + eps)
            r2 = tl.rsqrt(tl.sum(y2 * y2, 0) + eps)
            r3 = tl.rsqrt(tl.sum(y3 * y3, 0) + eps)
            tl.store(rstd + i, r0)
            tl.store(rstd + i + 1, r1)
            tl.store(rstd + i + 2, r2)
            tl.store(rstd + i + 3, r3)
            y0, y1, y2, y3 = y0 * r0, y1 * r1, y2 * r2, y3 * r3
        y = y_out + pos.to(tl.int64) * y_st + c
        element = y_out.dtype.element_ty
        tl.store(y, y0.to(element), mask=in_row & (pos < length))
        tl.store(y + y_st, y1.to(element), mask=in_row & (pos + 1 < length))
        tl.store(y + 2 * y_st, y2.to(element), mask=in_row & (pos + 2 < length))
        tl.store(y + 3 * y_st, y3.to(element), mask=in_row & (pos + 3 < length))
        x0, x1, x2 = x4, x5, x6


@triton.jit(do_not_specialize=["T", "chunk0"])
def conv_kernel(
    x_in, weight, halo, q_out, k_out, v_out, rstd_q, rstd_k, bounds, chunk_doc, chunk_start, T, chunk0, eps, x_sb, x_st,
    Hk: tl.constexpr, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr,
    R: tl.constexpr, C: tl.constexpr, HALO: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Convolution and SiLU of R tokens, a part of a chunk: of one q or k head, normalised, of K channels in a vector of
    BK, or of BD channels of v.

    x_in [B, T, D], weight [D, 4] and halo [N, D, 3] hold the D = 2 Hk K + H V channels of q, k and v.
    """
    BLOCKS: tl.constexpr = 2 * Hk + (H * V + BD - 1) // BD
    D: tl.constexpr = 2 * Hk * K + H * V
    block = tl.program_id(0) % BLOCKS
    part = tl.program_id(0) // BLOCKS % (C // R)
    i_c = tl.program_id(0) // (BLOCKS * (C // R)) + chunk0
    n, b, bos, t0, length = locate_chunk(i_c, T, bounds, chunk_doc, chunk_start, PACKED, C)
    first = t0 + part * R
    if first >= length:
        return
    x = x_in + b * x_sb + bos * x_st
    past = halo + n.to(tl.int64) * D * 3
    row = b * T + bos
    if block < 2 * Hk:
        channel = block * K
        out, rstd, i_k = q_out, rstd_q, block
        if block >= Hk:
            out, rstd, i_k = k_out, rstd_k, block - Hk
        convolve_rows(
            x + channel, x_st, weight + channel * 4, past + channel * 3, out + (row * Hk + i_k) * K, Hk * K,
            rstd + (i_c.to(tl.int64) * Hk + i_k) * C + part * R, first, length, K, eps, BK, R, True, HALO,
        )  # fmt: skip
    else:
        column = (block - 2 * Hk) * BD
        channel = 2 * Hk * K + column
        convolve_rows(
            x + channel, x_st, weight + channel * 4, past + channel * 3, v_out + row * (H * V) + column, H * V,
            rstd_q, first, length, tl.minimum(H * V - column, BD), eps, BD, R, False, HALO,
        )  # fmt: skip


@triton.jit
def gradient_of_sum(x0, x1, x2, x3, dy, w0, w1, w2, w3):
    """Gradient of the convolution's sum from the gradient of its SiLU."""
    total = w0 * x0 + w1 * x1 + w2 * x2 + w3 * x3
    gate = sigmoid_fp32(total)
    return dy * gate * (1.0 + total * (1.0 - gate))


@triton.jit(do_not_specialize=["T"])
def conv_backward_kernel(
    x_in, weight, halo, dq_in, dk_in, dv_in, dx_out, dw_out, dhalo_out, bounds, chunk_doc, chunk_start,
    T, x_sb, x_st, dx_sb, dx_st,
    DQ: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, C: tl.constexpr,
    HALO: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """BD channels of one chunk.

    Channels are q (DQ), k (DQ), v (DV), as in x_in [B, T, 2 DQ + DV] and weight [2 DQ + DV, 4]; their gradients come
    in three tensors [B * T, DQ or DV]. dhalo_out [N, D, 3] fp32 is the gradient of halo. dw_out [NC, 2 DQ + DV, 4] fp32
    is summed afterwards, in a fixed order.
    """
    BLOCKS_Q: tl.constexpr = (DQ + BD - 1) // BD
    BLOCKS_V: tl.constexpr = (DV + BD - 1) // BD
    BLOCKS: tl.constexpr = 2 * BLOCKS_Q + BLOCKS_V
    D: tl.constexpr = 2 * DQ + DV
    i_c = tl.program_id(0) // BLOCKS
    block = tl.program_id(0) % BLOCKS
    n, b, bos, t0, length = locate_chunk(i_c, T, bounds, chunk_doc, chunk_start, PACKED, C)
    lane = tl.arange(0, BD)
    section = tl.minimum(block // BLOCKS_Q, 2)
    c = (block - section * BLOCKS_Q) * BD + lane
    first = section * DQ
    dy_st = tl.where(section == 2, DV, DQ)
    dy = dv_in
    if section == 0:
        dy = dq_in
    if section == 1:
        dy = dk_in
    in_row = c < dy_st
    dw = dw_out + (i_c.to(tl.int64) * D + first + c) * 4
    dw0 = tl.zeros([BD], dtype=tl.float32)
    dw1 = tl.zeros([BD], dtype=tl.float32)
    dw2 = tl.zeros([BD], dtype=tl.float32)
    dw3 = tl.zeros([BD], dtype=tl.float32)
    if t0 < length:
        w0, w1, w2, w3 = load_taps(weight + first * 4, c, in_row)
        x = x_in + b * x_sb + bos * x_st + first
        dx = dx_out + b * dx_sb + bos * dx_st + first
        dy += (b * T + bos) * dy_st
        # x0, x1, x2: the three tokens before the current one; d0, d1, d2: the gradients of their sums.
        past = halo + (n.to(tl.int64) * D + first) * 3
        x0, x1, x2 = load_history(x, x_st, t0, length, past, c, in_row, HALO)
        d0 = tl.zeros([BD], dtype=tl.float32)
        d1 = tl.zeros([BD], dtype=tl.float32)
        d2 = tl.zeros([BD], dtype=tl.float32)
        # Three tokens past the chunk are visited for the gradients they send back into it.
        for i in range(0, C + 4, 4):
            pos = t0 + i
            x3 = load_row(x, x_st, pos, length, c, in_row).to(tl.float32)
            x4 = load_row(x, x_st, pos + 1, length, c, in_row).to(tl.float32)
            x5 = load_row(x, x_st, pos + 2, length, c, in_row).to(tl.float32)
            x6 = load_row(x, x_st, pos + 3, length, c, in_row).to(tl.float32)
            y3 = load_row(dy, dy_st, pos, length, c, in_row).to(tl.float32)
            y4 = load_row(dy, dy_st, pos + 1, length, c, in_row).to(tl.float32)
            y5 = load_row(dy, dy_st, pos + 2, length, c, in_row).to(tl.float32)
            y6 = load_row(dy, dy_st, pos + 3, length, c, in_row).to(tl.float32)
            d3 = gradient_of_sum(x0, x1, x2, x3, y3, w0, w1, w2, w3)
            d4 = gradient_of_sum(x1, x2, x3, x4, y4, w0, w1, w2, w3)
            d5 = gradient_of_sum(x2, x3, x4, x5, y5, w0, w1, w2, w3)
            d6 = gradient_of_sum(x3, x4, x5, x6, y6, w0, w1, w2, w3)
            if HALO:
                sent = dhalo_out + (n.to(tl.int64) * D + first + c) * 3
                starts = in_row & (pos == 0)
                tl.store(sent, w0 * d3, mask=starts)
                tl.store(sent + 1, w1 * d3 + w0 * d4, mask=starts)
                tl.store(sent + 2, w2 * d3 + w1 * d4 + w0 * d5, mask=starts)
            out = dx + (pos - 3).to(tl.int64) * dx_st + c
            back = (i > 0) & (pos < length + 3)
            element = dx_out.dtype.element_ty
            tl.store(out, (w3 * d0 + w2 * d1 + w1 * d2 + w0 * d3).to(element), mask=in_row & back)
            back = (i > 0) & (pos < length + 2)
            tl.store(out + dx_st, (w3 * d1 + w2 * d2 + w1 * d3 + w0 * d4).to(element), mask=in_row & back)
            back = (i > 0) & (pos < length + 1)
            tl.store(out + 2 * dx_st, (w3 * d2 + w2 * d3 + w1 * d4 + w0 * d5).to(element), mask=in_row & back)
            back = (i < C) & (pos < length)
            tl.store(out + 3 * dx_st, (w3 * d3 + w2 * d4 + w1 * d5 + w0 * d6).to(element), mask=in_row & back)
            if i < C:
                dw0 += d3 * x0 + d4 * x1 + d5 * x2 + d6 * x3
                dw1 += d3 * x1 + d4 * x2 + d5 * x3 + d6 * x4
                dw2 += d3 * x2 + d4 * x3 + d5 * x4 + d6 * x5
                dw3 += d3 * x3 + d4 * x4 + d5 * x5 + d6 * x6
            x0, x1, x2 = x4, x5, x6
            d0, d1, d2 = d4, d5, d6
    tl.store(dw, dw0, mask=in_row)
    tl.store(dw + 1, dw1, mask=in_row)
    tl.store(dw + 2, dw2, mask=in_row)
    tl.store(dw + 3, dw3, mask=in_row)
