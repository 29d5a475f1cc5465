"""A checkpoint written in one layout, model and optimizer, continues in another as if nothing had happened."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_hybrid.modules import fp32_parameters
from tests.parallel import tiny
from tests.parallel.compare import STAGES
from tests.parallel.ranks import run_ranks
from tests.parallel.tiny import Layout

ONE = Layout(dp=2, distributed_optimizer=True)
TP2 = Layout(tp=2, distributed_optimizer=True)
TP2_SP = Layout(tp=2, sp=True, distributed_optimizer=True)
PP2 = Layout(pp=2, pattern=STAGES, distributed_optimizer=True)

BF16_TP2 = replace(TP2_SP, bf16=True)
BF16_PP2 = replace(PP2, bf16=True)

#: Loss after two Adam steps in another layout; Adam's first steps turn rounding of small gradients into sign flips.
TOLERANCE = 2e-5


def _state(trainer: tiny.Trainer, loading: bool) -> dict[str, Any]:
    # A fresh dict for every call: Megatron stores process groups in it, which go stale with the layout.
    def metadata() -> dict[str, Any]:
        return {"distrib_optim_sharding_type": "fully_reshardable", "non_homogeneous_layers": True}

    model = trainer.chunks[0].sharded_state_dict(metadata=metadata())
    optimizer = trainer.optimizer.sharded_state_dict(model, is_loading=loading, metadata=metadata())
    return {"model": model, "optimizer": optimizer}


def _train(trainer: tiny.Trainer, steps: int) -> list[tuple[float, float]]:
    """(loss, gradient norm) of each step, the loss known to every rank."""
    found = torch.tensor([trainer.step() for _ in range(steps)], dtype=torch.float64)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return [tuple(row) for row in found.tolist()]


def _logits(trainer: tiny.Trainer) -> torch.Tensor:
    """Of a fixed batch, by Megatron's forward-only schedule, whole on every rank."""

    def forward(batches: Any, model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
        batch = next(batches)
        return model(batch["tokens"], batch["position_ids"], None), lambda output, non_loss_data: output.clone()

    collected = get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=iter([tiny.sample(99)]),
        model=trainer.model[0],
        num_microbatches=1,
        seq_length=tiny.SEQUENCE,
        micro_batch_size=tiny.MICROBATCH,
        forward_only=True,
        collect_non_loss_data=True,
    )
    tp = parallel_state.get_tensor_model_parallel_world_size()
    shape = (tiny.MICROBATCH, tiny.SEQUENCE, tiny.PADDED_VOCAB // tp)
    local = collected[0].contiguous() if collected else torch.empty(shape)
    last = parallel_state.get_pipeline_model_parallel_last_rank()
    dist.broadcast(local, last, group=parallel_state.get_pipeline_model_parallel_group())
    parts = [torch.empty(shape) for _ in range(tp)]
    dist.all_gather(parts, local, group=parallel_state.get_tensor_model_parallel_group())
    return torch.cat(parts, dim=-1)


def _without_own_steps() -> None:
    wrapped = DistributedOptimizer.load_state_dict
    DistributedOptimizer.load_state_dict = wrapped.__closure__[0].cell_contents


def _without_fp32_first() -> None:
    fp32_parameters.support_in_optimizers()
    wrapped = DistributedOptimizer._build_optimizer_group_ranges.__func__
    DistributedOptimizer._build_optimizer_group_ranges = classmethod(wrapped.__closure__[0].cell_contents)


def _as_it_is() -> None: ...


def _continue_elsewhere(
    rank: int, first: Layout, second: Layout, folder: Path, take_out: Callable[[], None]
) -> dict[str, Any]:
    take_out()
    chunks = tiny.build(first)
    trainer = tiny.Trainer(first, chunks)
    _train(trainer, 2)
    if rank == 0:
        folder.mkdir()
    dist.barrier()
    dist_checkpointing.save(_state(trainer, loading=False), str(folder))
    before = _logits(trainer)
    straight = _train(trainer, 2)

    trainer = tiny.Trainer(second, tiny.build(second))
    _train(trainer, 1)  # so that weights, moments and step counters differ from what is loaded
    loaded = dist_checkpointing.load(_state(trainer, loading=True), str(folder))
    trainer.chunks[0].load_state_dict(loaded["model"])
    trainer.optimizer.load_state_dict(loaded["optimizer"])
    return {"straight": straight, "before": before, "after": _logits(trainer), "resumed": _train(trainer, 2)}


@pytest.mark.parametrize(
    ("first", "second"),
    [(TP2, ONE), (TP2_SP, PP2), (PP2, TP2), (ONE, TP2_SP), (ONE, PP2)],
    ids=lambda layout: str(layout),
)
def test_continues_in_another_layout(first: Layout, second: Layout, tmp_path: Path) -> None:
    results = run_ranks(_continue_elsewhere, 2, first, second, tmp_path / "checkpoint", _as_it_is)
    result = results[0]
    differences = torch.tensor(result["straight"]) - torch.tensor(result["resumed"])
    assert differences.abs().max() <= TOLERANCE, (result["straight"], result["resumed"])
    torch.testing.assert_close(result["before"], result["after"], rtol=0, atol=1e-5)


def test_without_own_step_counters_the_resumed_run_differs(tmp_path: Path) -> None:
    result = run_ranks(_continue_elsewhere, 2, ONE, ONE, tmp_path / "checkpoint", _without_own_steps)[0]
    differences = torch.tensor(result["straight"]) - torch.tensor(result["resumed"])
    assert differences.abs().max() > 10 * TOLERANCE


@pytest.mark.parametrize("layout", [BF16_TP2, BF16_PP2], ids=str)
def test_bf16_with_fp32_parameters_continues_exactly(layout: Layout, tmp_path: Path) -> None:
    result = run_ranks(_continue_elsewhere, 2, layout, layout, tmp_path / "checkpoint", _as_it_is)[0]
    assert result["straight"] == result["resumed"]
    assert torch.equal(result["before"], result["after"])


def test_bf16_continues_in_another_layout(tmp_path: Path) -> None:
    result = run_ranks(_continue_elsewhere, 2, BF16_TP2, BF16_PP2, tmp_path / "checkpoint", _as_it_is)[0]
    torch.testing.assert_close(result["straight"], result["resumed"], rtol=1e-2, atol=0)


def test_bf16_without_the_remedy_pairs_the_wrong_states(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"exit codes"):
        run_ranks(_continue_elsewhere, 2, BF16_PP2, BF16_PP2, tmp_path / "checkpoint", _without_fp32_first)


def _save_plain(rank: int, folder: Path) -> None:
    layout = Layout(bf16=True)
    trainer = tiny.Trainer(layout, tiny.build(layout))
    trainer.step()
    _state(trainer, loading=False)


def test_plain_bf16_optimizer_refuses_to_save(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"fp32 parameters \(A_log, dt_bias\): use --use-distributed-optimizer"):
        run_ranks(_save_plain, 1, tmp_path)
