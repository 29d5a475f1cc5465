"""Parameters that are read without calling their module, under Megatron's --overlap-param-gather."""

from __future__ import annotations

from torch import nn


def wait_for_parameters(*modules: nn.Module) -> None:
    """What Megatron has hooked before a call of each module: to wait until its parameters are gathered.

    A bucket of parameters that nothing waits for is read while it is still being filled, and stops the run at the
    next step's gather.
    """
    for module in modules:
        for hook in module._forward_pre_hooks.values():
            hook(module, ())
