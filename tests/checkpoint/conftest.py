"""Data, and a run that nothing disturbed, for the tests that disturb one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from megatron_hybrid.tools.indexed_dataset import IndexedDatasetWriter
from tests.checkpoint.runs import STEPS, VOCAB, arguments, train
from tests.parallel.ranks import run_ranks


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    prefix = tmp_path_factory.mktemp("data") / "text"
    generator = np.random.default_rng(0)
    with IndexedDatasetWriter(prefix, VOCAB) as writer:
        for _ in range(20):
            writer.add_document(generator.integers(0, VOCAB - 1, size=100))
        writer.commit()
    return prefix


@pytest.fixture(scope="session")
def straight(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("straight")
    assert run_ranks(train, 2, run, arguments(data, run)) == [0, 0]
    assert json.loads((run / "checkpoints" / "TRAINING_COMPLETE").read_text())["iteration"] == STEPS
    return run
