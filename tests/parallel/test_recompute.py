"""Activations computed again in the backward pass: the same gradients, fewer bytes kept."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_hybrid.modules.recompute import NORM_OUT
from tests.parallel.compare import STAGES, assert_same, measure, split
from tests.parallel.ranks import run_ranks
from tests.parallel.tiny import Layout

FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


def _selective(*modules: str) -> dict[str, Any]:
    return {"recompute_granularity": "selective", "recompute_modules": list(modules)}


CHOICES = {
    "gdn_norm_out": _selective(NORM_OUT),
    "core_attn": _selective("core_attn"),
    "mlp": _selective("mlp"),
    "layernorm": _selective("layernorm"),
    "full": FULL,
    "full-block": FULL | {"recompute_method": "block", "recompute_num_layers": 3},
}


@pytest.mark.parametrize("choice", CHOICES)
def test_one_rank(choice: str, references: dict[bool, dict[str, Any]], weights: Path) -> None:
    layout = Layout(overrides=CHOICES[choice])
    assert_same(references[False], run_ranks(split, layout.ranks, layout, weights / "False"))
