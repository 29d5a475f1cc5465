"""The same call in pieces and in one: what both give, for tests in triton's interpreter and on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_hybrid.kernels import gated_delta, triton_autograd, triton_problem

#: Every way to keep what the backward needs.
POLICIES: list[dict[str, Any]] = [{}, {"states_every": 1}, {"states_every": 2}, {"keep_intermediates": True}]


def results(
    monkeypatch: pytest.MonkeyPatch, most: int, function: str, inputs: dict[str, Tensor], **options: Any
) -> tuple[int, dict[str, Tensor]]:
    """(pieces, outputs and all gradients) of a function of gated_delta.py whose rows are cut in at most so many."""
    problems = []

    def make_problem(*given: Any) -> triton_problem.Problem:
        problems.append(triton_problem.make_problem(*given))
        return problems[-1]

    leaves = {name: x.detach().clone().requires_grad_() for name, x in inputs.items()}
    with monkeypatch.context() as patch, triton_problem.cut_finely():
        patch.setattr(triton_problem, "MOST_PIECES", most)
        patch.setattr(triton_autograd, "make_problem", make_problem)
        outputs = getattr(gated_delta, function)(**leaves, **options, output_final_state=True, backend="triton")
        upstream = [
            torch.randn(x.shape, generator=torch.Generator(x.device).manual_seed(i), device=x.device, dtype=x.dtype)
            for i, x in enumerate(outputs)
        ]
        gradients = torch.autograd.grad(outputs, list(leaves.values()), upstream)
    names = ("output", "final", *(f"gradient of {name}" for name in leaves))
    (problem,) = problems
    return len(problem.pieces), dict(zip(names, (*(x.detach() for x in outputs), *gradients), strict=True))
