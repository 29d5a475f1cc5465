"""Errors of output and gradients, of the Gated DeltaNet kernels and of flash-linear-attention's on the same inputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_hybrid.kernels import gated_delta, reference
from megatron_hybrid.kernels.self_test import Leaves, gradients, relative_error


class Case(NamedTuple):
    """lengths: of documents. unit: q and k are unit vectors already. identical: all keys are one, beta = 1.98."""

    what: str
    lengths: Sequence[int]
    unit: bool = False
    identical: bool = False


SEEDS = 4
CASES = (
    Case("1,000 tokens, unit q and k", (1000,), unit=True),
    Case("4,096 tokens, own l2norm", (4096,)),
    Case("5 documents, own l2norm", (1, 63, 200, 503, 256)),
    Case("64 tokens, identical keys", (64,), unit=True, identical=True),
    Case("1,024 tokens, identical keys", (1024,), unit=True, identical=True),
)
#: Dimension of the heads; A_log and dt_bias are one number a head, too few to judge heads by.
HEADS = {"o": 2, "q": 2, "k": 2, "v": 2, "a": 2, "b": 2}


def inputs(case: Case, H: int, K: int, V: int, seed: int, device: str) -> tuple[Leaves, Tensor]:
    """(leaves in bf16, A_log and dt_bias in fp32; a gradient of o); decays as at the model's initialisation."""
    generator, T = torch.Generator(device).manual_seed(seed), sum(case.lengths)

    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    q, k, v, a, b = rand(1, T, H, K), rand(1, T, H, K), rand(1, T, H, V), rand(1, T, H), rand(1, T, H)
    if case.identical:
        k, b = k[:, :1].expand_as(k), torch.full_like(b, 4.6)
    if case.unit:
        q, k = reference.l2norm(q), reference.l2norm(k)
    dt = torch.linspace(-6.9, -2.3, H, device=device).exp()
    leaves = {name: x.bfloat16() for name, x in zip("qkvab", (q, k, v, a, b), strict=True)}
    leaves["A_log"] = torch.linspace(0.05, 16, H, device=device).log()
    leaves["dt_bias"] = dt + torch.log(-torch.expm1(-dt))
    return leaves, rand(1, T, H, V).bfloat16()


def one_seed(
    case: Case, sizes: tuple[int, int, int], backends: Sequence[str], seed: int, device: str = "cuda"
) -> dict[str, dict[str, tuple[float, float]]]:
    """{backend: {tensor: (RMS error over RMS of the reference in fp64, that of the worst head)}}.

    sizes: heads, K, V.
    """
    leaves, do = inputs(case, *sizes, seed, device)
    cu_seqlens = torch.tensor((0, *case.lengths), dtype=torch.int32, device=device).cumsum(0, dtype=torch.int32)
    options: dict[str, Any] = {"qk_l2norm": not case.unit, "cu_seqlens": cu_seqlens if len(case.lengths) > 1 else None}

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
    for case in CASES:
        runs = [one_seed(case, (H, K, V), backends, seed) for seed in range(SEEDS)]
        for backend in backends:
            for name in runs[0][backend]:
                error, worst = ((sum(run[backend][name][i] ** 2 for run in runs) / SEEDS) ** 0.5 for i in range(2))
                yield {"case": case.what, "who": backend, "tensor": name, "error": error, "worst_head": worst}
