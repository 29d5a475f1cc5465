"""How the mixers are: decay, beta and state of each Gated DeltaNet layer, gradient norms of both kinds of mixer apart.

Measured in iterations that are logged, from the gates' projection, from the states after the last token of each
document (of each sequence, unless documents are masked), and from the reduced gradients before clipping. One message
over all ranks each time.
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
        #: [layers, 5]: sums over tokens and heads of decay and of saturation, and their number; sum over documents and
        #: heads of the Frobenius norms of final states, and their number.
        self._sums = torch.zeros(layers, 5, dtype=torch.float64)
        self._squares = torch.zeros(2, dtype=torch.float64)
        self._parameters: list[tuple[int, torch.nn.Parameter, Any]] = []

    def watch(self, model_chunks: Iterable[torch.nn.Module], optimizer: Any) -> None:
        """Hook into the model's Gated DeltaNet layers, and into `optimizer`, a ChainedOptimizer."""
        leaves = [leaf for leaf in optimizer.chained_optimizers if isinstance(leaf, DistributedOptimizer)]
        for chunk in model_chunks:
            for module in chunk.modules():
                if isinstance(module, GatedDeltaNet):
                    module.ab_proj.register_forward_hook(self._gate_hook(module))
                    module.state_observer = _StateNorms(self, module.layer_number)
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
            self.add(mixer.layer_number, 0, [decay.sum(), saturated.sum(), torch.full_like(decay.sum(), decay.numel())])

        return hook

    def add(self, layer: int, first: int, values: list[torch.Tensor]) -> None:
        """Add scalars to a layer's sums from the `first` on. layer: from 1."""
        self._sums = self._sums.to(values[0].device)
        self._sums[layer - 1, first : first + len(values)] += torch.stack([value.double() for value in values])

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
        device = self._parameters[0][1].device if self._parameters else self._sums.device
        totals = [torch.stack(part).sum() if part else torch.zeros((), device=device) for part in sums]
        self._squares = torch.stack(totals).double() / copies

    def collect(self) -> tuple[dict[str, float], dict[str, float]]:
        """(for the log line, for the writers only), over all ranks and since the last call. Every rank calls it."""
        message = torch.cat([self._sums.flatten(), self._squares.to(self._sums.device)])
        dist.all_reduce(message)
        sums, squares = message[:-2].view(-1, 5).cpu(), message[-2:].cpu()
        self._sums.zero_()
        known = sums[:, 2] > 0
        line: dict[str, float] = {}
        layers: dict[str, float] = {}
        columns = {"gdn decay": (0, 2), "gdn beta saturated": (1, 2), "gdn state norm": (3, 4)}
        for name, (column, count) in columns.items() if known.any() else ():
            means = sums[:, column] / sums[:, count].clamp(min=1)
            line[name] = float(means[known].mean())
            layers |= {f"{name}/layer {layer + 1}": float(means[layer]) for layer in known.nonzero().flatten().tolist()}
        norms = squares.sqrt().tolist()
        line |= {f"grad norm {kind}": norm for kind, norm in zip(("gdn", "attention"), norms, strict=True) if norm}
        return line, layers


class _StateNorms:
    """The state observer of one layer."""

    def __init__(self, health: Health, layer: int) -> None:
        self.health, self.layer = health, layer

    @property
    def wanted(self) -> bool:
        return self.health.enabled

    @torch.no_grad()
    def __call__(self, states: torch.Tensor) -> None:
        """Empty documents, and heads that are padding, have states of zeros: they do not count."""
        norms = torch.linalg.matrix_norm(states.float())
        self.health.add(self.layer, 3, [norms.sum(), (norms > 0).sum()])


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
