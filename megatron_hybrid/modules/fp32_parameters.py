"""Parameters that stay in fp32 while Megatron casts the model to bf16, and Megatron's optimizers made right for them.

Megatron-Core has no such parameters itself. Two of its optimizers pair them with the wrong state or save another one,
and with gradients in bf16 the norm and the clipping of gradients read and write past their ends:

- `DistributedOptimizer` remembers each parameter's place in its group, then builds the groups anew with the fp32
  parameters first. From then on master weights and moments of other parameters are saved and loaded in their stead:
  an error where shapes differ, silence where they do not.
- `Float16OptimizerWithFloat16Params` numbers only the bf16 parameters when it saves.
- With --main-grads-dtype bf16 the gradients of fp32 parameters stay fp32, and the fused kernels of norm and clipping
  take every tensor for one of the first one's dtype: a wrong norm and a wrong update, or an illegal memory access.
- With --use-precision-aware-optimizer the masters are Transformer Engine's Adam's. It makes one of every parameter, and
  never updates that of an fp32 parameter, which is trained itself: what is saved as its master is its first value.

`support_in_optimizers` mends all but the second, which it refuses. It also refuses to save masters of which that Adam
holds the lower 16 bits alone (`OptimizerConfig.store_param_remainders`). Layers with fp32 parameters call it when
they are built in a 16-bit model, so that no training script can forget it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from megatron.core.optimizer import clip_grads
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params


def keeping_fp32(
    fn: Callable[[torch.Tensor], torch.Tensor], params: Iterable[torch.nn.Parameter]
) -> Callable[[torch.Tensor], torch.Tensor]:
    """`fn` of `Module._apply`, except that it may move but not cast `params`."""
    kept = {id(param) for param in params}

    def apply(tensor: torch.Tensor) -> torch.Tensor:
        result = fn(tensor)
        return tensor.to(result.device) if id(tensor) in kept and result.dtype != tensor.dtype else result

    return apply


_supported = False


def support_in_optimizers() -> None:
    """Mend or refuse Megatron's optimizers for models with fp32 parameters (see above). Safe to call again."""
    global _supported
    if _supported:
        return
    _supported = True
    DistributedOptimizer._build_optimizer_group_ranges = classmethod(
        _fp32_first(DistributedOptimizer._build_optimizer_group_ranges.__func__)
    )
    DistributedOptimizer._get_main_param_and_optimizer_states = _true_masters(
        DistributedOptimizer._get_main_param_and_optimizer_states
    )
    Float16OptimizerWithFloat16Params.sharded_state_dict = _refused_with_fp32(
        Float16OptimizerWithFloat16Params.sharded_state_dict
    )
    clip_grads.multi_tensor_applier = one_dtype_at_a_time(clip_grads.multi_tensor_applier, clip_grads.l2_norm_impl)


def _fp32_first(original: Callable[..., Any]) -> Callable[..., Any]:
    """Order each group as `_build_model_and_main_param_groups` will: fp32 parameters first, then the 16-bit ones."""

    def build(cls: type, param_groups: list[dict], gbuf_ranges: list[dict]) -> tuple[dict, list[dict]]:
        place, groups = original(cls, param_groups, gbuf_ranges)
        for index, group in enumerate(groups):
            group["params"].sort(key=lambda param: param.dtype != torch.float32)  # stable
            place.update({param: (index, order) for order, param in enumerate(group["params"])})
        return place, groups

    return build


def _true_masters(original: Callable[..., Any]) -> Callable[..., Any]:
    """What is saved of a parameter, with its master as it is."""

    def states(self: Any, model_param: torch.Tensor) -> dict[str, torch.Tensor]:
        tensors = original(self, model_param)
        if tensors["param"].dtype == torch.int16:
            raise RuntimeError(
                "Transformer Engine's Adam holds the lower 16 bits of the fp32 masters alone, and Megatron would save "
                "those as if they were the masters: set OptimizerConfig.store_param_remainders = False"
            )
        if model_param.dtype == torch.float32:
            group, order = self.model_param_group_index_map[model_param]
            tensors["param"] = self.optimizer.param_groups[group]["params"][order]
        return tensors

    return states


def _refused_with_fp32(original: Callable[..., Any]) -> Callable[..., Any]:
    def sharded_state_dict(self: Any, *args: Any, **kwargs: Any) -> Any:
        if any(self.fp32_from_fp32_groups):
            raise RuntimeError(
                "Megatron's plain bf16 optimizer cannot save a model with fp32 parameters (A_log, dt_bias): "
                "use --use-distributed-optimizer, or --no-save-optim"
            )
        return original(self, *args, **kwargs)

    return sharded_state_dict


def one_dtype_at_a_time(applier: Callable[..., Any], norm: Callable[..., Any]) -> Callable[..., Any]:
    """`applier` of a fused operation to lists of tensors, called once for each combination of dtypes.

    Args:
        norm: the operation whose results, (norm [1], None) of each call, are put together; others return nothing.
    """

    def apply(op: Callable[..., Any], overflow: torch.Tensor, lists: list[list[torch.Tensor]], *args: Any) -> Any:
        groups: dict[tuple[torch.dtype, ...], list[tuple[torch.Tensor, ...]]] = {}
        for column in zip(*lists, strict=True):
            groups.setdefault(tuple(tensor.dtype for tensor in column), []).append(column)
        if len(groups) < 2:
            return applier(op, overflow, lists, *args)
        results = [applier(op, overflow, list(map(list, zip(*group, strict=True))), *args) for group in groups.values()]
        return (torch.stack([result[0] for result in results]).norm(dim=0), None) if op is norm else None

    return apply
