"""RMSNorm over all heads of a projection at once (OLMo's q/k norm), where the heads may be split over ranks.

Letters: n rows (s sequence x b batch), h heads of this rank, d head dim, D = h d. Arithmetic is in fp32, with one cast
at the end. Where ranks share a row, `stage` "sums" gives this rank's part of its sum, and "apply" takes the whole.
"""

from __future__ import annotations

from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

WARPS = 8
#: Programs that share the rows of the backward, each with a partial sum of the weight's gradient.
PROGRAMS = 512
Stage = Literal["sums", "apply", "whole"]


@triton.jit
def row_of(x, row, b, stride_s, stride_b):
    """Where a row of [s, b, h, d] begins."""
    return x + (row // b).to(tl.int64) * stride_s + (row % b).to(tl.int64) * stride_b


@triton.jit
def wide_norm_kernel(
    x_in, weight, squares, y_out, rstd_out, b, stride_s, stride_b, stride_h, width, eps,
    h: tl.constexpr, d: tl.constexpr, BLOCK: tl.constexpr, SUM: tl.constexpr, APPLY: tl.constexpr,
):  # fmt: skip
    """One row. SUM without APPLY writes its sum of squares to `squares`, APPLY without SUM reads it there."""
    row = tl.program_id(0)
    c = tl.arange(0, BLOCK)
    mask = c < h * d
    x = tl.load(row_of(x_in, row, b, stride_s, stride_b) + (c // d) * stride_h + c % d, mask=mask, other=0.0)
    x = x.to(tl.float32)
    if SUM:
        total = tl.sum(x * x, 0)
    else:
        total = tl.load(squares + row)
    if APPLY:
        rstd = tl.rsqrt(total / width + eps)
        y = x * rstd * tl.load(weight + c, mask=mask, other=0.0).to(tl.float32)
        tl.store(y_out + row.to(tl.int64) * (h * d) + c, y.to(y_out.dtype.element_ty), mask=mask)
        tl.store(rstd_out + row, rstd)
    else:
        tl.store(squares + row, total)


@triton.jit
def wide_norm_gradient_kernel(
    x_in, weight, rstd_in, dy_in, dots, dx_out, dw_out, rows, b, stride_s, stride_b, stride_h,
    dy_stride_s, dy_stride_b, dy_stride_h, width,
    h: tl.constexpr, d: tl.constexpr, BLOCK: tl.constexpr, SUM: tl.constexpr, APPLY: tl.constexpr,
):  # fmt: skip
    """Every PROGRAMS-th row. dots [n] is the sum of dy w x over a row; dw_out [programs, D] goes with SUM."""
    c = tl.arange(0, BLOCK)
    mask = c < h * d
    w = tl.load(weight + c, mask=mask, other=0.0).to(tl.float32)
    dw = tl.zeros([BLOCK], dtype=tl.float32)
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        x = tl.load(row_of(x_in, row, b, stride_s, stride_b) + (c // d) * stride_h + c % d, mask=mask, other=0.0)
        dy = row_of(dy_in, row, b, dy_stride_s, dy_stride_b) + (c // d) * dy_stride_h + c % d
        dy = tl.load(dy, mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_in + row)
        x = x.to(tl.float32)
        dn = dy * w
        if SUM:
            dot = tl.sum(dn * x, 0)
            dw += dy * x * rstd
        else:
            dot = tl.load(dots + row)
        if APPLY:
            dx = rstd * (dn - x * (dot * rstd * rstd / width))
            tl.store(dx_out + tl.cast(row, tl.int64) * (h * d) + c, dx.to(dx_out.dtype.element_ty), mask=mask)
        else:
            tl.store(dots + row, dot)
    if SUM:
        tl.store(dw_out + tl.program_id(0) * (h * d) + c, dw, mask=mask)


def norm(x: Tensor, weight: Tensor, squares: Tensor, width: int, eps: float, stage: Stage) -> tuple[Tensor, Tensor]:
    """(y [s, b, h, d], 1 / rms [n] fp32); with "sums" there is neither, but `squares` [n] fp32 is written.

    x [s, b, h, d], read where it is if its last dimension is dense; weight [D]; width: elements of a row on all ranks.
    """
    s, b, h, d = x.shape
    x = x if x.stride(-1) == 1 else x.contiguous()
    y, rstd = (x.new_empty(x.shape), torch.empty_like(squares)) if stage != "sums" else (squares, squares)
    wide_norm_kernel[(s * b,)](
        x, weight, squares, y, rstd, b, *x.stride()[:3], width, eps, h=h, d=d, BLOCK=triton.next_power_of_2(h * d),
        SUM=stage != "apply", APPLY=stage != "sums", num_warps=WARPS,
    )  # fmt: skip
    return y, rstd


def norm_gradient(
    x: Tensor, weight: Tensor, rstd: Tensor, dy: Tensor, dots: Tensor, width: int, stage: Stage
) -> tuple[Tensor, Tensor]:
    """(dx [s, b, h, d], dweight [D] fp32). "sums" writes `dots` [n] fp32 and only dweight, "apply" reads it for dx."""
    s, b, h, d = x.shape
    x, dy = (y if y.stride(-1) == 1 else y.contiguous() for y in (x, dy))
    programs = min(s * b, PROGRAMS)
    dx = x.new_empty(x.shape) if stage != "sums" else dots
    dw = torch.empty(programs, h * d, dtype=torch.float32, device=x.device) if stage != "apply" else dots
    wide_norm_gradient_kernel[(programs,)](
        x, weight, rstd, dy, dots, dx, dw, s * b, b, *x.stride()[:3], *dy.stride()[:3], width, h=h, d=d,
        BLOCK=triton.next_power_of_2(h * d), SUM=stage != "apply", APPLY=stage != "sums", num_warps=WARPS,
    )  # fmt: skip
    return dx, dw.sum(0)
