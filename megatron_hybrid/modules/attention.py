"""Attention of the OLMo-Hybrid family: QK-norm before RoPE, RoPE in fp32, causal or sliding window.

Letters: s sequence, b batch, t tokens of a packed batch, h heads of this rank, d head dim.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.utils import is_layer_window_attention

from megatron_hybrid.modules.norms import QKNorm, QKNormWidth
from megatron_hybrid.parallel.head_padding import Part, describe_split, true_sizes
from megatron_hybrid.parallel.packed import routes_of
from megatron_hybrid.parallel.state_passing import all_gather


class OlmoAttention(SelfAttention):
    """Megatron's self-attention with OLMo's QK-norm, and RoPE applied in fp32 (Hugging Face and OLMo-core do so).

    Differences from the parent: the q/k norm is `QKNorm`; without fused RoPE kernels q and k go through RoPE in
    fp32 (the parent rounds cos and sin to the activation dtype); training only, no inference context.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: SelfAttentionSubmodules,
        layer_number: int,
        attn_mask_type: AttnMaskType = AttnMaskType.causal,
        qk_norm: QKNormWidth = "full",
        **kwargs: Any,
    ) -> None:
        if config.qk_layernorm or config.qk_l2_norm:
            raise ValueError(
                "--qk-layernorm / --qk-l2-norm: the OLMo-Hybrid spec brings its own q/k norm; "
                "leave the flag out and choose with --qk-norm-width full|head|none"
            )
        super().__init__(config, submodules, layer_number, attn_mask_type=attn_mask_type, **kwargs)
        if config.apply_rope_fusion and self._yarn_concentration_factor != 1:
            raise ValueError(
                "--position-embedding-type yarn: fused rotary embeddings leave out its attention factor "
                f"{self._yarn_concentration_factor:.4f}; add --no-rope-fusion"
            )
        self.qk_norm: QKNorm | None = None
        if qk_norm != "none":
            self.qk_norm = QKNorm(
                config,
                qk_norm,
                self.num_attention_heads_per_partition,
                self.num_query_groups_per_partition,
                self.hidden_size_per_attention_head,
                self.pg_collection.tp,
            )
        self._describe_splits()

    def _describe_splits(self) -> None:
        """Rows of linear_qkv are group after group: its query heads, its key, its value."""
        true, group = true_sizes(self.config), self.pg_collection.tp
        per_group = true.heads // true.groups
        rows = (per_group + 2) * self.hidden_size_per_attention_head
        columns = per_group * self.hidden_size_per_attention_head
        groups = self.config.num_query_groups
        for param in (self.linear_qkv.weight, self.linear_qkv.bias):
            describe_split(param, [Part(true.groups * rows, groups * rows)], group)
        describe_split(self.linear_proj.weight, [Part(true.groups * columns, groups * columns)], group, dim=1)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        key_value_states: torch.Tensor | None = None,
        inference_context: Any = None,
        rotary_pos_emb: torch.Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """hidden_states [s, b, D] → ([s, b, D], None). rotary_pos_emb: fp32 angles [s, 1, 1, d] or None (NoPE)."""
        if inference_context is not None:
            raise NotImplementedError("OlmoAttention has no inference context: export the model to Hugging Face")
        query, key, value = self.get_query_key_value_tensors(hidden_states)
        if self.qk_norm is not None:
            query, key = self.qk_norm(query, key)
        packed = packed_seq_params is not None and packed_seq_params.qkv_format == "thd"
        if packed:
            query, key, value = (x.squeeze(1) for x in (query, key, value))
        if rotary_pos_emb is not None:
            query, key = (self._rotate(x, rotary_pos_emb, packed_seq_params) for x in (query, key))
        run = self._checkpointed_attention_forward if self._recompute_core() else self._run_core
        output = run(
            query, key, value, attention_mask, attn_mask_type=self.attn_mask_type, packed_seq_params=packed_seq_params
        )
        if packed:
            output = output.reshape(output.size(0), 1, -1)
        return self.linear_proj(output)

    def _recompute_core(self) -> bool:
        return self.checkpoint_core_attention and self.training

    def _run_core(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.core_attention(*args, **kwargs)

    def _rotate(self, x: torch.Tensor, angles: torch.Tensor, packed_seq_params: PackedSeqParams | None) -> torch.Tensor:
        """x [s, b, h, d], or packed [t, h, d]; angles of this rank's positions, or packed of positions 0, 1, …"""
        group = self.pg_collection.cp
        cu_seqlens = None
        if packed_seq_params is not None and packed_seq_params.qkv_format == "thd":
            cu_seqlens = packed_seq_params.cu_seqlens_q
        if self.config.apply_rope_fusion:  # the fused kernels compute in fp32 inside and know the zigzag layout
            return apply_rotary_pos_emb(x, angles, config=self.config, cu_seqlens=cu_seqlens, cp_group=group)
        argument = x.float()  # the unfused path computes in its argument's dtype
        if cu_seqlens is not None and group.size() > 1:
            routes = routes_of(x.shape[0], 1, packed_seq_params, group, x.device)
            argument, angles, cu_seqlens = argument.unsqueeze(1), angles[routes.positions[group.rank()]], None
        rotated = apply_rotary_pos_emb(
            argument,
            angles,
            config=self.config,
            cu_seqlens=cu_seqlens,
            mscale=self._yarn_concentration_factor,  # HybridModel discards what its YaRN embedding returns
            cp_group=group,
        )
        return rotated.view(x.shape).to(x.dtype)


class SdpaAttention(torch.nn.Module):
    """Causal core attention by PyTorch's scaled_dot_product_attention: CPU, or a GPU without Transformer Engine.

    Sliding windows follow `config.window_size` = (left, 0): a query sees itself and `left` tokens before it. Under
    context parallelism every rank gathers all keys and values: simple and exact, for tests and small models.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        if attn_mask_type != AttnMaskType.causal:
            raise ValueError(f"SdpaAttention is causal, got attn_mask_type={attn_mask_type}")
        if config.attention_dropout:
            raise ValueError(f"--attention-dropout {config.attention_dropout}: OLMo-Hybrid has none, use 0")
        self.scale = softmax_scale
        self.cp_group = pg_collection.cp if pg_collection is not None else None
        windowed = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)
        self.left: int | None = config.window_size[0] if windowed else None

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> torch.Tensor:
        """query [s, b, h, d] → [s, b, h·d]; packed: [t, h, d] → [t, h·d], documents do not see each other."""
        if self.cp_group is not None and self.cp_group.size() > 1:
            return self._over_all_ranks(query, key, value, packed_seq_params, self.cp_group)
        if packed_seq_params is None:
            return self._causal(query, key, value)
        bounds = packed_seq_params.cu_seqlens_q.tolist()
        documents = [
            self._causal(*(x[start:end, None] for x in (query, key, value))).squeeze(1)
            for start, end in itertools.pairwise(bounds)
            if end > start
        ]
        return torch.cat(documents)

    def _causal(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        s, b = query.shape[:2]
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        mask = None
        if self.left is not None and s > self.left + 1:
            positions = torch.arange(s, device=q.device)
            mask = self._visible(positions[:, None] - positions)
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=self.scale, enable_gqa=True
        )
        return out.permute(2, 0, 1, 3).reshape(s, b, -1)

    def _visible(self, distance: torch.Tensor) -> torch.Tensor:
        """distance: of a query after a key, in tokens."""
        return distance >= 0 if self.left is None else (distance >= 0) & (distance <= self.left)

    def _over_all_ranks(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        packed: PackedSeqParams | None,
        group: torch.distributed.ProcessGroup,
    ) -> torch.Tensor:
        shape = query.shape
        rows = 1 if packed is not None else shape[1]
        routes = routes_of(shape[0], rows, packed, group, query.device)

        def as_tokens(x: torch.Tensor) -> torch.Tensor:  # [b·s, h, d], row after row as in the routes
            return x if packed is not None else x.transpose(0, 1).flatten(0, 1)

        k, v = (all_gather(as_tokens(x), group).flatten(0, 1) for x in (key, value))
        rank = group.rank()
        mask = routes.documents[rank][:, None] == routes.documents.flatten()
        mask &= self._visible(routes.positions[rank][:, None] - routes.positions.flatten())
        q, k, v = (x.transpose(0, 1)[None] for x in (as_tokens(query), k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.scale, enable_gqa=True)
        out = out[0].transpose(0, 1).flatten(1)  # [b·s, h·d]
        return out if packed is not None else out.unflatten(0, (rows, -1)).transpose(0, 1)
