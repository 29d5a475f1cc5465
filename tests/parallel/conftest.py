"""One rank's results for the unsettled tiny model, dense and packed: computed once, compared with by all layouts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.parallel.compare import one_rank
from tests.parallel.ranks import run_ranks
from tests.parallel.tiny import Layout


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the weights, `False` (dense) and `True` (packed) in it."""
    return tmp_path_factory.mktemp("weights")


@pytest.fixture(scope="session")
def references(weights: Path) -> dict[bool, dict[str, Any]]:
    """{packed: results of one rank}."""
    return {
        packed: run_ranks(one_rank, 1, weights / str(packed), None, Layout(packed=packed))[0]
        for packed in (False, True)
    }
