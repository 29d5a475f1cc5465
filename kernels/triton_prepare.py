"""What a chunk needs before the state arrives: q, k, v after convolution and normalisation, gates, inverse, scores.

Letters as in triton_tiles.py. For one chunk and value head, with G the running sum of g inside the chunk:

    M_ij  = beta_i exp(G_i - G_j) k_i.k_j         i > j, else 0
    Tb    = (I + M)^-1 diag(beta)                 [C, C] lower triangular
    P_ij  = scale exp(G_i - G_j) q_i.k_j          i >= j, else 0

so that the new values are U = Tb (v - exp(G) S^T k) and the output is scale exp(G) S^T q + P U. |Tb_ij| <= 4 when
keys have unit norm and beta <= 2, because every factor I - beta k k^T of a transition is non-expansive: Tb and P are
kept in the activation dtype. Source: the chunkwise form of "Gated Delta Networks" (arXiv 2412.06464).
"""

import triton
import triton.language as tl

from megatron_hybrid.kernels.triton_tiles import load_tile, locate_chunk, sigmoid_fp32, softplus_fp32, store_tile


@triton.jit
def silu_conv_tile(
    x, stride, weight, halo, t0, rows_left,
    COL: tl.constexpr, C: tl.constexpr, BC: tl.constexpr, D: tl.constexpr, W: tl.constexpr, HALO: tl.constexpr,
):  # fmt: skip
    """silu(causal conv) of C rows in fp32; x points at token t0 of its document, halo at its [D, W - 1] history."""
    c = COL + tl.arange(0, BC)
    in_row = (c < D)[None, :]
    valid = (tl.arange(0, C) < rows_left)[:, None] & in_row
    total = tl.zeros([C, BC], dtype=tl.float32)
    for j in tl.static_range(W):
        r = tl.arange(0, C) - (W - 1 - j)
        before = (t0 + r < 0)[:, None]
        tap = tl.load(x + r[:, None] * stride + c[None, :], mask=valid & ~before, other=0.0).to(tl.float32)
        if HALO:
            past = (t0 + r + (W - 1))[:, None] + c[None, :] * (W - 1)
            tap += tl.load(halo + past, mask=valid & before, other=0.0).to(tl.float32)
        tap_weight = tl.load(weight + c * W + j, mask=c < D, other=0.0).to(tl.float32)
        total += tap * tap_weight[None, :]
    return total * sigmoid_fp32(total)


@triton.jit
def input_tile(
    x, stride, weight, halo, t0, rows_left,
    COL: tl.constexpr, C: tl.constexpr, BC: tl.constexpr, D: tl.constexpr, W: tl.constexpr, HALO: tl.constexpr,
):  # fmt: skip
    """C rows in fp32, through convolution and SiLU when there is a convolution (W > 0)."""
    if W > 0:
        return silu_conv_tile(x, stride, weight, halo, t0, rows_left, COL, C, BC, D, W, HALO)
    else:
        return load_tile(x, stride, rows_left, COL, C, BC, D).to(tl.float32)


@triton.jit
def unit_lower_inverse(A, C: tl.constexpr, PRECISION: tl.constexpr):
    """(I + A)^-1 in fp32 for A [C, C] strictly lower triangular, C = 64.

    Forward substitution inside 16 x 16 diagonal blocks, then two merges of neighbouring blocks. A Neumann series
    over the whole chunk would overflow for correlated keys with beta near 2.
    """
    n = tl.arange(0, C // 16)
    i = tl.arange(0, 16)
    same_block = n[:, None, None, None] == n[None, None, :, None]
    blocks = tl.sum(tl.where(same_block, tl.reshape(A, [C // 16, 16, C // 16, 16]), 0.0), axis=2)
    X = -blocks
    for row in range(2, 16):
        a = -tl.sum(tl.where(i[None, :, None] == row, blocks, 0.0), axis=1)
        new = a + tl.sum(a[:, :, None] * X, axis=1)
        X = tl.where(i[None, :, None] == row, new[:, None, :], X)
    X += tl.where(i[:, None] == i[None, :], 1.0, 0.0)[None, :, :]
    X = tl.reshape(tl.where(same_block, X[:, :, None, :], 0.0), [C, C])
    r = tl.arange(0, C)[:, None]
    c = tl.arange(0, C)[None, :]
    pairs = tl.where((r // 32 == c // 32) & (r // 16 > c // 16), A, 0.0)
    X -= tl.dot(tl.dot(X, pairs, input_precision=PRECISION), X, input_precision=PRECISION)
    halves = tl.where(r // 32 > c // 32, A, 0.0)
    X -= tl.dot(tl.dot(X, halves, input_precision=PRECISION), X, input_precision=PRECISION)
    return X


@triton.jit(do_not_specialize=["T"])
def prepare_kernel(
    q_in, k_in, v_in, weight, halo, a_in, b_in, A_log, dt_bias,
    q_out, k_out, v_out, rstd_q, rstd_k, G_out, beta_out, Tb_out, P_out,
    bounds, chunk_doc, chunk_start, T, scale, eps,
    q_sb, q_st, q_sh, k_sb, k_st, k_sh, v_sb, v_st, v_sh, a_sb, a_st, b_sb, b_st,
    H: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    KA: tl.constexpr, KB: tl.constexpr, VA: tl.constexpr, VB: tl.constexpr, C: tl.constexpr, W: tl.constexpr,
    HALO: tl.constexpr, L2NORM: tl.constexpr, BETA_MAX: tl.constexpr, SOLVE: tl.constexpr, PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One chunk of one value head. Reads inputs where the projection left them, writes [B * T, heads, dim] rows.

    With a convolution (W > 0) v is convolved and written too; without, v_in and v_out are not touched. weight [D, W]
    and halo [N, D, W - 1] are those of the D = 2 Hk K + H V channels of q, k and v. SOLVE off leaves out what a
    backward pass still has: gates and Tb.
    """
    i_c = tl.program_id(0) // H
    i_h = tl.program_id(0) % H
    i_k = i_h // GROUP
    n, b, bos, t0, length = locate_chunk(i_c, T, bounds, chunk_doc, chunk_start, PACKED, C)
    if t0 >= length:
        return
    left = length - t0
    row = b * T + bos + t0
    Hk: tl.constexpr = H // GROUP
    D: tl.constexpr = 2 * Hk * K + H * V
    dtype = q_out.dtype.element_ty
    first = tl.where(i_h % GROUP == 0, left, 0)  # value heads that share a key head write it once
    r = tl.arange(0, C)
    i_k64 = i_k.to(tl.int64)
    n64 = n.to(tl.int64)

    x = q_in + b * q_sb + (bos + t0) * q_st + i_k64 * q_sh
    channel = i_k * K
    w = weight + channel * W
    past = halo + (n64 * D + channel) * (W - 1)
    q0 = input_tile(x, q_st, w, past, t0, left, 0, C, KA, K, W, HALO)
    q1 = input_tile(x, q_st, w, past, t0, left, KA, C, KB, K, W, HALO)
    x = k_in + b * k_sb + (bos + t0) * k_st + i_k64 * k_sh
    channel += Hk * K
    w = weight + channel * W
    past = halo + (n64 * D + channel) * (W - 1)
    k0 = input_tile(x, k_st, w, past, t0, left, 0, C, KA, K, W, HALO)
    k1 = input_tile(x, k_st, w, past, t0, left, KA, C, KB, K, W, HALO)
    if L2NORM:
        rq = tl.rsqrt(tl.sum(q0 * q0, 1) + tl.sum(q1 * q1, 1) + eps)
        rk = tl.rsqrt(tl.sum(k0 * k0, 1) + tl.sum(k1 * k1, 1) + eps)
        q0, q1 = q0 * rq[:, None], q1 * rq[:, None]
        k0, k1 = k0 * rk[:, None], k1 * rk[:, None]
        scalars = (i_c.to(tl.int64) * Hk + i_k) * C + r
        tl.store(rstd_q + scalars, rq, mask=r < first)
        tl.store(rstd_k + scalars, rk, mask=r < first)
    q0, q1, k0, k1 = q0.to(dtype), q1.to(dtype), k0.to(dtype), k1.to(dtype)
    out = (row * Hk + i_k) * K
    store_tile(q_out + out, q0, Hk * K, first, 0, C, KA, K)
    store_tile(q_out + out, q1, Hk * K, first, KA, C, KB, K)
    store_tile(k_out + out, k0, Hk * K, first, 0, C, KA, K)
    store_tile(k_out + out, k1, Hk * K, first, KA, C, KB, K)
    if W > 0:
        x = v_in + b * v_sb + (bos + t0) * v_st + i_h.to(tl.int64) * v_sh
        channel = 2 * Hk * K + i_h * V
        w = weight + channel * W
        past = halo + (n64 * D + channel) * (W - 1)
        out = (row * H + i_h) * V
        store_tile(v_out + out, input_tile(x, v_st, w, past, t0, left, 0, C, VA, V, W, HALO), H * V, left, 0, C, VA, V)
        store_tile(v_out + out, input_tile(x, v_st, w, past, t0, left, VA, C, VB, V, W, HALO), H * V, left, VA, C, VB, V)

    scalars = (i_c.to(tl.int64) * H + i_h) * C + r
    if SOLVE:
        valid = r < left
        a = tl.load(a_in + b * a_sb + (bos + t0 + r) * a_st + i_h, mask=valid, other=0.0).to(tl.float32)
        x_beta = tl.load(b_in + b * b_sb + (bos + t0 + r) * b_st + i_h, mask=valid, other=0.0).to(tl.float32)
        decay_rate = -tl.exp(tl.load(A_log + i_h).to(tl.float32))
        g = decay_rate * softplus_fp32(a + tl.load(dt_bias + i_h).to(tl.float32))
        # Rows past the end neither decay nor write: the state passes them unchanged.
        G = tl.cumsum(tl.where(valid, g, 0.0), 0)
        beta = tl.where(valid, BETA_MAX * sigmoid_fp32(x_beta), 0.0)
        tl.store(G_out + scalars, G)
        tl.store(beta_out + scalars, beta)
    else:
        G = tl.load(G_out + scalars)
        beta = tl.load(beta_out + scalars)
    lower = r[:, None] >= r[None, :]
    decay = tl.where(lower, tl.exp(tl.where(lower, G[:, None] - G[None, :], 0.0)), 0.0)
    square = (i_c.to(tl.int64) * H + i_h) * C * C + r[:, None] * C + r[None, :]
    P = tl.dot(q0, tl.trans(k0)) + tl.dot(q1, tl.trans(k1))
    tl.store(P_out + square, (P * decay * scale).to(dtype))
    if SOLVE:
        M = (tl.dot(k0, tl.trans(k0)) + tl.dot(k1, tl.trans(k1))) * decay * beta[:, None]
        inverse = unit_lower_inverse(tl.where(r[:, None] > r[None, :], M, 0.0), C, PRECISION)
        tl.store(Tb_out + square, (inverse * beta[None, :]).to(dtype))
