"""What a chunk needs before the state arrives, besides its convolution: gates, inverse, scores.

Letters as in triton_tiles.py. For one chunk and value head, with G the running sum of g inside the chunk:

    N_ij = exp(G_i - G_j) k_i.k_j                 i > j, else 0
    Tb   = (I + N diag(beta))^-1                  [C, C] lower triangular
    P_ij = scale exp(G_i - G_j) q_i.k_j           i >= j, else 0

so that the new values are U = beta (Tb (v - exp(G) S^T k)) and the output is scale exp(G) S^T q + P U. Tb has ones on
its diagonal, which bf16 holds exactly: with beta multiplied in, its rounding was the largest single error of the
output. |Tb_ij| <= beta_j <= 2 below the diagonal when keys have unit norm, because every factor I - beta k k^T of a
transition is non-expansive: Tb and P are kept in the activation dtype. Source: the chunkwise form of "Gated Delta
Networks" (arXiv 2412.06464).
"""

import triton
import triton.language as tl

from megatron_hybrid.kernels.triton_tiles import (
    exp_fp32,
    load_tile,
    locate_chunk,
    sigmoid_fp32,
    softplus_fp32,
    store_pair,
    store_state,
    store_tile,
)


@triton.jit
def gate_and_strength(a, b, a_st, b_st, A_log, dt_bias, first, left, i_h, R: tl.constexpr, BETA_MAX: tl.constexpr):
    """g and beta of R tokens from token `first` of a chunk; a and b point at the chunk's first token."""
    r = first + tl.arange(0, R)
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
def inverse_16(A):
    """(I + A)^-1 for A [16, 16] strictly lower triangular, row by row in fp32."""
    i = tl.arange(0, 16)
    X = -A
    for row in range(2, 16):
        new = -tl.sum(tl.where(i[:, None] == row, A, 0.0), 0)
        new += tl.sum(new[:, None] * X, 0)
        X = tl.where(i[:, None] == row, new[None, :], X)
    return X + tl.where(i[:, None] == i[None, :], 1.0, 0.0)


@triton.jit
def normalised_rows(x, stride, left, eps, C: tl.constexpr, KA: tl.constexpr, KB: tl.constexpr, K: tl.constexpr):
    """C rows of q or k over their norms, in fp32, and 1 / norms."""
    x0 = load_tile(x, stride, left, 0, C, KA, K).to(tl.float32)
    x1 = load_tile(x, stride, left, KA, C, KB, K).to(tl.float32)
    rstd = tl.rsqrt(tl.sum(x0 * x0, 1) + tl.sum(x1 * x1, 1) + eps)
    return x0 * rstd[:, None], x1 * rstd[:, None], rstd


@triton.jit(do_not_specialize=["T", "chunk0"])
def diagonal_kernel(
    k_in, a_in, b_in, A_log, dt_bias, diagonal_out, bounds, chunk_doc, chunk_start, T, chunk0, eps,
    k_sb, k_st, k_sh, a_sb, a_st, b_sb, b_st,
    H: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, KA: tl.constexpr, KB: tl.constexpr, C: tl.constexpr,
    L2NORM: tl.constexpr, BETA_MAX: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Inverse of one 32 x 32 diagonal block of I + N diag(beta), for one warp: nothing here waits for another warp.

    Forward substitution in two 16 x 16 blocks, then their merge. A Neumann series over the whole chunk would overflow
    for correlated keys with beta near 2. diagonal_out is [NC, H, 2, 32, 32], fp16 for 16-bit inputs.
    """
    half = tl.program_id(0) % 2
    i_h = (tl.program_id(0) // 2) % H
    i_c = tl.program_id(0) // (2 * H) + chunk0
    _n, b, bos, t0, length = locate_chunk(i_c, T, bounds, chunk_doc, chunk_start, PACKED, C)
    if t0 >= length:
        return
    left = length - t0 - half * 32
    dtype = k_in.dtype.element_ty
    token = bos + t0 + half * 32
    a = a_in + b * a_sb + token * a_st + i_h
    bb = b_in + b * b_sb + token * b_st + i_h
    g0, beta0 = gate_and_strength(a, bb, a_st, b_st, A_log, dt_bias, 0, left, i_h, 16, BETA_MAX)
    g1, beta1 = gate_and_strength(a, bb, a_st, b_st, A_log, dt_bias, 16, left, i_h, 16, BETA_MAX)
    k = k_in + b * k_sb + token * k_st + (i_h // GROUP).to(tl.int64) * k_sh
    if L2NORM:
        u0, u1, _ = normalised_rows(k, k_st, left, eps, 16, KA, KB, K)
        l0, l1, _ = normalised_rows(k + 16 * k_st, k_st, left - 16, eps, 16, KA, KB, K)
        u0, u1, l0, l1 = u0.to(dtype), u1.to(dtype), l0.to(dtype), l1.to(dtype)
    else:
        u0 = load_tile(k, k_st, left, 0, 16, KA, K)
        u1 = load_tile(k, k_st, left, KA, 16, KB, K)
        l0 = load_tile(k + 16 * k_st, k_st, left - 16, 0, 16, KA, K)
        l1 = load_tile(k + 16 * k_st, k_st, left - 16, KA, 16, KB, K)
    i = tl.arange(0, 16)
    below = i[:, None] > i[None, :]
    G0 = tl.cumsum(g0, 0)
    G1 = tl.cumsum(g1, 0)
    # Every exponent is of a sum of g <= 0 between two tokens; above the diagonal it is replaced before exp.
    upper = tl.where(below, exp_fp32(tl.where(below, G0[:, None] - G0[None, :], 0.0)), 0.0)
    lower = tl.where(below, exp_fp32(tl.where(below, G1[:, None] - G1[None, :], 0.0)), 0.0)
    across = exp_fp32(G1[:, None] + (tl.sum(g0, 0) - G0)[None, :])
    A00 = (tl.dot(u0, tl.trans(u0)) + tl.dot(u1, tl.trans(u1))) * upper * beta0[None, :]
    A11 = (tl.dot(l0, tl.trans(l0)) + tl.dot(l1, tl.trans(l1))) * lower * beta1[None, :]
    A10 = (tl.dot(l0, tl.trans(u0)) + tl.dot(l1, tl.trans(u1))) * across * beta0[None, :]
    X00, X11 = inverse_16(A00), inverse_16(A11)
    X10 = -tl.dot(X11, tl.dot(A10, X00, input_precision=PRECISION), input_precision=PRECISION)
    out = diagonal_out + ((i_c.to(tl.int64) * H + i_h) * 2 + half) * 1024 + i[:, None] * 32 + i[None, :]
    element = diagonal_out.dtype.element_ty
    tl.store(out, X00.to(element))
    tl.store(out + 16, tl.zeros([16, 16], dtype=element))
    tl.store(out + 512, X10.to(element))
    tl.store(out + 528, X11.to(element))


@triton.jit(do_not_specialize=["T", "chunk0"])
def prepare_kernel(
    q_in, k_in, a_in, b_in, A_log, dt_bias, diagonal_in,
    q_out, k_out, scaled_out, rstd_q, rstd_k, G_out, factors_out, Tb_out, P_out,
    bounds, chunk_doc, chunk_start, T, chunk0, scale, eps,
    q_sb, q_st, q_sh, k_sb, k_st, k_sh, a_sb, a_st, b_sb, b_st,
    H: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, KA: tl.constexpr, KB: tl.constexpr, C: tl.constexpr,
    L2NORM: tl.constexpr, BETA_MAX: tl.constexpr, SOLVE: tl.constexpr, SCORES: tl.constexpr, SCALED: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    """Of one chunk of one value head: SOLVE writes G, the scans' factors and Tb, SCORES P, SCALED scale exp(G) q.

    L2NORM reads raw q and k where the projection left them, and writes them normalised as [B * T, Hk, K] rows.
    """
    i_c = tl.program_id(0) // H + chunk0
    i_h = tl.program_id(0) % H
    i_k = i_h // GROUP
    _n, b, bos, t0, length = locate_chunk(i_c, T, bounds, chunk_doc, chunk_start, PACKED, C)
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
        q0, q1, rq = normalised_rows(q, q_st, left, eps, C, KA, KB, K)
        k0, k1, rk = normalised_rows(k, k_st, left, eps, C, KA, KB, K)
        q0, q1, k0, k1 = q0.to(dtype), q1.to(dtype), k0.to(dtype), k1.to(dtype)
        first = tl.where(i_h % GROUP == 0, left, 0)  # value heads that share a key head write it once
        scalars = (i_c.to(tl.int64) * Hk + i_k) * C + r
        tl.store(rstd_q + scalars, rq, mask=r < first)
        tl.store(rstd_k + scalars, rk, mask=r < first)
        out = (row * Hk + i_k) * K
        store_tile(q_out + out, q0, Hk * K, first, 0, C, KA, K)
        store_tile(q_out + out, q1, Hk * K, first, KA, C, KB, K)
        store_tile(k_out + out, k0, Hk * K, first, 0, C, KA, K)
        store_tile(k_out + out, k1, Hk * K, first, KA, C, KB, K)
    else:
        q0 = load_tile(q, q_st, left, 0, C, KA, K)
        q1 = load_tile(q, q_st, left, KA, C, KB, K)
        k0 = load_tile(k, k_st, left, 0, C, KA, K)
        k1 = load_tile(k, k_st, left, KA, C, KB, K)
    chunk = i_c.to(tl.int64) * H + i_h
    if SOLVE:
        a = a_in + b * a_sb + (bos + t0) * a_st + i_h
        bb = b_in + b * b_sb + (bos + t0) * b_st + i_h
        g, beta = gate_and_strength(a, bb, a_st, b_st, A_log, dt_bias, 0, left, i_h, C, BETA_MAX)
        G = tl.cumsum(g, 0)
        G_end = tl.sum(tl.where(r == C - 1, G, 0.0))
        gam = exp_fp32(G)
        tl.store(G_out + chunk * C + r, G)
        store_pair(factors_out + chunk * C * 4, -gam, beta, C)
        store_pair(factors_out + chunk * C * 4 + C * 2, exp_fp32(G_end - G), scale * gam, C)
    else:
        G = tl.load(G_out + chunk * C + r)
    if SCALED:
        decay = (scale * exp_fp32(G))[:, None]
        out = scaled_out + (row * H + i_h) * K
        store_tile(out, q0.to(tl.float32) * decay, H * K, left, 0, C, KA, K)
        store_tile(out, q1.to(tl.float32) * decay, H * K, left, KA, C, KB, K)
    i, j = r[:, None], r[None, :]
    decay = tl.where(i >= j, exp_fp32(tl.where(i >= j, G[:, None] - G[None, :], 0.0)), 0.0)
    if SCORES:
        P = tl.dot(q0, tl.trans(k0)) + tl.dot(q1, tl.trans(k1))
        store_state(P_out + chunk * C * C, P * decay * scale, 0, 0, C, C, C, C)
    if SOLVE:
        M = (tl.dot(k0, tl.trans(k0)) + tl.dot(k1, tl.trans(k1))) * decay * beta[None, :]
        # In fp16, which is as fine as tf32 and takes half the shared memory; for unit keys |X_ij|, |M_ij| <= 2.
        M = tl.where(i // 32 > j // 32, M, 0.0).to(diagonal_in.dtype.element_ty)
        blocks = diagonal_in + chunk * 2048 + i * 32 + j % 32
        X = tl.load(blocks, mask=i // 32 == j // 32, other=0.0)
        X = X.to(tl.float32) - tl.dot(tl.dot(X, M).to(X.dtype), X)
        store_state(Tb_out + chunk * C * C, X, 0, 0, C, C, C, C)
