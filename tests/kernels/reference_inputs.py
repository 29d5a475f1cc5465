"""Inputs, errors and tolerances that the tests of the reference share.

Letters are those of kernels/reference.py. Errors are max-abs relative to the largest entry of the expected tensor.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_hybrid.kernels import gated_delta
from megatron_hybrid.kernels.reference import (
    gated_delta_rule_chunked,
    gated_delta_rule_recurrent,
    l2norm,
)

FP64 = 1e-12  # measured at most 3e-15
FP32 = 5e-6  # measured at most 6e-7 against the definition, 1.6e-6 against transformers, 4e-6 at the extremes
NAMES = ("q", "k", "v", "g", "beta", "initial_state")
# Empty documents at both ends and inside, lengths 1 to 3, boundaries inside, at and across chunks of 16.
LENGTHS = (0, 5, 0, 1, 2, 3, 40, 16, 1, 33, 0)

Shape = tuple[int, int, int, int]  # Hk, H, K, V


def rand(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def delta_inputs(
    B: int, T: int, shape: Shape, N: int | None = None, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    """q, k, v, g, beta, initial_state, as leaves that require grad; beta in (0, 2)."""
    Hk, H, K, V = shape
    tensors = (
        l2norm(rand(B, T, Hk, K, seed=1)),
        l2norm(rand(B, T, Hk, K, seed=2)),
        rand(B, T, H, V, seed=3),
        -F.softplus(rand(B, T, H, seed=4) - 1.0),
        2.0 * rand(B, T, H, seed=5).sigmoid(),
        rand(B if N is None else N, H, K, V, seed=6),
    )
    return [x.to(dtype).requires_grad_() for x in tensors]


def cumulative(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor((0, *lengths), dtype=torch.int32).cumsum(0, dtype=torch.int32)


def chunked(*tensors: Tensor, C: int = 16, cu_seqlens: Tensor | None = None) -> tuple[Tensor, Tensor]:
    return gated_delta_rule_chunked(*tensors[:5], initial_state=tensors[5], cu_seqlens=cu_seqlens, chunk_size=C)


def recurrent(*tensors: Tensor, cu_seqlens: Tensor | None = None) -> tuple[Tensor, Tensor]:
    return gated_delta_rule_recurrent(*tensors[:5], initial_state=tensors[5], cu_seqlens=cu_seqlens)


def gradients(outputs: tuple[Tensor, ...], tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Gradients of a fixed random projection of all outputs."""
    weights = [rand(*x.shape, seed=20 + i, dtype=x.dtype) for i, x in enumerate(outputs)]
    return torch.autograd.grad(outputs, tensors, weights)


def assert_close(actual: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    if expected.numel() == 0:
        return
    size = expected.abs().max().item()
    error = (actual.double() - expected.double()).abs().max().item()
    assert error <= tolerance * size, f"{what}: error {error:.2e}, largest entry {size:.2e}"


def assert_all_close(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...], tolerance: float, names: str) -> None:
    for name, a, e in zip(names.split(), actual, expected, strict=True):
        assert_close(a, e, tolerance, name)


def mixer_inputs(T: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """The twelve tensors of mixer_core with Hk=1, H=2, K=3, V=2, W=4, as leaves that require grad."""
    widths = (3, 3, 4, 2, 2, 4)
    activations = [rand(1, T, width, seed=60 + i) for i, width in enumerate(widths)]
    parameters = [rand(*shape, seed=70 + i) for i, shape in enumerate(((3, 4), (3, 1, 4), (4, 4), (2,), (2,), (2,)))]
    return [x.to(dtype).requires_grad_() for x in (*activations, *parameters)]


def mixer(*tensors: Tensor, key_heads: int, value_heads: int, lengths: tuple[int, ...] | None = None) -> Tensor:
    """`mixer_core` of the projections and convolutions one by one."""
    q, k, v, a, b, z, *convs, A_log, dt_bias, norm_weight = tensors
    y, _ = gated_delta.mixer_core(
        torch.cat([q, k, v, z], dim=-1), torch.cat([a, b], dim=-1), torch.cat([w.flatten(1) for w in convs]),
        A_log, dt_bias, norm_weight, num_key_heads=key_heads, num_value_heads=value_heads,
        key_dim=k.shape[-1] // key_heads, value_dim=v.shape[-1] // value_heads,
        cu_seqlens=None if lengths is None else cumulative(lengths), backend="reference",
    )  # fmt: skip
    return y
