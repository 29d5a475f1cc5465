"""Gradients of the summary of a stretch of tokens on a GPU in bf16, against the reference in fp64.

Its backward has K further columns of V, which no entry of the table is for: it runs with the launches of (K, V).
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_hybrid.kernels import gated_delta, reference
from megatron_hybrid.kernels.configs import TABLE, trial

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

#: Those of the delta rule's gradients; of a chunk, whose rounding stays in M: they add up as the root of their number.
BOUNDS = {"k": 0.007, "v": 0.007, "a": 0.015, "b": 0.015}
SIZES = sorted({(K, V) for _, _, K, V in TABLE})


def inputs(T: int, K: int, V: int) -> dict[str, Tensor]:
    """As in test_triton_gpu.py: decays as at the model's initialisation, keys of unit norm."""
    generator, H = torch.Generator("cuda").manual_seed(K + V), 4

    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cuda")

    dt = torch.linspace(-6.9, -2.3, H, device="cuda").exp()
    bf16 = {"k": reference.l2norm(rand(1, T, H, K)), "v": rand(1, T, H, V), "a": rand(1, T, H), "b": rand(1, T, H)}
    return {name: x.bfloat16() for name, x in bf16.items()} | {
        "A_log": torch.linspace(0.05, 16, H, device="cuda").log(),
        "dt_bias": dt + torch.log(-torch.expm1(-dt)),
    }


def gradients(given: dict[str, Tensor], bounds: Tensor | None, backend: str) -> dict[str, Tensor]:
    """Of what a summary is for, the state after the tokens, with the launches that a call outside of tests has."""
    dtype = torch.float64 if backend == "reference" else None
    leaves = {name: x.to(dtype or x.dtype, copy=True).requires_grad_() for name, x in given.items()}
    M, S = gated_delta.shard_summary(**leaves, cu_seqlens=bounds, k_l2norm=False, backend=backend)
    before, dS = (
        torch.randn(S.shape, generator=torch.Generator("cuda").manual_seed(seed), device="cuda").to(S.dtype)
        for seed in (1, 2)
    )
    after = M @ (0.1 * before) + S
    return dict(zip(leaves, torch.autograd.grad(after, list(leaves.values()), dS), strict=True))


@pytest.mark.parametrize("lengths", [(200,), (0, 1, 64, 130, 5)], ids=["dense", "packed"])
@pytest.mark.parametrize("sizes", SIZES, ids=lambda s: "-".join(map(str, s)))
def test_gradients(sizes: tuple[int, int], lengths: tuple[int, ...]) -> None:
    """Of every head, and with the same bits twice."""
    given = inputs(sum(lengths), *sizes)
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], device="cuda") if len(lengths) > 1 else None
    found, again = (gradients(given, bounds, "triton") for _ in range(2))
    assert [name for name, x in found.items() if not torch.equal(x, again[name])] == []
    expected, chunks = gradients(given, bounds, "reference"), 4
    problems = []
    for name, bound in BOUNDS.items():
        for head, (x, right) in enumerate(zip(found[name].unbind(2), expected[name].unbind(2), strict=True)):
            error = ((x.double() - right).norm() / right.norm()).item()
            if not error <= bound * chunks**0.5:
                problems.append(f"{name}, head {head}: {error:.4f}, at most {bound * chunks**0.5:.4f}")
    assert not problems, "; ".join(problems)


def test_sizes_without_an_entry_are_refused() -> None:
    given = {name: x.requires_grad_() for name, x in inputs(70, 32, 48).items()}
    with pytest.raises(RuntimeError, match=r"K = 32, V = 48; run .*--key-dim 32 --value-dim 48"):
        gated_delta.shard_summary(**given)
    with trial():
        M, S = gated_delta.shard_summary(**given)
        (M.sum() + S.sum()).backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in given.values())
