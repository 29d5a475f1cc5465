"""Every way of splitting the model gives one rank's loss, gradients and gradient norm; combinations: test_matrix."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_hybrid.config import HybridConfig
from tests.parallel import tiny
from tests.parallel.compare import STAGES, TOLERANCE, assert_same, differences, one_rank, split
from tests.parallel.ranks import run_ranks
from tests.parallel.tiny import Layout

LAYOUTS = [
    Layout(tp=3, sp=True),
    Layout(pp=2, pattern="GGG|*"),
    Layout(dp=2),
    Layout(dp=2, distributed_optimizer=True),
    Layout(pp=2, pattern=STAGES, cp=2, distributed_optimizer=True),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_same_as_one_rank(layout: Layout, references: dict[bool, dict[str, Any]], weights: Path) -> None:
    assert_same(references[False], run_ranks(split, layout.ranks, layout, weights / "False"))


def test_gradients_are_large_enough_to_compare(references: dict[bool, dict[str, Any]]) -> None:
    """A gradient near the tolerance would make the comparison empty."""
    largest = {key: grad.abs().max().item() for key, grad in tiny.assemble([references[False]["grads"]]).items()}
    assert min(largest.values()) > 100 * TOLERANCE, sorted(largest.items(), key=lambda item: item[1])[:3]


@pytest.mark.parametrize(
    ("broken", "parameter"),
    [
        ("head norm gradient stays on its rank", "out_norm.weight"),
        ("q/k norm statistics stay on their rank", "linear_qkv.weight"),
        ("q/k statistics are not reduced in backward", "linear_qkv.weight"),
    ],
    ids=lambda value: str(value),
)
def test_without_the_remedy_it_differs(
    broken: str, parameter: str, references: dict[bool, dict[str, Any]], weights: Path
) -> None:
    layout = Layout(tp=2)
    found = differences(references[False], run_ranks(split, layout.ranks, layout, weights / "False", None, broken))
    assert max(value for key, value in found.items() if parameter in key) > 100 * TOLERANCE


@pytest.mark.parametrize(
    "options",
    [
        HybridConfig(qk_norm_width="head"),
        HybridConfig(qk_norm_width="none", norm_placement="pre", gdn_output_gate=False),
    ],
    ids=["head_qk_norm", "pre-no_qk_norm-no_output_gate"],
)
def test_other_architectures_split_too(options: HybridConfig, tmp_path: Path) -> None:
    layout = Layout(tp=2)
    reference = run_ranks(one_rank, 1, tmp_path / "weights", options)[0]
    assert_same(reference, run_ranks(split, layout.ranks, layout, tmp_path / "weights", options))
