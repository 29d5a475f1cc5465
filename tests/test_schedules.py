"""Learning rates of Megatron's schedulers as the plugin configures them, against the formulas of Ai2's recipe."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_hybrid.flags import FlagError, check, compose, wsds_ends
from megatron_hybrid.training.schedule import WsdsScheduler

PEAK, BATCH = 3e-4, 512


def _scheduler(kind: type = OptimizerParamScheduler, **settings: Any) -> Any:
    defaults: dict[str, Any] = {
        "optimizer": SimpleNamespace(param_groups=[{}]),
        "init_lr": 0.0,
        "max_lr": PEAK,
        "min_lr": PEAK / 10,
        "lr_decay_style": "cosine",
        "start_wd": 0.1,
        "end_wd": 0.1,
        "wd_incr_steps": 1,
        "wd_incr_style": "constant",
        "use_checkpoint_opt_param_scheduler": False,
    }
    return kind(**{**defaults, **settings})


def _at(scheduler: Any, samples: float) -> float:
    scheduler.num_steps = 0
    scheduler.step(samples)
    return scheduler.optimizer.param_groups[0]["lr"]


def test_pretraining_cosine_at_the_ends_and_between() -> None:
    steps, warmup = 1414078, 2000
    scheduler = _scheduler(lr_warmup_steps=warmup * BATCH, lr_decay_steps=steps * BATCH)
    assert _at(scheduler, 0) == 0 and _at(scheduler, 1000 * BATCH) == pytest.approx(1.5e-4)
    assert _at(scheduler, warmup * BATCH) == pytest.approx(3e-4) and _at(scheduler, steps * BATCH) == pytest.approx(
        3e-5
    )
    for step in (5000, 700000, 1400000):
        cosine = 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))
        assert _at(scheduler, step * BATCH) == pytest.approx(PEAK * (0.1 + 0.9 * cosine), rel=1e-12)


def test_midtraining_line_to_zero_without_warmup() -> None:
    steps, peak = 23842, 2.0712352850360292e-4
    scheduler = _scheduler(
        max_lr=peak, min_lr=0.0, lr_decay_style="linear", lr_warmup_steps=0, lr_decay_steps=steps * BATCH
    )
    assert _at(scheduler, 0) == peak and _at(scheduler, steps * BATCH) == 0
    assert _at(scheduler, steps // 2 * BATCH) == pytest.approx(peak / 2)


ENDS = [1000, 2000, 4000, 8000, 16000]


def _plain_wsds(step: int, warmup: int) -> float:
    """OLMo-core's rule, period by period."""
    if step < warmup:
        return PEAK * step / warmup
    start = 0
    for end in ENDS:
        if step <= end:
            length = end - start
            return PEAK * min(1.0, (end - step) / (0.1 * length))
        start = end
    raise AssertionError(step)


def test_wsds_warms_up_once_and_decays_in_every_period() -> None:
    scheduler = _scheduler(
        WsdsScheduler, min_lr=0.0, lr_decay_style="WSD", wsd_decay_steps=1, lr_wsd_decay_style="linear",
        lr_warmup_steps=100 * BATCH, lr_decay_steps=ENDS[-1] * BATCH, ends=[end * BATCH for end in ENDS],
    )  # fmt: skip
    for step in [*range(0, 1100, 7), *range(0, 16001, 50)]:
        assert _at(scheduler, step * BATCH) == pytest.approx(_plain_wsds(step, 100), abs=1e-15), step
    assert [_at(scheduler, end * BATCH) for end in ENDS] == [0] * 5
    assert [_at(scheduler, (end + 1) * BATCH) for end in ENDS[:-1]] == [PEAK] * 4


def test_wsds_resumes_and_refuses_another_schedule() -> None:
    settings: dict[str, Any] = {"min_lr": 0.0, "lr_decay_style": "WSD", "wsd_decay_steps": 1, "lr_warmup_steps": 1}
    settings |= {"lr_decay_steps": 100}
    first = _scheduler(WsdsScheduler, ends=[50, 100], **settings)
    first.step(48)
    second = _scheduler(WsdsScheduler, ends=[50, 100], **settings)
    second.load_state_dict(first.state_dict())
    assert second.num_steps == 48 and second.optimizer.param_groups[0]["lr"] == pytest.approx(PEAK * 2 / 5)
    with pytest.raises(AssertionError, match="WSD-S periods"):
        _scheduler(WsdsScheduler, ends=[60, 100], **settings).load_state_dict(first.state_dict())
    plain = _scheduler(**settings)
    with pytest.raises(ValueError, match="--wsds-periods: the checkpoint was trained under another schedule"):
        _scheduler(WsdsScheduler, ends=[50, 100], **settings).load_state_dict(plain.state_dict())


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--wsds-periods", "5,4"], "--wsds-periods 5,4: must be ascending"),
        (["--wsds-periods", "a"], "--wsds-periods a: must be ascending"),
        (["--wsds-periods", "50,100"], "--lr-decay-style cosine: with --wsds-periods the only legal style is WSD"),
        (["--wsds-periods", "50,90", "--lr-decay-style", "WSD"], "ends at 90, --train-iters 100; make them equal"),
        (["--wsds-periods", "10,100", "--lr-decay-style", "WSD"], "--lr-warmup-iters 10: .*nearest legal: 9"),
        (["--fp16"], "--fp16: --skip-step cannot take back"),
        (["--optimizer", "muon"], "--optimizer muon: --skip-step cannot take back"),
        (["--z-loss", "-1"], "--z-loss -1.0: must be finite and not negative"),
    ],
)
def test_refused_in_one_line(given: list[str], said: str) -> None:
    with pytest.raises(FlagError, match=said):
        check(["--mock-data", *compose("olmo-hybrid-tiny", given)])


def test_periods_are_read_as_numbers() -> None:
    assert wsds_ends("1,20,300") == [1, 20, 300] and wsds_ends("") == []
