"""What the plugin replaces in Megatron's trainer: names in `megatron.training.training`, each for one reason.

Megatron's `pretrain` has no argument for the optimizer, its schedule or the log line.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from megatron_hybrid.config import HybridConfig
from megatron_hybrid.training import weight_decay
from megatron_hybrid.training.schedule import WsdsScheduler
from megatron_hybrid.training.skip_step import SkipStep

#: {name: parameters that the replacement relies on}
_EXPECTED = {
    "get_megatron_optimizer": {"config", "model_chunks", "config_overrides"},
    "training_log": {"loss_dict", "total_loss_dict", "iteration", "skipped_iter"},
    "OptimizerParamScheduler": {"optimizer", "lr_warmup_steps", "lr_decay_steps"},
}


def install(options: HybridConfig, skip_step: SkipStep | None, wsds_ends: list[int]) -> None:
    """Replace them, for the rest of the process.

    Args:
        options: the plugin's flags.
        skip_step: attached to the optimizer when it is built; None for none.
        wsds_ends: ends of the WSD-S periods in samples; empty for Megatron's schedules.

    Raises:
        RuntimeError: Megatron's trainer is not the one that this was written for.
    """
    from megatron.training import training

    for name, needed in _EXPECTED.items():
        missing = needed - set(inspect.signature(getattr(training, name, lambda: None)).parameters)
        if missing:
            raise RuntimeError(
                f"megatron.training.training.{name} has no {', '.join(sorted(missing))}: another Megatron than 0.19.2; "
                "install the pinned versions (setup.py)"
            )
    training.get_megatron_optimizer = _optimizer(training.get_megatron_optimizer, options, skip_step)
    if wsds_ends:
        training.OptimizerParamScheduler = partial(WsdsScheduler, ends=wsds_ends)
    if skip_step is not None:
        training.training_log = _log_line(training.training_log, skip_step)


def _optimizer(original: Callable[..., Any], options: HybridConfig, skip_step: SkipStep | None) -> Callable[..., Any]:
    def get_megatron_optimizer(config: Any, model_chunks: Any, config_overrides: Any = None, **kwargs: Any) -> Any:
        overrides = weight_decay.overrides(config_overrides, config, options.weight_decay_on)
        optimizer = original(config, model_chunks, config_overrides=overrides, **kwargs)
        if skip_step is not None:
            skip_step.attach(optimizer)
        return optimizer

    return get_megatron_optimizer


def _log_line(original: Callable[..., Any], skip_step: SkipStep) -> Callable[..., Any]:
    """Whatever is in the losses of a step is averaged, printed and written by Megatron."""

    def training_log(loss_dict: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if loss_dict:  # ranks of the last pipeline stage, which print
            loss_dict = {**loss_dict, "skipped steps": skip_step.skipped.float()}
        return original(loss_dict, *args, **kwargs)

    return training_log
