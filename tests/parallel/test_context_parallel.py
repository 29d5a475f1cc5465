"""Context parallelism by state passing, in the whole model: loss and every gradient as on one rank, packed or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.parallel.ranks import run_ranks
from tests.parallel.test_gradients import STAGES, TOLERANCE, _differences, _measure, _split
from tests.parallel import tiny
from tests.parallel.tiny import Layout

DENSE = [
    Layout(cp=2),
    Layout(cp=4),
    Layout(tp=2, cp=2),
    Layout(tp=2, sp=True, cp=4),
    Layout(pp=2, pattern=STAGES, cp=2, distributed_optimizer=True),
    Layout(tp=2, sp=True, pp=2, pattern=STAGES, cp=2),
]
PACKED = [
    Layout(packed=True, tp=2),
    Layout(packed=True, cp=2),
    Layout(packed=True, cp=4),
    Layout(packed=True, tp=2, sp=True, cp=2),
    Layout(packed=True, pp=2, pattern=STAGES, cp=2),
    Layout(packed=True, tp=2, sp=True, pp=2, pattern=STAGES, cp=2),
]


def _one_rank(rank: int, folder: Path, packed: bool) -> dict[str, Any]:
    layout = Layout(packed=packed)
    chunks = tiny.build(layout)
    tiny.unsettle(chunks)
    tiny.save_weights(chunks, folder)
    return _measure(layout, chunks)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("weights")


@pytest.fixture(scope="module")
def references(weights: Path) -> dict[bool, dict[str, Any]]:
    return {packed: run_ranks(_one_rank, 1, weights / str(packed), packed)[0] for packed in (False, True)}


@pytest.mark.parametrize("layout", DENSE + PACKED, ids=str)
def test_same_as_one_rank(layout: Layout, references: dict[bool, dict[str, Any]], weights: Path) -> None:
    results = run_ranks(_split, layout.ranks, layout, weights / str(layout.packed), None, "")
    differences = _differences(references[layout.packed], results)
    worst = max(differences, key=lambda key: differences[key])
    assert differences[worst] <= TOLERANCE, f"{worst}: {differences[worst]:.2e}"
