"""How the mixers are: decay and beta of each Gated DeltaNet layer, gradient norms of the two kinds of mixer apart.

Measured in iterations that are logged, from the gates' projection and from the reduced gradients before clipping; the
mixers themselves are not touched. One message over all ranks each time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron_hybrid.modules.attention import OlmoAttention
from megatron_hybrid.modules.gated_delta_net import GatedDeltaNet
from megatron_hybrid.parallel.head_padding import split_of

#: Beta is saturated where its sigmoid is within this of 0 or 1.
SATURATED = 0.01


class Health:
    """Watches a model and its optimizer. `enabled` in the iterations that are to be measured."""

    def __init__(self, layers: int) -> None:
        """layers: of the whole model."""
        self.enabled = True
        #: [layers, 3]: sums over tokens and heads of decay and of saturation, and their number.
        self._gates = torch.zeros(layers, 3, dtype=torch.float64)
        self._squares = torch.zeros(2, dtype=torch.float64)
        self._parameters: list[tuple[int, torch.nn.Parameter, Any]] = []

    def watch(self, model_chunks: Iterable[torch.nn.Module], optimizer: Any) -> None:
        """Hook into the model's Gated DeltaNet layers, and into `optimizer`, a ChainedOptimizer."""
        leaves = [leaf for leaf in optimizer.chained_optimizers if isinstance(leaf, DistributedOptimizer)]
        for chunk in model_chunks:
            for module in chunk.modules():
                if isinstance(module, GatedDeltaNet):
                    module.ab_proj.register_forward_hook(self._gate_hook(module))
                if isinstance(module, (GatedDeltaNet, OlmoAttention)):
                    kind = int(isinstance(module, OlmoAttention))
                    self._parameters += [(kind, param, leaves) for param in module.parameters()]
        optimizer.get_grad_norm = self._before_clipping(optimizer.get_grad_norm)

    def _gate_hook(self, mixer: GatedDeltaNet) -> Callable[..., None]:
        split = split_of(mixer.A_log)
        heads = next(real for *_, real in split.shares()) if split is not None else mixer.value_heads

        @torch.no_grad()
        def hook(module: torch.nn.Module, inputs: Any, output: Any) -> None:
            if not (self.enabled and mixer.training):
                return
            a, b = (part[..., :heads].float() for part in output[0].chunk(2, dim=-1))
            decay = (-mixer.A_log[:heads].exp() * F.softplus(a + mixer.dt_bias[:heads])).exp()
            share = b.sigmoid()
            saturated = (share < SATURATED) | (share > 1 - SATURATED)
            self._gates = self._gates.to(a.device)
            self._gates[mixer.layer_number - 1] += torch.stack(
                [decay.sum().double(), saturated.sum().double(), torch.full_like(decay.sum(), decay.numel()).double()]
            )

        return hook

    def _before_clipping(self, grad_norm: Callable[[], Any]) -> Callable[[], Any]:
        def measuring() -> Any:
            if self.enabled:
                self._sum_squares()
            return grad_norm()

        return measuring

    @torch.no_grad()
    def _sum_squares(self) -> None:
        sums: list[list[torch.Tensor]] = [[], []]
        for kind, param, leaves in self._parameters:
            if not tensor_parallel.param_is_not_tensor_parallel_duplicate(param):
                continue
            start, end = _range(leaves, param)
            grad = cast(Any, param).main_grad.view(-1)[start:end]
            sums[kind].append(torch.linalg.vector_norm(grad, dtype=torch.float32).square())
        # Without the distributed optimizer all data-parallel ranks hold the whole gradient.
        copies = 1 if self._parameters and self._parameters[0][2] else _replicas()
        device = self._parameters[0][1].device if self._parameters else self._gates.device
        totals = [torch.stack(part).sum() if part else torch.zeros((), device=device) for part in sums]
        self._squares = torch.stack(totals).double() / copies

    def collect(self) -> tuple[dict[str, float], dict[str, float]]:
        """(for the log line, for the writers only), over all ranks and since the last call. Every rank calls it."""
        message = torch.cat([self._gates.flatten(), self._squares.to(self._gates.device)])
        dist.all_reduce(message)
        gates, squares = message[:-2].view(-1, 3).cpu(), message[-2:].cpu()
        self._gates.zero_()
        known = gates[:, 2] > 0
        line: dict[str, float] = {}
        layers: dict[str, float] = {}
        if known.any():
            means = gates[:, :2] / gates[:, 2:].clamp(min=1)
            line = {"gdn decay": float(means[known, 0].mean()), "gdn beta saturated": float(means[known, 1].mean())}
            for layer in known.nonzero().flatten().tolist():
                layers[f"gdn decay/layer {layer + 1}"] = float(means[layer, 0])
                layers[f"gdn beta saturated/layer {layer + 1}"] = float(means[layer, 1])
        norms = squares.sqrt().tolist()
        line |= {f"grad norm {kind}": norm for kind, norm in zip(("gdn", "attention"), norms, strict=True) if norm}
        return line, layers


def _range(leaves: list[DistributedOptimizer], param: torch.nn.Parameter) -> tuple[int, int | None]:
    """Which elements of a parameter this rank updates: what data-parallel ranks have reduced here."""
    for leaf in leaves:
        if param in leaf.model_param_gbuf_map:
            index, dtype, bucket = leaf.model_param_gbuf_map[param]
            here = leaf.gbuf_ranges[index][dtype][bucket]["param_map"][param]["param"]
            return here.start, here.end
    return 0, 0 if leaves else None


def _replicas() -> int:
    from megatron.core import parallel_state

    return parallel_state.get_data_parallel_world_size(with_context_parallel=True)
