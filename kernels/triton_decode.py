"""One token at a time, for generation: convolution, gates, state update and gated norm in one kernel per token.

Letters as in triton_tiles.py.
"""

import triton
import triton.language as tl

from megatron_hybrid.kernels.triton_tiles import exp_fp32, sigmoid_fp32, softplus_fp32


@triton.jit
def convolved(x, window, weight, channel, BD: tl.constexpr, D: tl.constexpr, W: tl.constexpr):
    """silu(conv) of D channels from `channel`, for the current inputs x and the W - 1 before in window [D, W-1]."""
    c = tl.arange(0, BD)
    inside = c < D
    c += channel
    total = tl.load(x + c, mask=inside, other=0.0).to(tl.float32)
    total *= tl.load(weight + c * W + W - 1, mask=inside, other=0.0).to(tl.float32)
    for j in tl.static_range(W - 1):
        past = tl.load(window + c * (W - 1) + j, mask=inside, other=0.0).to(tl.float32)
        total += past * tl.load(weight + c * W + j, mask=inside, other=0.0).to(tl.float32)
    return total * sigmoid_fp32(total)


@triton.jit
def decode_kernel(
    x_in, window_in, weight, ab_in, A_log, dt_bias, norm_w, state, y_out, scale, l2_eps, norm_eps, x_sb, ab_sb,
    Hk: tl.constexpr, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    W: tl.constexpr, BETA_MAX: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    """One row and value head. state [B, H, K, V] fp32 is updated in place; x_in rows hold q, k, v and, with GATE, z."""
    b = (tl.program_id(0) // H).to(tl.int64)
    i_h = tl.program_id(0) % H
    i_k = i_h // (H // Hk)
    D: tl.constexpr = 2 * Hk * K + H * V
    x = x_in + b * x_sb
    window = window_in + b * D * (W - 1)
    q = convolved(x, window, weight, i_k * K, BK, K, W)
    k = convolved(x, window, weight, (Hk + i_k) * K, BK, K, W)
    v = convolved(x, window, weight, 2 * Hk * K + i_h * V, BV, V, W)
    q *= tl.rsqrt(tl.sum(q * q, 0) + l2_eps)
    k *= tl.rsqrt(tl.sum(k * k, 0) + l2_eps)
    a = tl.load(ab_in + b * ab_sb + i_h).to(tl.float32) + tl.load(dt_bias + i_h).to(tl.float32)
    decay = exp_fp32(-exp_fp32(tl.load(A_log + i_h).to(tl.float32)) * softplus_fp32(a))
    beta = BETA_MAX * sigmoid_fp32(tl.load(ab_in + b * ab_sb + H + i_h).to(tl.float32))
    i, j = tl.arange(0, BK)[:, None], tl.arange(0, BV)[None, :]
    at = state + (b * H + i_h) * K * V + i * V + j
    inside = (i < K) & (j < V)
    S = tl.load(at, mask=inside, other=0.0) * decay
    S += k[:, None] * (beta * (v - tl.sum(k[:, None] * S, 0)))[None, :]
    tl.store(at, S, mask=inside)
    o = scale * tl.sum(q[:, None] * S, 0)
    c = tl.arange(0, BV)
    y = o * tl.rsqrt(tl.sum(o * o, 0) / V + norm_eps) * tl.load(norm_w + c, mask=c < V, other=0.0).to(tl.float32)
    if GATE:
        z = tl.load(x + D + i_h * V + c, mask=c < V, other=0.0).to(tl.float32)
        y *= z * sigmoid_fp32(z)
    tl.store(y_out + (b * H + i_h) * V + c, y.to(y_out.dtype.element_ty), mask=c < V)
