"""RMSNorms of the OLMo-Hybrid family: local, on branch outputs, over the full q and k width, per GDN head.

Letters: s sequence, b batch, D hidden, h heads of this rank, d head dim.

All of them follow OLMo-2's order: to fp32, normalise, multiply by the weight in fp32, one cast back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group, make_sharded_tensors_for_checkpoint
from torch import nn
from torch.autograd.function import once_differentiable

from megatron_hybrid.parallel.head_padding import Part, describe_split, true_sizes

QKNormWidth = Literal["full", "head", "none"]


class RMSNorm(nn.Module):
    """RMSNorm over the hidden dimension, for models without Transformer Engine.

    Megatron's own torch norm refuses sequence parallelism. Here the weight carries the flag by which Megatron sums
    its gradient over the tensor-parallel ranks, each of which sees only its part of the sequence.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., D], any float dtype; same shape and dtype out."""
        return F.rms_norm(x.float(), (x.shape[-1],), self.weight.float(), self.eps).to(x.dtype)


def post_normed(linear: type, norm: type) -> type:
    """A row-parallel linear whose reduced output passes through `norm`: OLMo-2's "reordered norm".

    The norm comes after the sum over tensor-parallel ranks, where the hidden dimension is whole. Its weight is
    `<linear>.post_layernorm.weight`.
    """

    class PostNormed(linear):
        def __init__(
            self, input_size: int, output_size: int, *, config: TransformerConfig, bias: bool, **kwargs: Any
        ) -> None:
            if bias:
                raise ValueError("a post-normed block adds no bias after its norm: use --disable-bias-linear")
            super().__init__(input_size, output_size, config=config, bias=bias, **kwargs)
            self.post_layernorm = norm(config=config, hidden_size=output_size, eps=config.layernorm_epsilon)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
            output, bias = super().forward(x)
            return self.post_layernorm(output), bias

    PostNormed.__name__ = PostNormed.__qualname__ = f"{linear.__name__}PostNorm"
    return PostNormed


def pre_normed(norm: type, linear: type, fused: type | None) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Builders of a pre-norm and of the linear that alone reads its output: of an identity and `fused`, where there is
    one and `fuses_norms` allows it.

    The norm's weight is `<linear>.layer_norm_weight` then; the layer's `sharded_state_dict_keys_map` has to give it the
    norm's own name in checkpoints.
    """
    if fused is None:
        return norm, linear

    def build_norm(config: TransformerConfig, **kwargs: Any) -> Any:
        return IdentityOp() if fuses_norms(config) else norm(config=config, **kwargs)

    def build_linear(*sizes: int, config: TransformerConfig, **kwargs: Any) -> Any:
        return (fused if fuses_norms(config) else linear)(*sizes, config=config, **kwargs)

    return build_norm, build_linear


def fuses_norms(config: TransformerConfig) -> bool:
    """Not where Megatron computes the norm again by itself, which frees more, nor with an fp32 residual stream, which
    Transformer Engine's fused module refuses as its input."""
    recomputed = config.recompute_granularity == "selective" and "layernorm" in (config.recompute_modules or ())
    return not recomputed and not config.fp32_residual_connection


class QKNorm(nn.Module):
    """RMSNorm of queries and keys before RoPE, over the full projection width (OLMo) or over each head.

    `full`: weights [heads·d] are split over tensor-parallel ranks like the heads, and the sums of squares are added
    up over the ranks, q's and k's in one all-reduce. `head`: weights [d] are the same on every rank.

    The parameters must not be called q_layernorm or k_layernorm: with --qk-layernorm Megatron adds up the gradients
    of every parameter of those names over tensor-parallel ranks, which is wrong for split weights.
    """

    def __init__(
        self,
        config: TransformerConfig,
        width: QKNormWidth,
        query_heads: int,
        key_heads: int,
        head_dim: int,
        tp_group: torch.distributed.ProcessGroup,
    ) -> None:
        """query_heads, key_heads: those of this rank."""
        super().__init__()
        self.eps = config.layernorm_epsilon
        self.full = width == "full"
        self.tp_group = tp_group
        true = true_sizes(config)
        #: What the sums of squares are divided by: heads of zeros add nothing to them.
        self.true_widths = (true.heads * head_dim, true.groups * head_dim)
        sizes = (query_heads * head_dim, key_heads * head_dim) if self.full else (head_dim, head_dim)
        self.q_weight, self.k_weight = (nn.Parameter(torch.ones(n, dtype=config.params_dtype)) for n in sizes)
        if self.full:
            for weight, true_width in zip((self.q_weight, self.k_weight), self.true_widths, strict=True):
                set_tensor_model_parallel_attributes(tensor=weight, is_parallel=True, dim=0, stride=1)
                describe_split(weight, [Part(true_width, weight.numel() * tp_group.size())], tp_group)

    def forward(self, query: torch.Tensor, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """query [s, b, h, d], key [s, b, h_kv, d]: both normalised, shapes and dtypes kept."""
        normalise = self._over_full_width if self.full else self._over_each_head
        return normalise(query, key)

    def _over_full_width(self, query: torch.Tensor, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if query.is_cuda:
            return FullWidthNorm.apply(
                query, key, self.q_weight, self.k_weight, self.true_widths, self.eps, self.tp_group
            )
        q_fp32, k_fp32 = query.float(), key.float()
        squares = torch.stack([x.square().sum(dim=(-2, -1)) for x in (q_fp32, k_fp32)], dim=-1)  # [s, b, 2]
        if self.tp_group.size() > 1:
            # Every rank's output depends on every rank's squares: all-reduce forward and, through copy_to, backward.
            squares = copy_to_tensor_model_parallel_region(
                reduce_from_tensor_model_parallel_region(squares, group=self.tp_group), group=self.tp_group
            )

        def scaled(x_fp32: torch.Tensor, squares: torch.Tensor, weight: torch.Tensor, width: int) -> torch.Tensor:
            inverse_rms = torch.rsqrt(squares / width + self.eps)[..., None, None]
            return x_fp32 * inverse_rms * weight.float().view(x_fp32.shape[-2:])

        q_normed = scaled(q_fp32, squares[..., 0], self.q_weight, self.true_widths[0]).to(query.dtype)
        k_normed = scaled(k_fp32, squares[..., 1], self.k_weight, self.true_widths[1]).to(key.dtype)
        return q_normed, k_normed

    def _over_each_head(self, query: torch.Tensor, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        def normed(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            weight = shared_by_heads(weight, self.tp_group)
            return F.rms_norm(x.float(), (x.shape[-1],), weight.float(), self.eps).to(x.dtype)

        return normed(query, self.q_weight), normed(key, self.k_weight)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """Full-width weights are split along dim 0 over tensor-parallel ranks, per-head ones are replicated."""
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"q_weight": 0, "k_weight": 0} if self.full else {},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )


class FullWidthNorm(torch.autograd.Function):
    """`QKNorm` over the full width with the kernels of kernels/triton_norm.py: what PyTorch does in twelve passes.

    Every rank's output depends on every rank's squares, so the sums of squares forward, and of dy w x backward, of
    both q and k are added up over the ranks in one all-reduce.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        q_weight: torch.Tensor,
        k_weight: torch.Tensor,
        widths: tuple[int, int],
        eps: float,
        group: torch.distributed.ProcessGroup,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        from megatron_hybrid.kernels.triton_norm import norm

        squares = torch.empty(2, query.shape[0] * query.shape[1], dtype=torch.float32, device=query.device)
        columns = zip((query, key), (q_weight, k_weight), squares, widths, strict=True)
        rows: list[dict[str, Any]] = [
            {"x": x, "weight": weight, "squares": total, "width": width, "eps": eps}
            for x, weight, total, width in columns
        ]
        if group.size() > 1:
            for row in rows:
                norm(**row, stage="sums")
            torch.distributed.all_reduce(squares, group=group)
        (q, q_rstd), (k, k_rstd) = (norm(**row, stage="apply" if group.size() > 1 else "whole") for row in rows)
        ctx.save_for_backward(query, key, q_weight, k_weight, q_rstd, k_rstd)
        ctx.widths, ctx.group = widths, group
        return q, k

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        from megatron_hybrid.kernels.triton_norm import norm_gradient

        saved = ctx.saved_tensors
        dots = torch.empty(2, *saved[4].shape, dtype=torch.float32, device=saved[4].device)
        columns = zip(saved[:2], saved[2:4], saved[4:], grads, dots, ctx.widths, strict=True)
        rows: list[dict[str, Any]] = [
            {"x": x, "weight": weight, "rstd": rstd, "dy": dy, "dots": total, "width": width}
            for x, weight, rstd, dy, total, width in columns
        ]
        if ctx.group.size() > 1:
            dweights = tuple(norm_gradient(**row, stage="sums")[1] for row in rows)
            torch.distributed.all_reduce(dots, group=ctx.group)
            inputs = tuple(norm_gradient(**row, stage="apply")[0] for row in rows)
        else:
            inputs, dweights = zip(*(norm_gradient(**row, stage="whole") for row in rows), strict=True)
        return *inputs, *(dw.to(w.dtype) for dw, w in zip(dweights, saved[2:4], strict=True)), None, None, None


def shared_by_heads(weight: torch.Tensor, tp_group: torch.distributed.ProcessGroup) -> torch.Tensor:
    """A weight that is the same for all heads while the heads are split over tensor-parallel ranks.

    Each rank's gradient covers its own heads only. Megatron adds such gradients up only under sequence parallelism
    (and only for parameters it knows), so the sum is taken here, in backward, with and without it.
    """
    return copy_to_tensor_model_parallel_region(weight, group=tp_group)


class HeadNorm(nn.Module):
    """Holds the weight [V] of the GDN output norm, one for all heads; the norm itself runs fused with the gate."""

    def __init__(self, config: TransformerConfig, head_dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(head_dim, dtype=config.params_dtype))
