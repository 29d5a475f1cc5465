"""State scan and output of the gated delta rule, forward. Letters as in triton_tiles.py, formulas in triton_prepare.py.

The state is held transposed, V x K: a warpgroup matrix instruction wants 64 rows and takes any multiple of 8 columns,
so V is what is cut in blocks of rows and K = 96 costs exactly 96 columns. Every product of the recurrence then has its
left operand in registers.
"""

import triton
import triton.language as tl

from megatron_hybrid.kernels.triton_tiles import (
    exp_fp32,
    load_block,
    load_state,
    load_state_fp32,
    load_tile,
    locate_chunk,
    locate_document,
    sigmoid_fp32,
    store_block,
    store_columns,
    store_state,
    store_state_fp32,
)


@triton.jit(do_not_specialize=["T"])
def scan_kernel(
    q_in, k_in, v_in, Tb_in, P_in, G_in, beta_in, initial, o_out, h_out, u_out, every_out, final,
    bounds, chunk_start, seg_doc, seg_start, T, scale, v_sb, v_st, v_sh,
    H: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    KA: tl.constexpr, KB: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    SEGMENT: tl.constexpr, EVERY: tl.constexpr, INITIAL: tl.constexpr, FINAL: tl.constexpr, PACKED: tl.constexpr,
    OUT: tl.constexpr, STATES: tl.constexpr, VALUES: tl.constexpr, MAP: tl.constexpr,
):  # fmt: skip
    """The recurrence, BV columns of V per program. Writes what is asked for: with OUT the output o [B * T, H, V], with
    STATES the state h [NC, H, V, K] entering each chunk, with VALUES the new values u [B * T, H, V].

    MAP: no values enter and the state starts as the identity, V = K, so that `final` is what the document does to any
    state.

    SEGMENT 0: one program runs a whole document from `initial` [N, H, K, V] fp32 (zeros unless INITIAL), and writes
    the state entering every EVERY-th chunk to every_out when EVERY > 0, and `final` [N, H, K, V] fp32 when FINAL.
    SEGMENT s: one program runs s chunks from the state every_out holds, so that all of them run side by side.
    """
    NV: tl.constexpr = (V + BV - 1) // BV
    i_v = tl.program_id(0) % NV
    i_h = (tl.program_id(0) // NV) % H
    i_s = tl.program_id(0) // (NV * H)
    col = i_v * BV
    if SEGMENT > 0:
        if PACKED:
            n = tl.load(seg_doc + i_s)
            skipped = (i_s - tl.load(seg_start + n)) * SEGMENT
        else:
            per_row = tl.cdiv(T, C * SEGMENT)
            n = i_s // per_row
            skipped = (i_s % per_row) * SEGMENT
    else:
        n = i_s
        skipped = 0
    b, bos, length, first_chunk = locate_document(n, T, bounds, chunk_start, PACKED, C)
    num_chunks = tl.cdiv(length, C) - skipped
    first_chunk += skipped
    start = skipped * C
    state = (n.to(tl.int64) * H + i_h) * K * V
    if SEGMENT > 0:
        num_chunks = tl.minimum(num_chunks, SEGMENT)
        if num_chunks <= 0:
            return
        saved = every_out + (i_s.to(tl.int64) * H + i_h) * K * V
        s0 = load_state(saved, col, 0, BV, KA, V, K).to(tl.float32)
        s1 = load_state(saved, col, KA, BV, KB, V, K).to(tl.float32)
    elif MAP:
        rows = col + tl.arange(0, BV)[:, None]
        s0 = tl.where(rows == tl.arange(0, KA)[None, :], 1.0, 0.0)
        s1 = tl.where(rows == KA + tl.arange(0, KB)[None, :], 1.0, 0.0)
    elif INITIAL:
        s0 = load_state_fp32(initial + state, col, 0, BV, KA, V, K)
        s1 = load_state_fp32(initial + state, col, KA, BV, KB, V, K)
    else:
        s0 = tl.zeros([BV, KA], dtype=tl.float32)
        s1 = tl.zeros([BV, KB], dtype=tl.float32)
    if EVERY > 0 and SEGMENT == 0:
        if PACKED:
            i_e = tl.load(seg_start + n).to(tl.int64)
        else:
            i_e = n.to(tl.int64) * tl.cdiv(T, C * EVERY)
    Hk: tl.constexpr = H // GROUP
    dtype = k_in.dtype.element_ty
    r = tl.arange(0, C)
    row = b * T + bos + start
    k = k_in + (row * Hk + i_h // GROUP) * K
    v = v_in + b * v_sb + (bos + start) * v_st + i_h.to(tl.int64) * v_sh
    q = q_in + (row * Hk + i_h // GROUP) * K
    o_row, u_row = o_out + (row * H + i_h) * V, u_out + (row * H + i_h) * V
    chunk = first_chunk * H + i_h
    h = h_out + chunk * V * K
    square = chunk * C * C + r[:, None] * C + r[None, :]
    Tb_row, P_row = Tb_in + square, P_in + square
    G_row = G_in + chunk * C
    beta_row = beta_in + chunk * C
    for c in range(num_chunks):
        left = length - start - c * C
        k0 = load_tile(k, Hk * K, left, 0, C, KA, K)
        k1 = load_tile(k, Hk * K, left, KA, C, KB, K)
        Tb = tl.load(Tb_row)
        G = tl.load(G_row + r)
        G_end = tl.load(G_row + C - 1)
        s0_low, s1_low = s0.to(dtype), s1.to(dtype)
        if STATES:
            store_state(h, s0_low, col, 0, BV, KA, V, K)
            store_state(h, s1_low, col, KA, BV, KB, V, K)
        if EVERY > 0 and SEGMENT == 0 and c % EVERY == 0:
            saved = every_out + ((i_e + c // EVERY) * H + i_h) * K * V
            store_state(saved, s0, col, 0, BV, KA, V, K)
            store_state(saved, s1, col, KA, BV, KB, V, K)
        from_state = tl.dot(s1_low, tl.trans(k1), tl.dot(s0_low, tl.trans(k0)))
        from_state = (from_state * -exp_fp32(G)[None, :]).to(dtype)
        if MAP:
            u = tl.dot(from_state, tl.trans(Tb))
        else:
            # v goes to the matrix unit from shared memory: transposing it in registers kept its load from being ahead.
            v_c = load_block(v, v_st, left, col, C, BV, V)
            u = tl.dot(from_state, tl.trans(Tb), tl.dot(tl.trans(v_c), tl.trans(Tb)))
        u *= tl.load(beta_row + r)[None, :]
        if VALUES:
            store_columns(u_row, u, H * V, left, col, C, BV, V)
        if OUT:
            q0 = load_tile(q, Hk * K, left, 0, C, KA, K)
            q1 = load_tile(q, Hk * K, left, KA, C, KB, K)
            o = tl.dot(s1_low, tl.trans(q1), tl.dot(s0_low, tl.trans(q0)))
            o = tl.dot(u.to(dtype), tl.trans(tl.load(P_row)), o * (scale * exp_fp32(G))[None, :])
            store_columns(o_row, o, H * V, left, col, C, BV, V)
        written = (u * exp_fp32(G_end - G)[None, :]).to(dtype)
        decay = exp_fp32(G_end)
        s0 = tl.dot(written, k0, s0 * decay)
        s1 = tl.dot(written, k1, s1 * decay)
        q += C * Hk * K
        k += C * Hk * K
        v += C * v_st.to(tl.int64)
        o_row += C * H * V
        u_row += C * H * V
        h += H * V * K
        Tb_row += H * C * C
        P_row += H * C * C
        G_row += H * C
        beta_row += H * C
    if FINAL:
        store_state_fp32(final + state, s0, col, 0, BV, KA, V, K)
        store_state_fp32(final + state, s1, col, KA, BV, KB, V, K)


@triton.jit
def output_tile(
    q0, q1, P, decay, h, u, stride, left, col,
    C: tl.constexpr, BV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, KA: tl.constexpr, KB: tl.constexpr,
):  # fmt: skip
    """Columns col ... col + BV of the output of one chunk in fp32; decay is scale exp(G)."""
    h0 = load_state(h, col, 0, BV, KA, V, K)
    h1 = load_state(h, col, KA, BV, KB, V, K)
    from_state = tl.dot(q1, tl.trans(h1), tl.dot(q0, tl.trans(h0)))
    return tl.dot(P, load_block(u, stride, left, col, C, BV, V), from_state * decay[:, None])


@triton.jit(do_not_specialize=["T"])
def output_kernel(
    q_in, P_in, G_in, h_in, u_in, z_in, norm_w, out, bounds, chunk_doc, chunk_start, T, scale, eps, z_sb, z_st, z_sh,
    H: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    KA: tl.constexpr, KB: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    GATE: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Output of one chunk and head, all V columns, through the gated RMSNorm over them (no gate unless GATE).

    The norm needs all columns before the first is written: they are computed twice, the second time from what is
    still in cache, so that few registers are held and several chunks share a multiprocessor. Normalising what the
    scan wrote instead is as fast, and rounds o once more: that alone takes y past the bound of 0.005.
    """
    i_c = tl.program_id(0) // H
    i_h = tl.program_id(0) % H
    _n, b, bos, t0, length = locate_chunk(i_c, T, bounds, chunk_doc, chunk_start, PACKED, C)
    if t0 >= length:
        return
    left = length - t0
    row = b * T + bos + t0
    Hk: tl.constexpr = H // GROUP
    NV: tl.constexpr = (V + BV - 1) // BV
    r = tl.arange(0, C)
    chunk = i_c.to(tl.int64) * H + i_h
    q = q_in + (row * Hk + i_h // GROUP) * K
    q0 = load_tile(q, Hk * K, left, 0, C, KA, K)
    q1 = load_tile(q, Hk * K, left, KA, C, KB, K)
    P = tl.load(P_in + chunk * C * C + r[:, None] * C + r[None, :])
    decay = scale * exp_fp32(tl.load(G_in + chunk * C + r))
    h = h_in + chunk * V * K
    u = u_in + (row * H + i_h) * V
    y = out + (row * H + i_h) * V
    squares = tl.zeros([C], dtype=tl.float32)
    for i_v in range(NV):
        o = output_tile(q0, q1, P, decay, h, u, H * V, left, i_v * BV, C, BV, K, V, KA, KB)
        squares += tl.sum(o * o, 1)
    rstd = tl.rsqrt(squares / V + eps)
    for i_v in range(NV):
        o = output_tile(q0, q1, P, decay, h, u, H * V, left, i_v * BV, C, BV, K, V, KA, KB)
        c = i_v * BV + tl.arange(0, BV)
        o *= rstd[:, None] * tl.load(norm_w + c, mask=c < V, other=0.0).to(tl.float32)[None, :]
        if GATE:
            z = z_in + b * z_sb + (bos + t0) * z_st + i_h.to(tl.int64) * z_sh
            z_v = load_block(z, z_st, left, i_v * BV, C, BV, V).to(tl.float32)
            o *= z_v * sigmoid_fp32(z_v)
        store_block(y, o, H * V, left, i_v * BV, C, BV, V)
