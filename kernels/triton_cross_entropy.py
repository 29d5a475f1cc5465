"""Softmax over the vocabulary for the loss: logsumexp and the gradient of logits, each in one pass over them.

Letters: n tokens, R vocabulary columns of this rank. Arithmetic is in fp32; logits may have any row stride.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Columns of a program, at a time; a warp has 512 of them.
BLOCK, WARPS = 4096, 8
#: The lowest fp32 number: unlike -inf it can be subtracted from itself.
LOWEST = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def logsumexp_kernel(logits, local, logsumexp_out, picked_out, stride, R, BLOCK: tl.constexpr):
    """logsumexp [n] of one row, and the logit [n] of its label, 0 where local [n] is -1."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    largest = tl.full([BLOCK], LOWEST, dtype=tl.float32)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for first in range(0, R, BLOCK):
        c = first + tl.arange(0, BLOCK)
        x = tl.load(logits + c, mask=c < R, other=LOWEST).to(tl.float32)
        # NaN must not be lost in the maximum: it comes into the sum by x.
        larger = tl.maximum(largest, x)
        total = total * tl.exp(largest - larger) + tl.exp(x - larger)
        largest = larger
    top = tl.max(largest, 0)
    tl.store(logsumexp_out + row, top + tl.log(tl.sum(total * tl.exp(largest - top), 0)))
    label = tl.load(local + row)
    picked = tl.load(logits + label, mask=label >= 0, other=0.0).to(tl.float32)
    tl.store(picked_out + row, picked)


@triton.jit
def logits_gradient_kernel(
    logits, local, logsumexp, grad_losses, grad_logsumexp, out, stride, out_stride, R, BLOCK: tl.constexpr
):
    """BLOCK columns of one row: softmax (both gradients), minus the loss's gradient at the label. out may be logits."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    loss = tl.load(grad_losses + row)
    both = loss + tl.load(grad_logsumexp + row)
    x = tl.load(logits + row * stride + c, mask=c < R, other=LOWEST).to(tl.float32)
    gradient = tl.exp(x - tl.load(logsumexp + row)) * both - tl.where(c == tl.load(local + row), loss, 0.0)
    tl.store(out + row * out_stride + c, gradient.to(out.dtype.element_ty), mask=c < R)


def logsumexp_and_picked(logits: Tensor, local: Tensor) -> tuple[Tensor, Tensor]:
    """Both fp32 [n]. logits [n, R], rows dense; local [n] int64: the label's column, -1 where it is none of these."""
    logsumexp, picked = torch.empty(2, len(local), dtype=torch.float32, device=logits.device)
    if len(local):
        logsumexp_kernel[(len(local),)](
            logits, local, logsumexp, picked, logits.stride(0), logits.shape[1], BLOCK=BLOCK, num_warps=WARPS
        )
    return logsumexp, picked


def logits_gradient(
    logits: Tensor, local: Tensor, logsumexp: Tensor, grad_losses: Tensor, grad_logsumexp: Tensor, out: Tensor
) -> None:
    """Writes the gradient of logits [n, R] to out [n, R], which may be logits; the others are [n]."""
    n, R = logits.shape
    if n:
        logits_gradient_kernel[(n, triton.cdiv(R, BLOCK))](
            logits, local, logsumexp.contiguous(), grad_losses.contiguous(), grad_logsumexp.contiguous(), out,
            logits.stride(0), out.stride(0), R, BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip
