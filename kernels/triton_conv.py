"""Backward of the short causal convolution with SiLU. Letters as in triton_tiles.py; the width is 4 taps.

The forward convolution lives in triton_prepare.py. Narrower convolutions are padded with zero taps by the caller.
"""

import triton
import triton.language as tl

from megatron_hybrid.kernels.triton_tiles import locate_chunk, sigmoid_fp32


@triton.jit
def load_row(base, stride, pos, length, c, in_row):
    """One token's channels in fp32; zeros outside the document."""
    return tl.load(base + pos.to(tl.int64) * stride + c, mask=in_row & (pos >= 0) & (pos < length), other=0.0)


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
    """BD channels of one chunk, token after token: every value is loaded once and its SiLU taken once.

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
        w = weight + (first + c) * 4
        w0 = tl.load(w, mask=in_row, other=0.0).to(tl.float32)
        w1 = tl.load(w + 1, mask=in_row, other=0.0).to(tl.float32)
        w2 = tl.load(w + 2, mask=in_row, other=0.0).to(tl.float32)
        w3 = tl.load(w + 3, mask=in_row, other=0.0).to(tl.float32)
        x = x_in + b * x_sb + bos * x_st + first
        dx = dx_out + b * dx_sb + bos * dx_st + first
        dy += (b * T + bos) * dy_st
        # x0, x1, x2: the three tokens before the current one; d0, d1, d2: the gradients of their sums.
        x0 = load_row(x, x_st, t0 - 3, length, c, in_row).to(tl.float32)
        x1 = load_row(x, x_st, t0 - 2, length, c, in_row).to(tl.float32)
        x2 = load_row(x, x_st, t0 - 1, length, c, in_row).to(tl.float32)
        if HALO:
            past = halo + (n.to(tl.int64) * D + first + c) * 3
            at_start = in_row & (t0 == 0)
            x0 += tl.load(past, mask=at_start, other=0.0).to(tl.float32)
            x1 += tl.load(past + 1, mask=at_start, other=0.0).to(tl.float32)
            x2 += tl.load(past + 2, mask=at_start, other=0.0).to(tl.float32)
        d0 = tl.zeros([BD], dtype=tl.float32)
        d1 = tl.zeros([BD], dtype=tl.float32)
        d2 = tl.zeros([BD], dtype=tl.float32)
        # Three tokens past the chunk are visited for the gradients they send back into it. Four tokens at a time,
        # so that eight loads are under way together and the history needs no copying around.
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
