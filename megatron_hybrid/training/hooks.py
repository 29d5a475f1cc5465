"""What the plugin replaces in Megatron's trainer: names in `megatron.training.training`, each for one reason.

Megatron's `pretrain` has no argument for the optimizer, its schedule or the log line.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from megatron_hybrid.checkpoint import masters
from megatron_hybrid.config import HybridConfig
from megatron_hybrid.training import weight_decay
from megatron_hybrid.training.health import Health
from megatron_hybrid.training.log_line import LogLine, Wait
from megatron_hybrid.training.schedule import WsdsScheduler
from megatron_hybrid.training.skip_step import SkipStep

#: {name: parameters that the replacement relies on}
_EXPECTED = {
    "get_megatron_optimizer": {"config", "model_chunks", "config_overrides"},
    "training_log": {"loss_dict", "total_loss_dict", "iteration", "skipped_iter", "is_first_iteration"},
    "OptimizerParamScheduler": {"optimizer", "lr_warmup_steps", "lr_decay_steps"},
}


def prepare(args: Any, wsds_ends: list[int]) -> dict[str, Any]:
    """Install what parsed arguments ask for. Returns options of the forward step.

    Args:
        args: Megatron's, parsed, with the plugin's.
        wsds_ends: see `install`.
    """
    skip_step = SkipStep() if args.skip_step else None
    layers = len(args.hybrid_layer_pattern.replace("|", ""))
    wait, health = Wait(), Health(layers) if args.log_health else None
    install(HybridConfig.from_args(args), skip_step, wsds_ends, health, LogLine(args, wait, skip_step, health))
    observe = skip_step.observe if skip_step is not None else None
    return {"z_loss": args.z_loss, "observe": observe, "wait": wait}


def install(
    options: HybridConfig,
    skip_step: SkipStep | None = None,
    wsds_ends: list[int] | None = None,
    health: Health | None = None,
    log_line: LogLine | None = None,
) -> None:
    """Replace them, for the rest of the process.

    Args:
        options: the plugin's flags.
        skip_step: attached to the optimizer when it is built; None for none.
        wsds_ends: ends of the WSD-S periods in samples; none for Megatron's schedules.
        health: watches model and optimizer when they are built.
        log_line: what the log says besides Megatron's.

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
    training.get_megatron_optimizer = optimizer_builder(training.get_megatron_optimizer, options, skip_step, health)
    if wsds_ends:
        training.OptimizerParamScheduler = partial(WsdsScheduler, ends=wsds_ends)
    if log_line is not None:
        training.training_log = log_line.around(training.training_log)


def optimizer_builder(
    original: Callable[..., Any],
    options: HybridConfig,
    skip_step: SkipStep | None = None,
    health: Health | None = None,
) -> Callable[..., Any]:
    """Megatron's `get_megatron_optimizer`, with the plugin's rules; arguments as in `install`."""

    def get_megatron_optimizer(config: Any, model_chunks: Any, config_overrides: Any = None, **kwargs: Any) -> Any:
        # Else Transformer Engine's Adam holds the lower half of each fp32 master beside a bf16 weight, and Megatron
        # saves those integers as if they were the master (modules/fp32_parameters.py).
        config.store_param_remainders = False
        overrides = weight_decay.overrides(config_overrides, config, options.weight_decay_on)
        optimizer = original(config, model_chunks, config_overrides=overrides, **kwargs)
        if any(chunk.config.fp8_param or chunk.config.fp4_param for chunk in model_chunks):
            masters.never_from_weights(optimizer)
        if skip_step is not None:
            skip_step.attach(optimizer)
        if health is not None:
            health.watch(model_chunks, optimizer)
        return optimizer

    return get_megatron_optimizer
