"""Two seconds before training: the kernels of this machine's GPU against the reference, forward and gradients."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from megatron_hybrid.kernels import gated_delta, reference

#: RMS error over RMS value in bf16; the bounds of the test suite.
TOLERANCES = {"o": 0.005, "q": 0.007, "k": 0.007, "v": 0.007, "a": 0.015, "b": 0.015}


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """RMS of the difference over RMS of the expected tensor; nan if either has one."""
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def kernel_errors(K: int, V: int, device: torch.device, T: int = 256, H: int = 4, **kept: Any) -> dict[str, float]:
    """Errors of o and of the gradients of q, k, v, a, b in bf16 against the reference in fp64.

    kept: states_every or keep_intermediates, as training has them: each is compiled into other kernels.

    Raises RuntimeError when the same input gives different bits twice: that is a race, not rounding.
    """
    generator = torch.Generator(device).manual_seed(0)

    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    inputs = [reference.l2norm(rand(1, T, H, K)), reference.l2norm(rand(1, T, H, K)), rand(1, T, H, V)]
    inputs = [x.bfloat16() for x in (*inputs, rand(1, T, H), rand(1, T, H))]
    A_log, dt_bias = torch.linspace(-3, 2, H, device=device), torch.full((H,), -3.0, device=device)
    weight = rand(1, T, H, V).bfloat16()

    def run(backend: str, dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        gates = [x.double() if dtype == torch.float64 else x for x in (A_log, dt_bias)]
        o, _ = gated_delta.gated_delta_rule(*leaves, *gates, qk_l2norm=False, backend=backend, **kept)
        return [o.detach(), *torch.autograd.grad(o, leaves, weight.to(o.dtype))]

    first, second = run("triton", torch.bfloat16), run("triton", torch.bfloat16)
    changing = [name for name, x, y in zip(TOLERANCES, first, second, strict=True) if not torch.equal(x, y)]
    if changing:
        raise RuntimeError(f"kernels gave different bits for the same input twice: {', '.join(changing)}")
    expected = run("reference", torch.float64)
    return {name: relative_error(x, y) for name, x, y in zip(TOLERANCES, first, expected, strict=True)}


def self_test(K: int, V: int, device: torch.device | None = None, **kept: Any) -> dict[str, float]:
    """`kernel_errors`; raises RuntimeError when the kernels of these head sizes are not right on this device."""
    device = device or torch.device("cuda")
    errors = kernel_errors(K, V, device, **kept)
    wrong = [f"{name} {error:.4f} (at most {TOLERANCES[name]})" for name, error in errors.items()]
    if not all(error <= TOLERANCES[name] for name, error in errors.items()):
        raise RuntimeError(
            f"Gated DeltaNet kernels fail their self-test on {torch.cuda.get_device_name(device)}, K = {K}, V = {V}: "
            f"{'; '.join(wrong)}. Train with the reference backend, and report GPU, driver and triton version"
        )
    return errors


@cache
def before_training(backend: str | None, dtype: torch.dtype, K: int, V: int, **kept: Any) -> dict[str, float]:
    """Gates training on a GPU: the kernels take this dtype, have a checked launch here, and pass their self-test.

    Returns the self-test's errors, none where there is nothing to check: without a GPU or with another backend.
    Raises ValueError for the dtype, RuntimeError where the kernels are not right.
    """
    if not torch.cuda.is_available() or backend not in (None, "triton"):
        return {}
    if dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"--gdn-backend triton: takes bf16 or fp16, not {dtype}; add --bf16, or take reference")
    return self_test(K, V, **kept)
