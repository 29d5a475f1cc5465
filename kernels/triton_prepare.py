"""What a chunk needs before the state arrives: q, k, v after convolution and normalisation, gates, inverse, scores.

Letters as in triton_tiles.py. For one chunk and value head, with G the running sum of g inside the chunk:

    N_ij = exp(G_i - G_j) k_i.k_j                 i > j, else 0
    Tb   = (I + N diag(beta))^-1                  [C, C] lower triangular
    P_ij = scale exp(G_i - G_j) q_i.k_j           i >= j, else 0

so that the new values are U = beta (Tb (v - exp(G) S^T k)) and the output is scale exp(G) S^T q + P U. Tb has ones on
its diagonal, which bf16 holds exactly: with beta multiplied in, its rounding was the largest single error of the
output. |Tb_ij| <= beta_j <= 2 when keys have unit norm, because every factor I - beta k k^T of a transition is
non-expansive: Tb and P are kept in the activation dtype. Source: the chunkwise form of "Gated Delta Networks"
(arXiv 2412.06464).
"""

import triton
import triton.language as tl

from megatron_hybrid.kernels.triton_tiles import (
    exp_fp32,
    load_tile,
    locate_chunk,
    sigmoid_fp32,
    softplus_fp32,
    store_block,
    store_tile,
)


@triton.jit
def silu_conv_tile(
    x, stride, weight, halo, t0, rows_left, width,
    COL: tl.constexpr, C: tl.constexpr, BC: tl.constexpr, W: tl.constexpr, D: tl.constexpr, HALO: tl.constexpr,
):  # fmt: skip
    """silu(causal conv) of C rows in fp32; x points at token t0 of its document, halo at its [D, W - 1] history.

    Channels from `width` on are zero.
    """
    c = COL + tl.arange(0, BC)
    in_row = (c < width)[None, :]
    valid = (tl.arange(0, C) < rows_left)[:, None] & in_row
    total = tl.zeros([C, BC], dtype=tl.float32)
    for j in tl.static_range(W):
        r = tl.arange(0, C) - (W - 1 - j)
        before = (t0 + r < 0)[:, None]
        tap = tl.load(x + r[:, None] * stride + c[None, :], mask=valid & ~before, other=0.0).to(tl.float32)
        if HALO:
            past = (t0 + r + (W - 1))[:, None] + c[None, :] * (W - 1)
            tap += tl.load(halo + past, mask=valid & before, other=0.0).to(tl.float32)
        tap_weight = tl.load(weight + j * D + c, mask=c < width, other=0.0).to(tl.float32)
        total += tap * tap_weight[None, :]
    return total * sigmoid_fp32(total)


@triton.jit(do_not_specialize=["T"])
def conv_kernel(
    v_in, weight, halo, v_out, bounds, chunk_doc, chunk_start, T, v_sb, v_st,
    H: tl.constexpr, V: tl.constexpr, FIRST: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, W: tl.constexpr,
    HALO: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Convolution and SiLU of one chunk of BV columns of v.

    v_in [B, T, H, V], weight [W, D] and halo [N, D, W - 1], where v's channels follow the FIRST ones of q and k.
    """
    BLOCKS: tl.constexpr = (H * V + BV - 1) // BV
    D: tl.constexpr = FIRST + H * V
    i_c = tl.program_id(0) // BLOCKS
    col = (tl.program_id(0) % BLOCKS) * BV
    n, b, bos, t0, length = locate_chunk(i_c, T, bounds, chunk_doc, chunk_start, PACKED, C)
    if t0 >= length:
        return
    left = length - t0
    width = tl.minimum(H * V - col, BV)
    channel = FIRST + col
    past = halo + (n.to(tl.int64) * D + channel) * (W - 1)
    x = v_in + b * v_sb + (bos + t0) * v_st + col
    v = silu_conv_tile(x, v_st, weight + channel, past, t0, left, width, 0, C, BV, W, D, HALO)
    store_block(v_out + (b * T + bos + t0) * (H * V), v, H * V, left, col, C, BV, H * V)


@triton.jit
def gate_and_strength(a, b, a_st, b_st, A_log, dt_bias, left, i_h, C: tl.constexpr, BETA_MAX: tl.constexpr):
    """g and beta of C tokens; a and b point at the first."""
    r = tl.arange(0, C)
    valid = r < left
    x = tl.load(a + r * a_st, mask=valid, other=0.0).to(tl.float32) + tl.load(dt_bias + i_h).to(tl.float32)
    y = tl.load(b + r * b_st, mask=valid, other=0.0).to(tl.float32)
    g = -exp_fp32(tl.load(A_log + i_h).to(tl.float32)) * softplus_fp32(x)
    # exp(-40) = 4e-18 is nothing beside fp32 rounding, and without larger steps a chunk's running sum keeps the small
    # ones after them to 2e-4.
    g = tl.maximum(g, -40.0)
    # Rows past the end neither decay nor write: the state passes them unchanged.
    return tl.where(valid, g, 0.0), tl.where(valid, BETA_MAX * sigmoid_fp32(y), 0.0)


@triton.jit
def inverse(M, NEAR: tl.constexpr, FAR: tl.constexpr):
    """(I + M)^-1 for M [64, 64] strictly lower triangular, in fp32; NEAR and FAR: input_precision of the merges.

    Forward substitution in the four 16 x 16 diagonal blocks at once, then merges into blocks of 32 and 64. A Neumann
    series over the whole chunk would overflow for correlated keys with beta near 2. A warp of a 64 x 64 product holds
    16 of its rows, one block: nothing of the substitution waits for another warp.
    """
    block, other = tl.arange(0, 4)[:, None, None, None], tl.arange(0, 4)[None, None, :, None]
    A = tl.sum(tl.where(block == other, tl.reshape(M, [4, 16, 4, 16]), 0.0), 2)
    i, j = tl.arange(0, 16)[None, :, None], tl.arange(0, 16)[None, None, :]
    X = tl.where(i == j, 1.0, tl.zeros([4, 16, 16], dtype=tl.float32))
    for step in tl.static_range(15):  # row `step` is final: take it out of those below
        column = tl.sum(tl.where(j == step, A, 0.0), 2)
        row = tl.sum(tl.where(i == step, X, 0.0), 1)
        X -= column[:, :, None] * row[:, None, :]
    X = tl.reshape(tl.where(block == other, X[:, :, None, :], 0.0), [64, 64])
    i, j = tl.arange(0, 64)[:, None], tl.arange(0, 64)[None, :]
    near = tl.where((i // 32 == j // 32) & (i // 16 > j // 16), M, 0.0)
    X -= tl.dot(tl.dot(X, near, input_precision=NEAR), X, input_precision=NEAR)
    far = tl.where(i // 32 > j // 32, M, 0.0)
    return X - tl.dot(tl.dot(X, far, input_precision=FAR), X, input_precision=FAR)


@triton.jit
def normalised_rows(
    x, stride, weight, halo, out, rstd_out, t0, left, writes, eps, i_c, i_k,
    Hk: tl.constexpr, K: tl.constexpr, KA: tl.constexpr, KB: tl.constexpr, C: tl.constexpr, W: tl.constexpr,
    D: tl.constexpr, CONV: tl.constexpr, HALO: tl.constexpr,
):  # fmt: skip
    """C rows of q or k over their norms, with CONV after convolution and SiLU; `writes` stores them and 1 / norms."""
    if CONV:
        x0 = silu_conv_tile(x, stride, weight, halo, t0, left, K, 0, C, KA, W, D, HALO)
        x1 = silu_conv_tile(x, stride, weight, halo, t0, left, K, KA, C, KB, W, D, HALO)
    else:
        x0 = load_tile(x, stride, left, 0, C, KA, K).to(tl.float32)
        x1 = load_tile(x, stride, left, KA, C, KB, K).to(tl.float32)
    rstd = tl.rsqrt(tl.sum(x0 * x0, 1) + tl.sum(x1 * x1, 1) + eps)
    x0 = (x0 * rstd[:, None]).to(out.dtype.element_ty)
    x1 = (x1 * rstd[:, None]).to(out.dtype.element_ty)
    rows = tl.where(writes, left, 0)
    r = tl.arange(0, C)
    tl.store(rstd_out + (i_c.to(tl.int64) * Hk + i_k) * C + r, rstd, mask=r < rows)
    store_tile(out, x0, Hk * K, rows, 0, C, KA, K)
    store_tile(out, x1, Hk * K, rows, KA, C, KB, K)
    return x0, x1


@triton.jit(do_not_specialize=["T"])
def prepare_kernel(
    q_in, k_in, weight, halo, a_in, b_in, A_log, dt_bias,
    q_out, k_out, scaled_out, rstd_q, rstd_k, G_out, beta_out, Tb_out, P_out,
    bounds, chunk_doc, chunk_start, T, scale, eps, q_sb, q_st, q_sh, k_sb, k_st, k_sh, a_sb, a_st, b_sb, b_st,
    H: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    KA: tl.constexpr, KB: tl.constexpr, C: tl.constexpr,
    W: tl.constexpr, CONV: tl.constexpr, HALO: tl.constexpr, L2NORM: tl.constexpr, BETA_MAX: tl.constexpr,
    SOLVE: tl.constexpr, SCORES: tl.constexpr, SCALED: tl.constexpr, PACKED: tl.constexpr,
    NEAR: tl.constexpr, FAR: tl.constexpr,
):  # fmt: skip
    """Of one chunk of one value head: SOLVE writes G, beta and Tb, SCORES P, SCALED scale exp(G) q.

    L2NORM reads raw q and k where the projection left them, and writes them normalised as [B * T, Hk, K] rows; with
    CONV they go through the convolution first: weight [W, D] and halo [N, D, W - 1] hold the channels of q, k and v.
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
    dtype = P_out.dtype.element_ty
    r = tl.arange(0, C)
    q = q_in + b * q_sb + (bos + t0) * q_st + i_k.to(tl.int64) * q_sh
    k = k_in + b * k_sb + (bos + t0) * k_st + i_k.to(tl.int64) * k_sh
    if L2NORM:
        D: tl.constexpr = 2 * Hk * K + H * V
        writes = i_h % GROUP == 0  # value heads that share a key head write it once
        past = halo + n.to(tl.int64) * D * (W - 1)
        channel = i_k * K
        out = (row * Hk + i_k) * K
        q0, q1 = normalised_rows(
            q, q_st, weight + channel, past + channel * (W - 1), q_out + out, rstd_q, t0, left, writes, eps, i_c, i_k,
            Hk, K, KA, KB, C, W, D, CONV, HALO,
        )  # fmt: skip
        channel += Hk * K
        k0, k1 = normalised_rows(
            k, k_st, weight + channel, past + channel * (W - 1), k_out + out, rstd_k, t0, left, writes, eps, i_c, i_k,
            Hk, K, KA, KB, C, W, D, CONV, HALO,
        )  # fmt: skip
    else:
        q0 = load_tile(q, q_st, left, 0, C, KA, K)
        q1 = load_tile(q, q_st, left, KA, C, KB, K)
        k0 = load_tile(k, k_st, left, 0, C, KA, K)
        k1 = load_tile(k, k_st, left, KA, C, KB, K)
    chunk = i_c.to(tl.int64) * H + i_h
    if SOLVE:
        a = a_in + b * a_sb + (bos + t0) * a_st + i_h
        bb = b_in + b * b_sb + (bos + t0) * b_st + i_h
        g, beta = gate_and_strength(a, bb, a_st, b_st, A_log, dt_bias, left, i_h, C, BETA_MAX)
        G = tl.cumsum(g, 0)
        tl.store(G_out + chunk * C + r, G)
        tl.store(beta_out + chunk * C + r, beta)
    else:
        G = tl.load(G_out + chunk * C + r)
    if SCALED:
        decay = (scale * exp_fp32(G))[:, None]
        out = scaled_out + (row * H + i_h) * K
        store_tile(out, q0.to(tl.float32) * decay, H * K, left, 0, C, KA, K)
        store_tile(out, q1.to(tl.float32) * decay, H * K, left, KA, C, KB, K)
    i, j = r[:, None], r[None, :]
    decay = tl.where(i >= j, exp_fp32(tl.where(i >= j, G[:, None] - G[None, :], 0.0)), 0.0)
    square = chunk * C * C + i * C + j
    if SCORES:
        P = tl.dot(q0, tl.trans(k0)) + tl.dot(q1, tl.trans(k1))
        tl.store(P_out + square, (P * decay * scale).to(dtype))
    if SOLVE:
        M = (tl.dot(k0, tl.trans(k0)) + tl.dot(k1, tl.trans(k1))) * decay * beta[None, :]
        X = inverse(tl.where(i > j, M, 0.0), NEAR, FAR)
        tl.store(Tb_out + square, X.to(dtype))
