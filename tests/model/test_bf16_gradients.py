"""Gradients kept in bf16 beside those of fp32 parameters, and weight gradients added by the GEMM."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_hybrid.modules.fp32_parameters import one_dtype_at_a_time

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def _gradients(device: str) -> list[torch.Tensor]:
    """fp32 first, as the distributed optimizer orders them."""
    generator = torch.Generator(device).manual_seed(1)
    sizes = ((30, torch.float32), (0, torch.float32), (70_001, torch.bfloat16), (30, torch.float32))
    return [torch.randn(n, generator=generator, device=device).to(dtype) for n, dtype in sizes]


def test_a_fused_operation_sees_one_dtype_at_a_time() -> None:
    """As the fused kernels, which take every tensor for one of the first one's dtype, but with an error for it."""
    calls = []

    def applier(op: Any, overflow: Any, lists: list[list[torch.Tensor]], *args: Any) -> Any:
        assert all(len({tensor.dtype for tensor in row}) == 1 for row in lists)
        calls.append(len(lists[0]))
        return op(lists, *args)

    def norm(lists: list[list[torch.Tensor]]) -> Any:
        return torch.stack([x.float().norm() for x in lists[0]]).norm().view(1), None

    def scale(lists: list[list[torch.Tensor]], factor: float) -> None:
        for x, out in zip(*lists, strict=True):
            out.copy_(x * factor)

    grads, overflow = _gradients("cpu"), torch.zeros(1)
    apply = one_dtype_at_a_time(applier, norm)
    expected = torch.cat([x.float() for x in grads]).norm()
    torch.testing.assert_close(apply(norm, overflow, [grads])[0], expected.view(1))
    assert calls == [3, 1]
    before = [x.clone() for x in grads]
    assert apply(scale, overflow, [grads, grads], 0.5) is None
    assert all(torch.equal(x, old * 0.5) for x, old in zip(grads, before, strict=True))
    with pytest.raises(AssertionError):
        applier(norm, overflow, [grads])


@pytest.mark.gpu
@on_gpu
def test_norm_and_clipping_on_a_gpu() -> None:
    from megatron.core.optimizer import clip_grads

    from megatron_hybrid.modules.fp32_parameters import support_in_optimizers

    support_in_optimizers()
    grads = _gradients("cuda")
    expected = torch.cat([x.double() for x in grads]).norm()
    overflow = torch.zeros(1, dtype=torch.int, device="cuda")
    found, _ = clip_grads.multi_tensor_applier(clip_grads.l2_norm_impl, overflow, [grads], False)
    torch.testing.assert_close(found[0].double(), expected, rtol=1e-5, atol=0)
    before = [x.clone() for x in grads]
    coefficient = torch.full((1,), 0.25, device="cuda")
    clip_grads.multi_tensor_applier(clip_grads.multi_tensor_scale_tensor_impl, overflow, [grads, grads], coefficient)
    assert all(torch.equal(x, old * 0.25) for x, old in zip(grads, before, strict=True))


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weight_gradient_is_added(dtype: torch.dtype) -> None:
    from megatron_hybrid.modules.weight_gradient import add_weight_gradient

    x, dy, total = (torch.randn(*size, device="cuda") for size in ((512, 640), (512, 1024), (1024, 640)))
    x, dy, total = x.bfloat16(), dy.bfloat16(), total.to(dtype)
    expected = total.double() + dy.double().t() @ x.double()
    add_weight_gradient(x, dy, total)
    error = ((total.double() - expected).norm() / expected.norm()).item()
    # Into bf16 the product is rounded, then the sum: 0.00234 expected of these numbers, 0.00166 for one rounding.
    assert error < (1e-6 if dtype == torch.float32 else 2.4e-3), error
