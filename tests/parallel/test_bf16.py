"""bf16: splitting the model adds no error of its own to what bf16 costs one rank."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.parallel import tiny
from tests.parallel.compare import STAGES, measure, split
from tests.parallel.ranks import run_ranks
from tests.parallel.tiny import Layout

#: Of the loss and of the gradient norm.
TOLERANCE = 1e-2

#: A split model's distance from the fp32 gradients, over one rank's in bf16: the same rounding in another order.
ERROR_RATIO = 1.2

LAYOUTS = [
    Layout(tp=2),
    Layout(cp=4),
    Layout(pp=2, pattern=STAGES),
    Layout(tp=2, sp=True, cp=2),
    Layout(cp=4, packed=True),
    Layout(tp=2, sp=True, cp=2, packed=True),
]


def _references(rank: int, folder: Path, packed: bool) -> dict[str, dict[str, Any]]:
    """One rank in bf16, and in fp32 from the same (bf16) weights."""
    half, single = Layout(bf16=True, packed=packed), Layout(packed=packed)
    chunks = tiny.build(half)
    tiny.unsettle(chunks)
    tiny.save_weights(chunks, folder)
    weights = {name: param.detach().float() for name, param in chunks[0].named_parameters()}
    found = {"bf16": measure(half, chunks)}
    chunks = tiny.build(single)
    with torch.no_grad():
        for name, param in chunks[0].named_parameters():
            param.copy_(weights[name])
    return {**found, "fp32": measure(single, chunks)}


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Any]:
    folder = tmp_path_factory.mktemp("weights")
    found = {packed: run_ranks(_references, 1, folder / str(packed), packed)[0] for packed in (False, True)}
    return {"folder": folder, **found}


def _distance(grads: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> float:
    """Relative, of all gradients as one vector."""
    error = sum((grads[key] - exact[key]).square().sum() for key in exact)
    return float((error / sum(grad.square().sum() for grad in exact.values())).sqrt())


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_no_further_from_fp32_than_one_rank(layout: Layout, references: dict[Any, Any]) -> None:
    layout = replace(layout, bf16=True)
    reference = references[layout.packed]
    results = run_ranks(split, layout.ranks, layout, references["folder"] / str(layout.packed))
    total = max((r["loss"] for r in results), key=lambda t: t[1])
    one = reference["bf16"]["loss"]
    assert float(total[0] / total[1]) == pytest.approx(float(one[0] / one[1]), rel=TOLERANCE)
    assert results[0]["norm"] == pytest.approx(reference["bf16"]["norm"], rel=TOLERANCE)
    exact = tiny.assemble([reference["fp32"]["grads"]])
    distance = _distance(tiny.assemble([r["grads"] for r in results]), exact)
    alone = _distance(tiny.assemble([reference["bf16"]["grads"]]), exact)
    print(f"relative distance from fp32: split {distance:.4f}, one rank {alone:.4f}")
    assert distance <= ERROR_RATIO * alone
