"""Errors of output and gradients, of the Gated DeltaNet kernels and of flash-linear-attention's on the same inputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_hybrid.kernels import gated_delta, reference
from megatron_hybrid.kernels.self_test import Leaves, gradients, relative_error

SEEDS = 4
#: (what, lengths of documents, q and k unit vectors already, identical keys with beta = 1.98)
CASES: Sequence[tuple[str, Sequence[int], bool, bool]] = (
    ("1,000 tokens, unit q and k", (1000,), True, False),
    ("4,096 tokens, own l2norm", (4096,), False, False),
    ("5 documents, own l2norm", (1, 63, 200, 503, 256), False, False),
    ("64 tokens, identical keys", (64,), True, True),
    ("1,024 tokens, identical keys", (1024,), True, True),
)
#: Dimension of the heads; A_log and dt_bias are one number a head, too few to judge heads by.
HEADS = {"o": 2, "q": 2, "k": 2, "v": 2, "a": 2, "b": 2}


def inputs(T: int, H: int, K: int, V: int, unit: bool, identical: bool, seed: int) -> Leaves:
    """In bf16, A_log and dt_bias in fp32; decays as at the model's initialisation."""
    generator = torch.Generator("cuda").manual_seed(seed)

    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cuda")

    q, k, v, a, b = rand(1, T, H, K), rand(1, T, H, K), rand(1, T, H, V), rand(1, T, H), rand(1, T, H)
    if identical:
        k, b = k[:, :1].expand_as(k), torch.full_like(b, 4.6)
    if unit:
        q, k = reference.l2norm(q), reference.l2norm(k)
    dt = torch.linspace(-6.9, -2.3, H, device="cuda").exp()
    leaves = {name: x.bfloat16() for name, x in zip("qkvab", (q, k, v, a, b), strict=True)}
    leaves["A_log"] = torch.linspace(0.05, 16, H, device="cuda").log()
    leaves["dt_bias"] = dt + torch.log(-torch.expm1(-dt))
    return leaves


def one_seed(
    lengths: Sequence[int], sizes: tuple[int, int, int], unit: bool, identical: bool, backends: Sequence[str], seed: int
) -> dict[str, dict[str, tuple[float, float]]]:
    """{backend: {tensor: (RMS error over RMS of the reference in fp64, that of the worst head)}}."""
    T, (H, _, V) = sum(lengths), sizes
    leaves = inputs(T, *sizes, unit, identical, seed)
    cu_seqlens = torch.tensor((0, *lengths), dtype=torch.int32, device="cuda").cumsum(0, dtype=torch.int32)
    options: dict[str, Any] = {"qk_l2norm": not unit, "cu_seqlens": cu_seqlens if len(lengths) > 1 else None}
    do = torch.randn(1, T, H, V, generator=torch.Generator("cuda").manual_seed(seed + 1000), device="cuda").bfloat16()

    def results(backend: str, given: Leaves) -> Leaves:
        found = gradients(lambda x: gated_delta.gated_delta_rule(**x, **options, backend=backend)[0], given, do)
        return {"o" if name == "y" else name: x for name, x in found.items()}

    exact = results("reference", {name: x.double() for name, x in leaves.items()})

    def errors(actual: Leaves) -> dict[str, tuple[float, float]]:
        found = {}
        for name, x in exact.items():
            error = relative_error(actual[name], x)
            pairs = zip(actual[name].unbind(HEADS[name]), x.unbind(HEADS[name]), strict=True) if name in HEADS else ()
            found[name] = error, max((relative_error(*pair) for pair in pairs), default=error)
        return found

    return {backend: errors(results(backend, leaves)) for backend in backends}


def measure_errors(H: int, K: int, V: int, with_fla: bool) -> Iterator[dict[str, Any]]:
    """A line of each case, backend and tensor: RMS over SEEDS inputs of the error, and of the worst head's."""
    backends = ("triton", "fla") if with_fla else ("triton",)
    for what, lengths, unit, identical in CASES:
        runs = [one_seed(lengths, (H, K, V), unit, identical, backends, seed) for seed in range(SEEDS)]
        for backend in backends:
            for name in runs[0][backend]:
                error, worst = ((sum(run[backend][name][i] ** 2 for run in runs) / SEEDS) ** 0.5 for i in range(2))
                yield {"case": what, "who": backend, "tensor": name, "error": error, "worst_head": worst}
