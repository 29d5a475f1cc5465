"""A stretch of a layer whose output and inner activations are computed again in the backward pass.

Megatron's `CheckpointWithoutOutput` does the same with a C++ extension that it compiles at the first backward; here the
bytes are copied once instead, and no compiler or ninja is needed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer import TransformerConfig
from torch import Tensor
from torch.autograd.function import once_differentiable

#: In --recompute-modules: what lies between a Gated DeltaNet mixer's projections is computed again.
NORM_OUT = "gdn_norm_out"


class Recomputed:
    """Runs `run(*inputs)` and keeps only the inputs. `output` is to be read by one module, whose result goes to
    `discard_until`; before that module's backward the output is there again.

    Gradients flow to the inputs and to every parameter that `run` uses. There is no random state to restore: `run` must
    draw none.
    """

    def __init__(self, run: Callable[..., Tensor], *inputs: Tensor) -> None:
        self._run = run
        self._inputs: tuple[Tensor, ...] = ()
        self._again: Tensor | None = None
        self.output: Tensor = _Recompute.apply(self, *inputs)

    def discard_until(self, result: Tensor) -> None:
        """Free the output's memory until the gradient of `result`, which was computed from it, is known."""
        storage = self.output.untyped_storage()
        size = storage.nbytes()
        storage.resize_(0)
        del self.output  # its graph holds this object: a circle that would never be freed

        def recompute(_: Tensor) -> None:
            self._inputs = tuple(x.detach().requires_grad_(x.requires_grad) for x in self._inputs)
            with torch.enable_grad():
                self._again = self._run(*self._inputs)
            storage.resize_(size)
            storage.copy_(self._again.untyped_storage())  # the bytes alone: autograd sees no new version

        result.register_hook(recompute)

    def backward(self, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the inputs from that of the output. Nothing is kept: the graph outlives this layer's turn."""
        assert self._again is not None, "discard_until was not called with what was computed from the output"
        again, inputs = self._again, self._inputs
        self._again, self._inputs = None, ()
        torch.autograd.backward(again, grad)
        return tuple(x.grad for x in inputs)


class _Recompute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, owner: Recomputed, *inputs: Tensor) -> Tensor:
        ctx.owner = owner
        owner._inputs = inputs
        return owner._run(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.owner.backward(grad)


def allowing_norm_out(
    make: Callable[[dict[str, Any]], TransformerConfig],
) -> Callable[[dict[str, Any]], TransformerConfig]:
    """`make` for settings whose `recompute_modules` hold NORM_OUT: Megatron takes it in GPTModel's variant only."""

    def made(settings: dict[str, Any]) -> TransformerConfig:
        modules = settings.get("recompute_modules")
        if not modules or NORM_OUT not in modules:
            return make(settings)
        config = make({**settings, "recompute_modules": [name for name in modules if name != NORM_OUT]})
        config.recompute_modules = list(modules)
        return config

    return made
