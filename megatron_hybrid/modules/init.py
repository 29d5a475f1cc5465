"""Initialisation of OLMo-core HEAD: truncated normal everywhere, no depth scaling, sampled in fp32.

Source: OLMo-core after PR #602. The released 7B was started before that fix; new runs should use this one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer import TransformerConfig

Sampler = Callable[[torch.Tensor], object]

#: U(0, 16) is drawn in steps of 16·2⁻²⁴; a draw of exactly 0 would give A_log = −inf, so it becomes the first step.
SMALLEST_DECAY_RATE = 2.0**-20


class TruncatedNormal:
    """Fill a tensor from N(0, std²) cut at ±3 std, sampled in fp32 whatever the tensor's dtype.

    A class, not a closure, because Megatron pickles its configuration into checkpoints.
    """

    def __init__(self, std: float) -> None:
        self.std = std

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            sample_fp32 = torch.empty_like(tensor, dtype=torch.float32)
            torch.nn.init.trunc_normal_(sample_fp32, std=self.std, a=-3 * self.std, b=3 * self.std)
            return tensor.copy_(sample_fp32)


def use_olmo_init(config: TransformerConfig) -> None:
    """Make Megatron build every linear and embedding with `TruncatedNormal(config.init_method_std)`.

    Megatron's default divides the output projections' std by √(2·layers); OLMo's models do not.
    """
    init = TruncatedNormal(config.init_method_std)
    config.init_method = init
    config.output_layer_init_method = init
    config.embedding_init_method = init


def sample_a_log(tensor: torch.Tensor) -> None:
    """A_log = log U(0, 16), finite. tensor: any shape, fp32."""
    tensor.uniform_(0.0, 16.0).clamp_(min=SMALLEST_DECAY_RATE).log_()


def sample_dt_bias(tensor: torch.Tensor, low: float = 1e-3, high: float = 0.1, floor: float = 1e-4) -> None:
    """dt_bias such that softplus(dt_bias) is log-uniform in [low, high], at least `floor`. tensor: fp32."""
    tensor.uniform_(math.log(low), math.log(high)).exp_().clamp_(min=floor)
    tensor.copy_(tensor + torch.log(-torch.expm1(-tensor)))


def init_sharded_(
    param: torch.nn.Parameter,
    sections: Sequence[int],
    sample: Sampler,
    config: TransformerConfig,
    tp_group: torch.distributed.ProcessGroup,
) -> None:
    """Sample a parameter that tensor parallelism splits along dim 0, and mark it as split.

    With `use_cpu_initialization` all ranks sample the same full tensor and keep their rows; else each rank samples its
    own shard from its own generator, as Megatron's linears do.

    Args:
        param: local shard; dim 0 = Σ sections / TP, the sections one after another.
        sections: full (unsplit) sizes of the parts that dim 0 is made of, e.g. (H·K, H·K, H·V).
        sample: fills an fp32 tensor in place.
    """
    set_tensor_model_parallel_attributes(tensor=param, is_parallel=True, dim=0, stride=1)
    if not config.perform_initialization or param.is_meta:
        return
    rest = tuple(param.shape[1:])
    with torch.no_grad():
        if config.use_cpu_initialization:
            parts = []
            for size in sections:
                full_fp32 = torch.empty(size, *rest, dtype=torch.float32)
                sample(full_fp32)
                parts.append(full_fp32.chunk(tp_group.size())[tp_group.rank()])
            param.copy_(torch.cat(parts))
        else:
            with get_cuda_rng_tracker().fork():
                local_fp32 = torch.empty_like(param, dtype=torch.float32)
                sample(local_fp32)
                param.copy_(local_fp32)
