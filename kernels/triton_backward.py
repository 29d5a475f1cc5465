"""Gradients of the gated delta rule in solve-adjoint form.

Letters as in triton_tiles.py, formulas in triton_prepare.py.

With dS the gradient of the state leaving a chunk, gam = exp(G) and dec = exp(G_C - G):

    dU = P^T dO + diag(dec) K dS          dR = Tb^T (beta dU), which is dV
    dS entering = gam_C dS + scale (diag(gam) Q)^T dO - (diag(gam) K)^T dR
    dQ = scale diag(gam) dO S^T + dP K    dP = scale Gam o lower(dO U^T)
    dK = diag(dec) U dS^T - diag(gam) dR S^T + dP^T Q + (dN + dN^T) K,   dN = -Gam o strict_lower(dR U^T)
    dx_i = (1 - beta_i / m) dR_i.U_i / beta_i      for beta = m sigmoid(x): both terms of the textbook form at once

dN is the whole gradient through the inverse, so nothing is inverted or multiplied by Tb twice. The scan needs only its
own columns of V; the gradients of q and k need all of them and no order. The gate's gradient is taken directly, term by
term: the shorter identity dG_i = q_i.dq_i - v_i.dv_i cancels for heads that decay fast.
"""

import triton
import triton.language as tl

from megatron_hybrid.kernels.triton_tiles import (
    exp_fp32,
    load_block,
    load_pairs,
    load_state,
    load_state_fp32,
    load_tile,
    locate_chunk,
    locate_document,
    sigmoid_fp32,
    softplus_fp32,
    store_columns,
    store_state,
    store_state_fp32,
    store_tile,
)


@triton.jit
def gated_norm_backward(o, z, dy, w, rstd, GATE: tl.constexpr):
    """(gradient of o * rstd, gradient of z, gradient of the weight before its sum over tokens)."""
    normalised = o * rstd[:, None]
    dn = dy * w[None, :]
    if GATE:
        gate = sigmoid_fp32(z)
        silu = z * gate
        return dn * silu, dn * normalised * (gate + silu * (1.0 - gate)), dy * silu * normalised
    else:
        return dn, dn, dy * normalised


@triton.jit(do_not_specialize=["T"])
def norm_backward_kernel(
    o_in, z_in, dy_in, norm_w, do_out, dz_out, dw_out, bounds, chunk_doc, chunk_start, T, eps,
    z_sb, z_st, z_sh, dy_sb, dy_st, dy_sh, dz_sb, dz_st, dz_sh,
    H: tl.constexpr, V: tl.constexpr, VA: tl.constexpr, VB: tl.constexpr, C: tl.constexpr, R: tl.constexpr,
    GATE: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Backward of the gated RMSNorm of one chunk and head, R tokens at a time. do_out may be o_in.

    dw_out [NC, H, V] fp32 holds the weight's gradient chunk by chunk: summed afterwards, in a fixed order.
    """
    i_c = tl.program_id(0) // H
    i_h = tl.program_id(0) % H
    _n, b, bos, t0, length = locate_chunk(i_c, T, bounds, chunk_doc, chunk_start, PACKED, C)
    c0 = tl.arange(0, VA)
    c1 = VA + tl.arange(0, VB)
    w0 = tl.load(norm_w + c0, mask=c0 < V, other=0.0).to(tl.float32)
    w1 = tl.load(norm_w + c1, mask=c1 < V, other=0.0).to(tl.float32)
    token = (b * T + bos + t0) * (H * V) + i_h * V
    o, do = o_in + token, do_out + token
    dy = dy_in + b * dy_sb + (bos + t0) * dy_st + i_h.to(tl.int64) * dy_sh
    z = z_in + b * z_sb + (bos + t0) * z_st + i_h.to(tl.int64) * z_sh
    dz = dz_out + b * dz_sb + (bos + t0) * dz_st + i_h.to(tl.int64) * dz_sh
    sum0 = tl.zeros([R, VA], dtype=tl.float32)
    sum1 = tl.zeros([R, VB], dtype=tl.float32)
    for first in range(0, tl.minimum(length - t0, C), R):
        left = length - t0 - first
        o0 = load_tile(o, H * V, left, 0, R, VA, V).to(tl.float32)
        o1 = load_tile(o, H * V, left, VA, R, VB, V).to(tl.float32)
        dy0 = load_tile(dy, dy_st, left, 0, R, VA, V).to(tl.float32)
        dy1 = load_tile(dy, dy_st, left, VA, R, VB, V).to(tl.float32)
        z0 = load_tile(z, z_st, left, 0, R, VA, V).to(tl.float32)
        z1 = load_tile(z, z_st, left, VA, R, VB, V).to(tl.float32)
        rstd = tl.rsqrt((tl.sum(o0 * o0, 1) + tl.sum(o1 * o1, 1)) / V + eps)
        dn0, dz0, dw0 = gated_norm_backward(o0, z0, dy0, w0, rstd, GATE)
        dn1, dz1, dw1 = gated_norm_backward(o1, z1, dy1, w1, rstd, GATE)
        along = (tl.sum(dn0 * o0, 1) + tl.sum(dn1 * o1, 1)) * rstd * rstd / V
        store_tile(do, (dn0 - o0 * along[:, None]) * rstd[:, None], H * V, left, 0, R, VA, V)
        store_tile(do, (dn1 - o1 * along[:, None]) * rstd[:, None], H * V, left, VA, R, VB, V)
        if GATE:
            store_tile(dz, dz0, dz_st, left, 0, R, VA, V)
            store_tile(dz, dz1, dz_st, left, VA, R, VB, V)
        sum0 += dw0
        sum1 += dw1
        o += R * H * V
        do += R * H * V
        dy += R * dy_st.to(tl.int64)
        z += R * z_st.to(tl.int64)
        dz += R * dz_st.to(tl.int64)
    dw = dw_out + (i_c.to(tl.int64) * H + i_h) * V
    tl.store(dw + c0, tl.sum(sum0, 0), mask=c0 < V)
    tl.store(dw + c1, tl.sum(sum1, 0), mask=c1 < V)


@triton.jit(do_not_specialize=["T"])
def adjoint_scan_kernel(
    scaled_q, k_in, Tb_in, P_in, factors_in, do_in, dfinal, ds_out, dr_out, dinitial,
    bounds, chunk_start, T, do_sb, do_st, do_sh,
    H: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    KA: tl.constexpr, KB: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    DFINAL: tl.constexpr, DINITIAL: tl.constexpr, STORE: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Backward through a document, last chunk first; BV columns of V per program, everything transposed.

    scaled_q [B * T, H, K] is scale exp(G) q; scaling do here instead costs more time, and a third more error in the
    gradients of the gates. With STORE writes ds [NC, H, V, K], the gradient of the state leaving each chunk, and dr
    [B * T, H, V], the gradient of v; with DINITIAL that of the state entering the document.
    """
    NV: tl.constexpr = (V + BV - 1) // BV
    i_v = tl.program_id(0) % NV
    i_h = (tl.program_id(0) // NV) % H
    n = tl.program_id(0) // (NV * H)
    col = i_v * BV
    b, bos, length, first_chunk = locate_document(n, T, bounds, chunk_start, PACKED, C)
    num_chunks = tl.cdiv(length, C)
    state = (n.to(tl.int64) * H + i_h) * K * V
    if DFINAL:
        d0 = load_state_fp32(dfinal + state, col, 0, BV, KA, V, K)
        d1 = load_state_fp32(dfinal + state, col, KA, BV, KB, V, K)
    else:
        d0 = tl.zeros([BV, KA], dtype=tl.float32)
        d1 = tl.zeros([BV, KB], dtype=tl.float32)
    Hk: tl.constexpr = H // GROUP
    dtype = k_in.dtype.element_ty
    r = tl.arange(0, C)
    last = tl.maximum(num_chunks - 1, 0).to(tl.int64)
    row = b * T + bos + last * C
    q = scaled_q + (row * H + i_h) * K
    k = k_in + (row * Hk + i_h // GROUP) * K
    do = do_in + b * do_sb + (bos + last * C) * do_st + i_h.to(tl.int64) * do_sh
    dr_row = dr_out + (row * H + i_h) * V
    chunk = (first_chunk + last) * H + i_h
    ds = ds_out + chunk * V * K
    square = chunk * C * C + r[:, None] * C + r[None, :]
    Tb_row, P_row = Tb_in + square, P_in + square
    factors = factors_in + chunk * C * 4
    decay = -tl.load(factors + (C - 1) * 2, mask=num_chunks > 0, other=0.0)  # ahead by hand: alone it is not pipelined
    for i in range(num_chunks):
        left = length - (num_chunks - 1 - i) * C
        next_decay = tl.load(factors - H * C * 4 + (C - 1) * 2, mask=i + 1 < num_chunks, other=0.0)
        q0 = load_tile(q, H * K, left, 0, C, KA, K)
        q1 = load_tile(q, H * K, left, KA, C, KB, K)
        k0 = load_tile(k, Hk * K, left, 0, C, KA, K)
        k1 = load_tile(k, Hk * K, left, KA, C, KB, K)
        do_t = tl.trans(load_block(do, do_st, left, col, C, BV, V))
        P = tl.load(P_row)
        Tb = tl.load(Tb_row)
        minus_gam, beta, dec, _ = load_pairs(factors, C)
        d0_low, d1_low = d0.to(dtype), d1.to(dtype)
        if STORE:
            store_state(ds, d0_low, col, 0, BV, KA, V, K)
            store_state(ds, d1_low, col, KA, BV, KB, V, K)
        du = tl.dot(d1_low, tl.trans(k1), tl.dot(d0_low, tl.trans(k0)))
        du = tl.dot(do_t, P, du * dec[None, :])
        dr = tl.dot((du * beta[None, :]).to(dtype), Tb)
        if STORE:
            store_columns(dr_row, dr, H * V, left, col, C, BV, V)
        dr_decayed = (dr * minus_gam[None, :]).to(dtype)
        d0 = tl.dot(dr_decayed, k0, tl.dot(do_t, q0, d0 * decay))
        d1 = tl.dot(dr_decayed, k1, tl.dot(do_t, q1, d1 * decay))
        q -= C * H * K
        k -= C * Hk * K
        do -= C * do_st.to(tl.int64)
        dr_row -= C * H * V
        ds -= H * V * K
        Tb_row -= H * C * C
        P_row -= H * C * C
        factors -= H * C * 4
        decay = -next_decay
    if DINITIAL:
        store_state_fp32(dinitial + state, d0, col, 0, BV, KA, V, K)
        store_state_fp32(dinitial + state, d1, col, KA, BV, KB, V, K)


@triton.jit
def unnormalised(dx0, dx1, x0, x1, rstd):
    """Gradient through x = rstd * raw, rstd = (sum(raw^2) + eps)^-1/2."""
    along = tl.sum(dx0 * x0, 1) + tl.sum(dx1 * x1, 1)
    return (dx0 - x0 * along[:, None]) * rstd[:, None], (dx1 - x1 * along[:, None]) * rstd[:, None]


@triton.jit
def query_gradient(
    do, do_st, u, h, q, k, P, dP_out, G_row, rstd, dq, left, scale,
    H: tl.constexpr, Hk: tl.constexpr, K: tl.constexpr, V: tl.constexpr, KA: tl.constexpr, KB: tl.constexpr,
    BV: tl.constexpr, C: tl.constexpr, L2NORM: tl.constexpr,
):  # fmt: skip
    """Writes dq and dP. Returns the gradient of G through scores and output."""
    dq0 = tl.zeros([C, KA], dtype=tl.float32)
    dq1 = tl.zeros([C, KB], dtype=tl.float32)
    do_u = tl.zeros([C, C], dtype=tl.float32)
    for i_v in range((V + BV - 1) // BV):
        do_v = load_block(do, do_st, left, i_v * BV, C, BV, V)
        u_v = load_block(u, H * V, left, i_v * BV, C, BV, V)
        dq0 = tl.dot(do_v, load_state(h, i_v * BV, 0, BV, KA, V, K), dq0)
        dq1 = tl.dot(do_v, load_state(h, i_v * BV, KA, BV, KB, V, K), dq1)
        do_u = tl.dot(do_v, tl.trans(u_v), do_u)
    r = tl.arange(0, C)
    i, j = r[:, None], r[None, :]
    G = tl.load(G_row + r)
    inside = i >= j
    lower = tl.where(inside, exp_fp32(tl.where(inside, G[:, None] - G[None, :], 0.0)), 0.0)
    dP = (do_u * lower * scale).to(q.dtype.element_ty)
    tl.store(dP_out + i * C + j, dP)
    by_G = do_u * tl.load(P + i * C + j).to(tl.float32)
    dG = tl.sum(by_G, 1) - tl.sum(by_G, 0)
    k0 = load_tile(k, Hk * K, left, 0, C, KA, K)
    k1 = load_tile(k, Hk * K, left, KA, C, KB, K)
    q0 = load_tile(q, Hk * K, left, 0, C, KA, K)
    q1 = load_tile(q, Hk * K, left, KA, C, KB, K)
    from_state = (scale * exp_fp32(G))[:, None]
    dq0, dq1 = dq0 * from_state, dq1 * from_state
    dG += tl.sum(q0 * dq0, 1) + tl.sum(q1 * dq1, 1)
    dq0, dq1 = tl.dot(dP, k0, dq0), tl.dot(dP, k1, dq1)
    if L2NORM:
        dq0, dq1 = unnormalised(dq0, dq1, q0, q1, tl.load(rstd + r))
    store_tile(dq, dq0, H * K, left, 0, C, KA, K)
    store_tile(dq, dq1, H * K, left, KA, C, KB, K)
    return dG


@triton.jit
def key_gradient(
    u, dr, h, ds, q, k, dP, D, G_row, rstd, dk, left,
    H: tl.constexpr, Hk: tl.constexpr, K: tl.constexpr, V: tl.constexpr, KA: tl.constexpr, KB: tl.constexpr,
    BV: tl.constexpr, C: tl.constexpr, L2NORM: tl.constexpr,
):  # fmt: skip
    """Writes dk. Returns the gradient of G through the state, and what of it belongs to the last token."""
    write0 = tl.zeros([C, KA], dtype=tl.float32)
    write1 = tl.zeros([C, KB], dtype=tl.float32)
    read0 = tl.zeros([C, KA], dtype=tl.float32)
    read1 = tl.zeros([C, KB], dtype=tl.float32)
    h_ds0 = tl.zeros([BV], dtype=tl.float32)
    h_ds1 = tl.zeros([BV], dtype=tl.float32)
    for i_v in range((V + BV - 1) // BV):
        u_v = load_block(u, H * V, left, i_v * BV, C, BV, V)
        dr_v = load_block(dr, H * V, left, i_v * BV, C, BV, V)
        h0 = load_state(h, i_v * BV, 0, BV, KA, V, K)
        h1 = load_state(h, i_v * BV, KA, BV, KB, V, K)
        ds0 = load_state(ds, i_v * BV, 0, BV, KA, V, K)
        ds1 = load_state(ds, i_v * BV, KA, BV, KB, V, K)
        write0 = tl.dot(u_v, ds0, write0)
        write1 = tl.dot(u_v, ds1, write1)
        read0 = tl.dot(dr_v, h0, read0)
        read1 = tl.dot(dr_v, h1, read1)
        h_ds0 += tl.sum(h0.to(tl.float32) * ds0.to(tl.float32), 1)
        h_ds1 += tl.sum(h1.to(tl.float32) * ds1.to(tl.float32), 1)
    r = tl.arange(0, C)
    G = tl.load(G_row + r)
    G_end = tl.load(G_row + C - 1)
    gam, dec = exp_fp32(G)[:, None], exp_fp32(G_end - G)[:, None]
    write0, write1 = write0 * dec, write1 * dec
    read0, read1 = read0 * -gam, read1 * -gam
    k0 = load_tile(k, Hk * K, left, 0, C, KA, K)
    k1 = load_tile(k, Hk * K, left, KA, C, KB, K)
    dG = tl.sum(k0 * (read0 - write0), 1) + tl.sum(k1 * (read1 - write1), 1)
    dG_end = tl.sum(k0 * write0) + tl.sum(k1 * write1) + exp_fp32(G_end) * tl.sum(h_ds0 + h_ds1)
    dk0, dk1 = write0 + read0, write1 + read1
    # dP^T Q, then D K: in a loop, since products in a chain are given to 8 warps another way, each row twice, and the
    # sums go through shared memory from one way to the other and back.
    transposed = r[None, :] * C + r[:, None]
    for part in range(2):
        scores = tl.load(tl.where(part == 0, dP, D) + transposed)
        x = tl.where(part == 0, q, k)
        dk0 = tl.dot(scores, load_tile(x, Hk * K, left, 0, C, KA, K), dk0)
        dk1 = tl.dot(scores, load_tile(x, Hk * K, left, KA, C, KB, K), dk1)
    if L2NORM:
        dk0, dk1 = unnormalised(dk0, dk1, k0, k1, tl.load(rstd + r))
    store_tile(dk, dk0, H * K, left, 0, C, KA, K)
    store_tile(dk, dk1, H * K, left, KA, C, KB, K)
    return dG, dG_end


@triton.jit(do_not_specialize=["T"])
def query_gradient_kernel(
    q_in, k_in, P_in, dP_out, G_in, u_in, h_in, do_in, rstd_q, dq_out, dG_out,
    bounds, chunk_doc, chunk_start, T, scale, do_sb, do_st, do_sh,
    H: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    KA: tl.constexpr, KB: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, L2NORM: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Of one chunk and head: gradients of q and of G through scores and output; dP [NC, H, C, C].

    Needs nothing of the adjoint scan, and runs beside it. dP goes to `key_gradient_kernel` through memory, which reads
    it transposed.
    """
    i_c = tl.program_id(0) // H
    i_h = tl.program_id(0) % H
    _n, b, bos, t0, length = locate_chunk(i_c, T, bounds, chunk_doc, chunk_start, PACKED, C)
    if t0 >= length:
        return
    left = length - t0
    row = b * T + bos + t0
    Hk: tl.constexpr = H // GROUP
    r = tl.arange(0, C)
    chunk = i_c.to(tl.int64) * H + i_h
    dG = query_gradient(
        do_in + b * do_sb + (bos + t0) * do_st + i_h.to(tl.int64) * do_sh, do_st,
        u_in + (row * H + i_h) * V, h_in + chunk * V * K,
        q_in + (row * Hk + i_h // GROUP) * K, k_in + (row * Hk + i_h // GROUP) * K,
        P_in + chunk * C * C, dP_out + chunk * C * C, G_in + chunk * C,
        rstd_q + (i_c.to(tl.int64) * Hk + i_h // GROUP) * C, dq_out + (row * H + i_h) * K,
        left, scale, H, Hk, K, V, KA, KB, BV, C, L2NORM,
    )  # fmt: skip
    tl.store(dG_out + chunk * C + r, dG)


@triton.jit(do_not_specialize=["T"])
def inverse_gradient_kernel(
    k_in, G_in, factors_in, u_in, dr_in, D_out, db_out, dG_out, bounds, chunk_doc, chunk_start, T, db_sb, db_st,
    H: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    KA: tl.constexpr, KB: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    BETA_MAX: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Of one chunk and head: gradients of b and of G through N; D = dN + dN^T [NC, H, C, C].

    D is symmetric. Its halves come from dR U^T and U dR^T, two products, because as an operand a transposed accumulator
    is wrong on Hopper (triton 3.6); and it goes to `key_gradient_kernel` through memory, since that has no registers
    left for it.
    """
    i_c = tl.program_id(0) // H
    i_h = tl.program_id(0) % H
    _n, b, bos, t0, length = locate_chunk(i_c, T, bounds, chunk_doc, chunk_start, PACKED, C)
    if t0 >= length:
        return
    left = length - t0
    row = b * T + bos + t0
    Hk: tl.constexpr = H // GROUP
    chunk = i_c.to(tl.int64) * H + i_h
    u = u_in + (row * H + i_h) * V
    dr = dr_in + (row * H + i_h) * V
    k = k_in + (row * Hk + i_h // GROUP) * K
    dr_u = tl.zeros([C, C], dtype=tl.float32)
    u_dr = tl.zeros([C, C], dtype=tl.float32)
    for i_v in range((V + BV - 1) // BV):
        u_v = load_block(u, H * V, left, i_v * BV, C, BV, V)
        dr_v = load_block(dr, H * V, left, i_v * BV, C, BV, V)
        dr_u = tl.dot(dr_v, tl.trans(u_v), dr_u)
        u_dr = tl.dot(u_v, tl.trans(dr_v), u_dr)
    r = tl.arange(0, C)
    i, j = r[:, None], r[None, :]
    G = tl.load(G_in + chunk * C + r)
    # Every exponent is of a sum of g <= 0 between two tokens.
    decay = exp_fp32(tl.where(i > j, G[:, None] - G[None, :], G[None, :] - G[:, None]))
    D = tl.where(i == j, 0.0, -decay * tl.where(i > j, dr_u, u_dr))
    store_state(D_out + chunk * C * C, D, 0, 0, C, C, C, C)
    k0 = load_tile(k, Hk * K, left, 0, C, KA, K)
    k1 = load_tile(k, Hk * K, left, KA, C, KB, K)
    kk = tl.dot(k1, tl.trans(k1), tl.dot(k0, tl.trans(k0)))
    tl.store(dG_out + chunk * C + r, tl.sum(tl.where(i > j, D, -D) * kk, 1))
    dr_dot_u = tl.sum(tl.where(i == j, dr_u, 0.0), 1)
    beta = tl.load(factors_in + chunk * C * 4 + r * 2 + 1)
    # sigmoid(b) = 0 exactly when b < -88: the limit of the gradient is 0 as well.
    db = (1.0 - beta / BETA_MAX) * tl.where(beta > 0.0, dr_dot_u / tl.where(beta > 0.0, beta, 1.0), 0.0)
    tl.store(db_out + b * db_sb + (bos + t0 + r) * db_st + i_h, db.to(db_out.dtype.element_ty), mask=r < left)


@triton.jit(do_not_specialize=["T", "num_chunks"])
def key_gradient_kernel(
    q_in, k_in, dP_in, D_in, G_in, by_scores, by_inverse, u_in, h_in, ds_in, dr_in, a_in, A_log, dt_bias, rstd_k,
    dk_out, da_out, dA_out, ddt_out, bounds, chunk_doc, chunk_start, T, num_chunks, a_sb, a_st, da_sb, da_st,
    H: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    KA: tl.constexpr, KB: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, L2NORM: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Gradients of k and a of one chunk and head; dA_log and ddt_bias chunk by chunk, [H, NC] fp32.

    by_scores and by_inverse are G's gradients from `query_gradient_kernel` and `inverse_gradient_kernel`.
    """
    i_c = tl.program_id(0) // H
    i_h = tl.program_id(0) % H
    _n, b, bos, t0, length = locate_chunk(i_c, T, bounds, chunk_doc, chunk_start, PACKED, C)
    partial = i_h * num_chunks + i_c
    if t0 >= length:
        tl.store(dA_out + partial, 0.0)
        tl.store(ddt_out + partial, 0.0)
        return
    left = length - t0
    row = b * T + bos + t0
    Hk: tl.constexpr = H // GROUP
    r = tl.arange(0, C)
    chunk = i_c.to(tl.int64) * H + i_h
    dG, dG_end = key_gradient(
        u_in + (row * H + i_h) * V, dr_in + (row * H + i_h) * V, h_in + chunk * V * K, ds_in + chunk * V * K,
        q_in + (row * Hk + i_h // GROUP) * K, k_in + (row * Hk + i_h // GROUP) * K,
        dP_in + chunk * C * C, D_in + chunk * C * C, G_in + chunk * C,
        rstd_k + (i_c.to(tl.int64) * Hk + i_h // GROUP) * C, dk_out + (row * H + i_h) * K,
        left, H, Hk, K, V, KA, KB, BV, C, L2NORM,
    )  # fmt: skip
    dG += tl.load(by_scores + chunk * C + r) + tl.load(by_inverse + chunk * C + r)
    dg = tl.cumsum(dG, 0, reverse=True) + dG_end
    valid = r < left
    x = tl.load(a_in + b * a_sb + (bos + t0 + r) * a_st + i_h, mask=valid, other=0.0).to(tl.float32)
    x += tl.load(dt_bias + i_h).to(tl.float32)
    decay_rate = -exp_fp32(tl.load(A_log + i_h).to(tl.float32))
    da = tl.where(valid, dg * decay_rate * sigmoid_fp32(x), 0.0)
    tl.store(dA_out + partial, tl.sum(tl.where(valid, dg * decay_rate * softplus_fp32(x), 0.0)))
    tl.store(ddt_out + partial, tl.sum(da))
    tl.store(da_out + b * da_sb + (bos + t0 + r) * da_st + i_h, da.to(da_out.dtype.element_ty), mask=valid)
