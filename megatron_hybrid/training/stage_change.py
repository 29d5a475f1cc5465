"""A stage's first start that takes Adam's moments and step counts from the stage before (--keep-moments).

Megatron takes a --pretrained-checkpoint's weights alone. It has a way to take optimizer state with them, for another
purpose (a GPTModel's checkpoint into a HybridModel): iteration, schedule, samples and random state start anew, and so
does SkipStep's window here. What is saved of each parameter group, and is the old stage's, becomes the new one's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from megatron_hybrid.checkpoint.discovery import Unloadable
from megatron_hybrid.training.skip_step import STATE_KEY

#: What tells parameter groups apart in every stage; the other keys of a group are a stage's rates, or Adam's state.
_KIND = ("wd_mult", "lr_mult", "is_expert_parallel", "is_decoupled_lr", "optimizer")
#: A stage's own.
_RATES = ("max_lr", "min_lr", "start_wd", "end_wd", "lr", "weight_decay", "betas", "eps")


def install() -> None:
    """Let Megatron's trainer keep them; Unloadable where the checkpoint has none."""
    from megatron.training import checkpointing, training

    checkpointing._maybe_setup_gpt_to_hybrid_load = _with_optimizer_state(checkpointing._maybe_setup_gpt_to_hybrid_load)
    training.load_checkpoint = _with_new_rates(training.load_checkpoint)


def _with_optimizer_state(original: Callable[..., Any]) -> Callable[..., Any]:
    """Megatron asks it whether to load optimizer state though iteration and schedule start anew."""

    def asked(args: Any, saved_args: Any, model: Any) -> tuple[Any, bool]:
        layer_maps, load = original(args, saved_args, model)
        if not args.finetune:
            return layer_maps, load
        if not hasattr(saved_args, "lr") or getattr(saved_args, "no_save_optim", False):
            raise Unloadable(
                f"--keep-moments: no optimizer state in --pretrained-checkpoint {args.pretrained_checkpoint}; give one "
                "that has it, or add --no-keep-moments, and Adam's moments start at zero"
            )
        return layer_maps, True

    return asked


def _with_new_rates(load_checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    def load(model: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        from megatron.training import get_args

        plain = optimizer.load_state_dict

        def fitted(state: dict[str, Any]) -> Any:
            if get_args().finetune:
                state.pop(STATE_KEY, None)
                _take_rates(optimizer.param_groups, state)
            return plain(state)

        optimizer.load_state_dict = fitted
        try:
            return load_checkpoint(model, optimizer, *args, **kwargs)
        finally:
            optimizer.load_state_dict = plain

    return load


def _take_rates(current: list[dict[str, Any]], state: dict[str, Any]) -> None:
    """Give every saved group the rates of this run's group of its kind."""

    def kind(group: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(group.get(key, group.get(f"pre_{key}")) for key in _KIND)

    ours = {kind(group): group for group in current}
    for group in _saved_groups(state):
        if kind(group) not in ours:
            raise ValueError(
                f"--keep-moments: no parameters here with {dict(zip(_KIND, kind(group), strict=True))}, as in the "
                "checkpoint; give the --weight-decay-on it was trained with, or add --no-keep-moments"
            )
        mine = ours[kind(group)]
        for key in _RATES:
            if key in mine:
                group[key] = mine[key]
            else:
                group.pop(key, None)


def _saved_groups(state: Any) -> Iterator[dict[str, Any]]:
    """Every parameter group in a (chained) optimizer's state."""
    if isinstance(state, dict):
        for key, value in state.items():
            if key == "param_groups":
                yield from value
            else:
                yield from _saved_groups(value)
