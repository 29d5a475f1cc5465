"""Activations computed again in the backward pass: the gradients of a run that keeps them, under every split.

The bytes that are kept: tests/kernels/test_triton_interpreter.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_hybrid.config import HybridConfig
from megatron_hybrid.modules.gated_delta_net import GatedDeltaNet
from megatron_hybrid.modules.recompute import NORM_OUT
from tests.parallel.compare import STAGES, assert_same, differences, split
from tests.parallel.ranks import run_ranks
from tests.parallel.tiny import Layout


def _selective(*modules: str) -> dict[str, Any]:
    return {"recompute_granularity": "selective", "recompute_modules": list(modules)}


def _full(method: str, layers: int) -> dict[str, Any]:
    return {"recompute_granularity": "full", "recompute_method": method, "recompute_num_layers": layers}


CHOICES = {
    NORM_OUT: _selective(NORM_OUT),
    "core_attn and mlp": _selective("core_attn", "mlp"),
    "full": _full("uniform", 1),
    "full, one layer of a stage": _full("block", 1),
}


def _counted(rank: int, layouts: dict[str, Layout], folder: Path) -> dict[str, Any]:
    """Each choice's results on one rank, and how often the mixers' cores ran."""
    calls, mix = [0], GatedDeltaNet._mix

    def counting(self: GatedDeltaNet, *args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        return mix(self, *args, **kwargs)

    GatedDeltaNet._mix = counting  # type: ignore[method-assign]
    found = {}
    for name, layout in layouts.items():
        calls[0] = 0
        found[name] = split(rank, layout, folder) | {"calls": calls[0]}
    return found


def test_bit_equal_on_one_rank(references: dict[bool, dict[str, Any]], weights: Path) -> None:
    layouts = {name: Layout(overrides=choice) for name, choice in CHOICES.items()}
    found = run_ranks(_counted, 1, layouts, weights / "False")[0]
    for name, result in found.items():
        assert max(differences(references[False], [result]).values()) == 0, name
    calls = {name: result["calls"] / Layout().microbatches for name, result in found.items()}
    assert calls == {NORM_OUT: 6, "core_attn and mlp": 3, "full": 6, "full, one layer of a stage": 4}


@pytest.mark.parametrize(
    ("layout", "options"),
    [
        (Layout(tp=2, sp=True, cp=2, overrides=_selective(NORM_OUT, "core_attn")), None),
        (Layout(cp=3, packed=True, overrides=CHOICES[NORM_OUT]), None),
        (Layout(cp=2, overrides=CHOICES[NORM_OUT]), HybridConfig(gdn_cp_comm_type="a2a")),
        (Layout(pp=2, pattern="G|G|G|*", distributed_optimizer=True, overrides=CHOICES[NORM_OUT]), None),
        (Layout(tp=2, sp=True, pp=2, pattern=STAGES, cp=2, overrides=CHOICES["full"]), None),
    ],
    ids=lambda value: value.gdn_cp_comm_type if isinstance(value, HybridConfig) else str(value or ""),
)
def test_same_as_one_rank_that_keeps_all(
    layout: Layout, options: HybridConfig | None, references: dict[bool, dict[str, Any]], weights: Path
) -> None:
    folder = weights / str(layout.packed)
    assert_same(references[layout.packed], run_ranks(split, layout.ranks, layout, folder, options))
