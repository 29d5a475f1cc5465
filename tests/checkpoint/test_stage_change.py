"""A stage that starts from another one's weights and moments, and survives being killed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_hybrid.checkpoint.average import AverageOptions, average
from megatron_hybrid.tools.plot_run import read_series
from tests.checkpoint.runs import arguments, assert_same, kill_all_at, train, weights_and_moments
from tests.parallel.ranks import run_ranks

RATE = 2e-3
NEXT = ["--lr", str(RATE), "--min-lr", "0", "--lr-decay-style", "linear", "--lr-warmup-iters", "0", "--seed", "7"]
NEXT += ["--position-embedding-type", "none", "--keep-moments"]


def _moments(run: Path) -> Any:
    """Before the first step: this rank's sums of squares of both moments, and its step counts."""

    def before_step(rank: int, iteration: int) -> None:
        if iteration != 1:
            return
        import gc

        from megatron.core.optimizer import ChainedOptimizer

        (chained,) = (thing for thing in gc.get_objects() if isinstance(thing, ChainedOptimizer))
        states = [state for leaf in chained.chained_optimizers for state in leaf.optimizer.state.values()]
        sums = {key: sum(s[key].double().square().sum() for s in states) for key in ("exp_avg", "exp_avg_sq")}
        steps = {float(state["step"]) for state in states}
        rates = {group["lr"] for leaf in chained.chained_optimizers for group in leaf.optimizer.param_groups}
        torch.save((sums, list(steps), list(rates)), run / f"moments_{rank}")

    return before_step


def test_moments_are_kept_and_a_killed_stage_resumes(straight: Path, data: Path, tmp_path: Path) -> None:
    def flags(run: Path) -> list[str]:
        folders = ["--pretrained-checkpoint", str(straight / "checkpoints"), "--load", str(run / "checkpoints")]
        return arguments(data, run, *folders, *NEXT)

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert run_ranks(train, 2, whole, flags(whole), _moments(whole)) == [0, 0]
    found = [torch.load(whole / f"moments_{rank}", weights_only=True) for rank in (0, 1)]
    saved = weights_and_moments(straight, 6)
    for key in ("exp_avg", "exp_avg_sq"):
        expected = sum(
            x.double().square().sum() for name, x in saved.items() if name.endswith(f".{key}") or f".{key}." in name
        )
        assert float(sum(sums[key] for sums, *_ in found)) == pytest.approx(float(expected), rel=1e-6)
    assert found[0][1:] == found[1][1:] == ([6.0], [RATE])
    rates = read_series(whole / "tensorboard")["learning-rate"]  # at i, the rate of the step after it
    assert list(rates.values) == pytest.approx([RATE * (1 - i / 6) for i in range(1, 7)], rel=1e-5)

    without = tmp_path / "without"
    average(AverageOptions((str(straight / "checkpoints"),) * 2, without, optimizer=False))
    refused = arguments(data, tmp_path / "refused", "--pretrained-checkpoint", str(without), *NEXT)
    assert run_ranks(train, 2, tmp_path / "refused", [*refused, "--load", str(tmp_path / "refused/checkpoints")]) == [
        3,
        3,
    ]

    with pytest.raises(AssertionError, match=r"exit codes \[-9, -9\]"):
        run_ranks(train, 2, killed, flags(killed), kill_all_at(5))
    assert run_ranks(train, 2, killed, flags(killed)) == [0, 0]
    assert_same(whole, killed)
