"""The planner's activations against a counting allocator, on real Megatron-Core with the Triton kernels."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytest
import torch
from megatron.core.transformer.module import Float16Module

from megatron_hybrid.config import HybridConfig
from megatron_hybrid.planning import activations, memory
from tests.parallel import tiny
from tests.parallel.ranks import run_ranks
from tests.planning.counting import Watch
from tests.planning.jobs import job_of

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1",
    reason="needs TRITON_INTERPRET=1 from the start, since triton reads it on import; tests/run.sh runs them so",
)

#: Head sizes that the kernels take.
HEADS = {"linear_key_head_dim": 16, "linear_value_head_dim": 32}
SEQUENCE = 256


def _forward(rank: int, layout: tiny.Layout, options: HybridConfig, z_loss: bool) -> int:
    """Bytes that a forward pass leaves behind, its output included."""
    [chunk] = tiny.build(layout, options)
    chunk.report_logsumexp = z_loss
    model = Float16Module(chunk.config, chunk)
    tokens = torch.zeros(1, SEQUENCE // layout.cp, dtype=torch.int64)
    with Watch([*model.parameters()]) as watch:
        output = model(tokens, tokens, None, labels=tokens)
        alive = watch.alive_bytes()
    assert output.requires_grad
    return alive


FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
NORM_OUT = {"recompute_granularity": "selective", "recompute_modules": ["gdn_norm_out", "mlp"]}


@pytest.mark.parametrize(
    ("layout", "options", "job"),
    [
        pytest.param(tiny.Layout(pattern="G*"), {"gdn_states_every": 2}, {"states_every": 2}, id="states-every-2"),
        pytest.param(
            tiny.Layout(pattern="G*"), {"gdn_keep_intermediates": True}, {"keep_intermediates": True}, id="all-kept"
        ),
        pytest.param(
            tiny.Layout(pattern="G*", overrides=FULL), {}, {"recompute": ("full",)}, id="full-recompute"
        ),
        pytest.param(
            tiny.Layout(pattern="G", cp=2), {"gdn_cp_comm_type": "all_gather"}, {"gdn_exchange": "all_gather"},
            id="cp2-all-gather",
        ),
        pytest.param(tiny.Layout(pattern="G", cp=2), {"gdn_cp_comm_type": "scan"}, {"gdn_exchange": "scan"}, id="scan"),
        pytest.param(
            tiny.Layout(pattern="G", overrides=NORM_OUT), {}, {"recompute": ("gdn_norm_out", "mlp")}, id="gdn-norm-out"
        ),
    ],
)  # fmt: skip
def test_activations(layout: tiny.Layout, options: dict[str, Any], job: dict[str, Any]) -> None:
    layout = replace(layout, bf16=True, overrides={**HEADS, **layout.overrides})
    z_loss = "gdn_states_every" in options
    counted = run_ranks(_forward, layout.ranks, layout, HybridConfig(gdn_backend="triton", **options), z_loss)[0]
    planned = replace(job_of(layout, SEQUENCE, **job), z_loss=z_loss)
    held = memory.of_rank(planned, 0)
    predicted = held.activations + held.states + activations.logits_kept(planned)
    print(f"counted {counted}, predicted {predicted:.0f}, ratio {predicted / counted:.4f}")
    assert predicted == pytest.approx(counted, rel=0.03)
