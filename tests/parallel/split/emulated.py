"""FP8's rounding without FP8: operands of the GEMMs that would run in it, rounded as --fp8-recipe tensorwise does.

For machines without a GPU, on any number of ranks: Megatron's own linears do the products and the communication. Scales
are of this rank's tensors, powers of two, so that bf16 holds the rounded values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from megatron_hybrid.tools.gpu_bench.rounding import IN_FP8


def rounded(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x as `dtype` holds it when its largest value is scaled by a power of two to near the largest of the format."""
    amax = x.detach().abs().max().float().clamp(min=1e-30)
    scale = torch.exp2(torch.floor(torch.log2(torch.finfo(dtype).max / amax)))
    return ((x.float() * scale).to(dtype).float() / scale).to(x.dtype)


class _Operand(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return rounded(x, torch.float8_e4m3fn)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        return grads[0]


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: torch.Tensor) -> torch.Tensor:
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        return rounded(grads[0], torch.float8_e5m2)


def round_operands(model: torch.nn.Module) -> int:
    """Of Megatron's linears in this model of local modules. Returns of how many."""
    linears = [module for name, module in model.named_modules() if name.rpartition(".")[2] in IN_FP8]

    def rounding(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def forward(input: torch.Tensor, weight: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            return _Product.apply(original(_Operand.apply(input), _Operand.apply(weight), *args, **kwargs))

        return forward

    for linear in linears:
        linear._forward_impl = rounding(linear._forward_impl)
    return len(linears)
