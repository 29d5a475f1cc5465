"""Training split over GPUs is the same training: TP with SP, CP, PP, DP and mixes of them, in bf16 and FP8.

    python -m pytest -m gpu -s tests/parallel/test_split_gpu.py

On two GPUs or four, with Transformer Engine and the Triton kernels, over NCCL, in one process a GPU that goes through
all layouts. What is compared and what is allowed: `tests/parallel/split/judge.py`.

MEGATRON_HYBRID_SPLIT_TABLE=FILE.md keeps the table, and every number in FILE.json; MEGATRON_HYBRID_SPLIT_BUDGET_S (540)
ends what takes longer.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from tests.parallel.split.cells import GPU_MODEL, IN_FP8, Plan, schedule
from tests.parallel.split.run import run

GPUS = min(torch.cuda.device_count(), 4) if torch.cuda.is_available() else 0

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(GPUS < 2, reason=f"needs two GPUs or four, over which a model is split; {GPUS} here"),
    pytest.mark.skipif(
        importlib.util.find_spec("transformer_engine") is None, reason="Transformer Engine is not installed here"
    ),
]


def test_split_over_gpus_as_on_one(tmp_path: Path) -> None:
    plan = Plan("cuda", GPU_MODEL, GPUS, schedule(GPUS, ("bf16", *IN_FP8)))
    rows = run(plan, tmp_path / "run")
    wrong = [f"{row.layout}, {row.recipe}: {row.verdict}" for row in rows if row.verdict != "same"]
    assert rows and not wrong, "\n".join(wrong)
