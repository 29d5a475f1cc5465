"""Forward: state scan of the gated delta rule, norm of its output. Letters as in triton_tiles.py.

Formulas in triton_prepare.py.

The state is held transposed, V x K: a warpgroup matrix instruction wants 64 rows and takes any multiple of 8 columns,
so V is what is cut in blocks of rows and K = 96 costs exactly 96 columns. Every product of the recurrence then has its
left operand in registers.
"""

import triton
import triton.language as tl

from megatron_hybrid.kernels.triton_tiles import (
    load_block,
    load_pair,
    load_state,
    load_state_fp32,
    load_tile,
    locate_document,
    sigmoid_fp32,
    store_columns,
    store_state,
    store_state_fp32,
    store_tile,
)


@triton.jit(do_not_specialize=["T", "chunk0", "count"])
def scan_kernel(
    q_in, k_in, v_in, Tb_in, P_in, factors_in, initial, o_out, h_out, u_out, every_out, final,
    bounds, chunk_start, seg_doc, seg_start, T, chunk0, count, v_sb, v_st, v_sh,
    H: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    KA: tl.constexpr, KB: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    SEGMENT: tl.constexpr, EVERY: tl.constexpr, INITIAL: tl.constexpr, FINAL: tl.constexpr, PACKED: tl.constexpr,
    OUT: tl.constexpr, STATES: tl.constexpr, VALUES: tl.constexpr, MAP: tl.constexpr,
):  # fmt: skip
    """The recurrence, BV columns of V per program. Writes what is asked for: with OUT the output o [B * T, H, V], with
    STATES the state h [NC, H, V, K] entering each chunk, with VALUES the new values u [B * T, H, V].

    MAP: no values enter and the state starts as the identity, V = K, so that `final` is what the document does to any
    state.

    SEGMENT 0: one program runs `count` chunks of a document, or all there are, from chunk0 and the state `initial`
    [N, H, K, V] fp32 on (zeros unless INITIAL), and writes the state entering every EVERY-th chunk to every_out when
    EVERY > 0, and the last one to `final` [N, H, K, V] fp32 when FINAL.
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
        skipped = chunk0
    b, bos, length, first_chunk = locate_document(n, T, bounds, chunk_start, PACKED, C)
    num_chunks = tl.minimum(tl.cdiv(length, C) - skipped, count)
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
    factors = factors_in + chunk * C * 4
    decay = -tl.load(factors + (C - 1) * 2, mask=num_chunks > 0, other=0.0)  # ahead by hand: alone it is not pipelined
    for c in range(num_chunks):
        left = length - start - c * C
        next_decay = tl.load(factors + H * C * 4 + (C - 1) * 2, mask=c + 1 < num_chunks, other=0.0)
        k0 = load_tile(k, Hk * K, left, 0, C, KA, K)
        k1 = load_tile(k, Hk * K, left, KA, C, KB, K)
        Tb = tl.load(Tb_row)
        minus_gam, beta = load_pair(factors, C)
        s0_low, s1_low = s0.to(dtype), s1.to(dtype)
        if STATES:
            store_state(h, s0_low, col, 0, BV, KA, V, K)
            store_state(h, s1_low, col, KA, BV, KB, V, K)
        if EVERY > 0 and SEGMENT == 0 and (skipped + c) % EVERY == 0:
            saved = every_out + ((i_e + (skipped + c) // EVERY) * H + i_h) * K * V
            store_state(saved, s0, col, 0, BV, KA, V, K)
            store_state(saved, s1, col, KA, BV, KB, V, K)
        from_state = tl.dot(s1_low, tl.trans(k1), tl.dot(s0_low, tl.trans(k0)))
        from_state = (from_state * minus_gam[None, :]).to(dtype)
        if MAP:
            u = tl.dot(from_state, tl.trans(Tb))
        else:
            # v goes to the matrix unit from shared memory: transposing it in registers kept its load from being ahead.
            v_c = load_block(v, v_st, left, col, C, BV, V)
            u = tl.dot(from_state, tl.trans(Tb), tl.dot(tl.trans(v_c), tl.trans(Tb)))
        u *= beta[None, :]
        dec, from_out = load_pair(factors + C * 2, C)
        if VALUES:
            store_columns(u_row, u, H * V, left, col, C, BV, V)
        if OUT:
            q0 = load_tile(q, Hk * K, left, 0, C, KA, K)
            q1 = load_tile(q, Hk * K, left, KA, C, KB, K)
            o = tl.dot(s1_low, tl.trans(q1), tl.dot(s0_low, tl.trans(q0)))
            o = tl.dot(u.to(dtype), tl.trans(tl.load(P_row)), o * from_out[None, :])
            store_columns(o_row, o, H * V, left, col, C, BV, V)
        written = (u * dec[None, :]).to(dtype)
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
        factors += H * C * 4
        decay = -next_decay
    if FINAL:
        store_state_fp32(final + state, s0, col, 0, BV, KA, V, K)
        store_state_fp32(final + state, s1, col, KA, BV, KB, V, K)


@triton.jit(do_not_specialize=["T", "row0", "rows"])
def norm_kernel(
    o_in, z_in, norm_w, y_out, T, row0, rows, eps, z_sb, z_st, z_sh,
    H: tl.constexpr, V: tl.constexpr, VA: tl.constexpr, VB: tl.constexpr, R: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    """Gated RMSNorm (no gate unless GATE) of o_in [B * T * H, V], R of the rows from row0 to rows. y_out may be the
    memory of o_in."""
    first = row0 + tl.program_id(0) * R
    left = rows - first
    o = o_in + first.to(tl.int64) * V
    o0 = load_tile(o, V, left, 0, R, VA, V).to(tl.float32)
    o1 = load_tile(o, V, left, VA, R, VB, V).to(tl.float32)
    rstd = tl.rsqrt((tl.sum(o0 * o0, 1) + tl.sum(o1 * o1, 1)) / V + eps)
    c0 = tl.arange(0, VA)
    c1 = VA + tl.arange(0, VB)
    o0 *= rstd[:, None] * tl.load(norm_w + c0, mask=c0 < V, other=0.0).to(tl.float32)[None, :]
    o1 *= rstd[:, None] * tl.load(norm_w + c1, mask=c1 < V, other=0.0).to(tl.float32)[None, :]
    if GATE:
        row = first + tl.arange(0, R)
        b, t, i_h = (row // H // T).to(tl.int64), (row // H % T).to(tl.int64), (row % H).to(tl.int64)
        z = (z_in + b * z_sb + t * z_st + i_h * z_sh)[:, None]
        inside = (row < rows)[:, None]
        z0 = tl.load(z + c0[None, :], mask=inside & (c0 < V)[None, :], other=0.0).to(tl.float32)
        z1 = tl.load(z + c1[None, :], mask=inside & (c1 < V)[None, :], other=0.0).to(tl.float32)
        o0 *= z0 * sigmoid_fp32(z0)
        o1 *= z1 * sigmoid_fp32(z1)
    y = y_out + first.to(tl.int64) * V
    store_tile(y, o0, V, left, 0, R, VA, V)
    store_tile(y, o1, V, left, VA, R, VB, V)
