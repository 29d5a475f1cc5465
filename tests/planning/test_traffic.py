"""Bytes between ranks: the planner's against those counted where torch.distributed is called, by group."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_hybrid.config import HybridConfig
from megatron_hybrid.planning import traffic
from tests.parallel import tiny
from tests.parallel.ranks import run_ranks
from tests.planning.counting import Traffic
from tests.planning.jobs import job_of

LONG = 384


def _received(rank: int, layout: tiny.Layout, options: dict[str, Any]) -> dict[str, float]:
    """Of one step's forward and backward passes, gradients reduced at its end."""
    tiny.SEQUENCE = LONG
    trainer = tiny.Trainer(layout, tiny.build(layout, HybridConfig(**options)))
    with Traffic() as counted:
        trainer.backward()
    groups = {
        "tensor": parallel_state.get_tensor_model_parallel_group(),
        "context": parallel_state.get_context_parallel_group(),
        "pipeline": parallel_state.get_pipeline_model_parallel_group(),
        "data": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }
    ranks = {name: tuple(dist.get_process_group_ranks(group)) for name, group in groups.items()}
    return {"rank": parallel_state.get_pipeline_model_parallel_rank()} | {
        name: counted.received.get(members, 0.0) for name, members in ranks.items() if len(members) > 1
    }


@pytest.mark.parametrize(
    ("layout", "options"),
    [
        (tiny.Layout(tp=2, sp=True, pp=2, pattern="G*|G*"), {}),
        (tiny.Layout(tp=2, dp=2, pattern="G*"), {}),
        (tiny.Layout(cp=2, dp=2, pattern="G*", distributed_optimizer=True), {"gdn_cp_comm_type": "all_gather"}),
    ],
    ids=str,
)
def test_bytes(layout: tiny.Layout, options: dict[str, Any]) -> None:
    layout = replace(layout, bf16=True)
    job = replace(
        job_of(layout, LONG, tiny.MICROBATCH),
        gdn_exchange=options.get("gdn_cp_comm_type", "auto"),
    )
    for found in run_ranks(_received, layout.ranks, layout, options):
        rank = int(found.pop("rank"))
        planned = traffic.per_step(job, rank)
        planned["data"] = traffic.data_parallel(job, rank)[0]  # parameters are gathered with the optimizer's step
        print(found, planned)
        for kind, size in found.items():
            assert planned[kind] == pytest.approx(size, rel=0.03), kind
