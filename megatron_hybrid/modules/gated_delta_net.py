"""Gated DeltaNet mixer of OLMo-Hybrid, tensor- and sequence-parallel.

Letters: s sequence, b batch, D hidden, H value heads, Hk key heads, K key dim, V value dim (H, Hk: of this rank).

Differences from Megatron-Core 0.19's `GatedDeltaNet`, each of which makes another model if missed: beta in (0, 2);
A_log and dt_bias kept in fp32; output norm eps of its own; the output norm's gradient summed over tensor-parallel ranks
with and without sequence parallelism; OLMo's initialisation; the projection split in two, so that the wide one can run
in FP8.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, Protocol

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    make_sharded_tensors_for_checkpoint,
    sharded_state_dict_default,
)
from torch import nn

from megatron_hybrid.kernels.gated_delta import mixer_core
from megatron_hybrid.modules.fp32_parameters import keeping_fp32, support_in_optimizers
from megatron_hybrid.modules.init import Sampler, TruncatedNormal, init_sharded_, sample_a_log, sample_dt_bias
from megatron_hybrid.modules.norms import HeadNorm, shared_by_heads
from megatron_hybrid.modules.parameter_gather import wait_for_parameters
from megatron_hybrid.modules.recompute import NORM_OUT, Recomputed
from megatron_hybrid.parallel import state_passing
from megatron_hybrid.parallel.head_exchange import check_heads, share, to_heads, to_tokens
from megatron_hybrid.parallel.head_padding import Part, describe_split, true_sizes, without_padding
from megatron_hybrid.parallel.packed import routes_of
from megatron_hybrid.parallel.routes import Routes


@dataclass
class GatedDeltaNetSubmodules:
    """The three linears: q|k|v|z (wide, FP8-able), a|b (kept in the parameter dtype), output."""

    in_proj: ModuleSpec | type
    ab_proj: ModuleSpec | type
    out_proj: ModuleSpec | type


GdnCpCommType = state_passing.Exchange | Literal["a2a"]


@dataclass
class _Heads:
    """The heads that a rank works on, and what belongs to each: all of its own, or its share of an all-to-all."""

    key_heads: int
    value_heads: int
    conv_weight: torch.Tensor
    A_log: torch.Tensor
    dt_bias: torch.Tensor


class StateObserver(Protocol):
    """Is given the state after each document's last token, [N, H, K, V] fp32, where it is `wanted`."""

    @property
    def wanted(self) -> bool: ...

    def __call__(self, states: torch.Tensor) -> None: ...


class ShortConv(nn.Module):
    """Holds the depthwise weight [Hk·K + Hk·K + H·V, 1, W] of the three bias-free convolutions, q then k then v."""

    def __init__(
        self, sections: tuple[int, ...], width: int, config: TransformerConfig, tp: torch.distributed.ProcessGroup
    ) -> None:
        """sections: sizes over all tensor-parallel ranks."""
        super().__init__()
        self.tp_group = tp
        self.weight = nn.Parameter(torch.empty(sum(sections) // tp.size(), 1, width, dtype=config.params_dtype))
        init_sharded_(self.weight, sections, TruncatedNormal(config.init_method_std), config, tp)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"weight": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )


class GatedDeltaNet(MegatronModule):
    """Projections, short convolutions, gated delta rule, gated norm, output projection.

    Takes the place of `self_attention` in a Megatron TransformerLayer.

    Under tensor parallelism each rank holds H/TP heads. Under sequence parallelism both input projections gather the
    sequence; the a|b one costs a second gather of [s, b, D]. Under context parallelism states are passed between
    ranks (`parallel/state_passing.py`), whatever the number of heads.
    """

    state_observer: StateObserver | None = None

    def __init__(
        self,
        config: TransformerConfig,
        submodules: GatedDeltaNetSubmodules,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
        allow_neg_eigval: bool = True,
        output_gate: bool = True,
        norm_eps: float = 1e-5,
        cp_comm: GdnCpCommType = "auto",
        backend: str | None = None,
        states_every: int = 0,
        keep_intermediates: bool = False,
        name: str | None = None,
        cp_comm_type: str | None = None,
    ) -> None:
        """
        Args:
            layer_number: global, from 1.
            allow_neg_eigval: beta in (0, 2) instead of (0, 1).
            output_gate: multiply the normalised output by silu(z).
            norm_eps: of the output norm. Every other norm uses config.layernorm_epsilon.
            cp_comm: how context-parallel ranks work together: states by all-gather or by a scan, the faster of the
                two, or heads by all-to-all.
            backend, states_every, keep_intermediates: as in `kernels.gated_delta.mixer_core`.
            cp_comm_type: Megatron passes it to every mixer; it is attention's, unused here.

        Raises:
            ValueError: heads that tensor parallelism does not divide.
        """
        super().__init__(config)
        self.layer_number = layer_number
        self.pg_collection = pg_collection
        self.tp_group = pg_collection.tp
        tp = self.tp_group.size()
        self.allow_neg_eigval = allow_neg_eigval
        self.output_gate = output_gate
        self.backend = backend
        self.states_every = states_every
        self.keep_intermediates = keep_intermediates
        self.recompute = config.recompute_granularity == "selective" and NORM_OUT in (config.recompute_modules or ())
        self.exchange_heads = cp_comm == "a2a"
        self.cp_exchange: state_passing.Exchange = "auto" if cp_comm == "a2a" else cp_comm
        if config.linear_num_value_heads % tp or config.linear_num_key_heads % tp:
            raise ValueError(
                f"--tensor-model-parallel-size {tp} does not divide the Gated DeltaNet heads "
                f"(--linear-num-key-heads {config.linear_num_key_heads}, "
                f"--linear-num-value-heads {config.linear_num_value_heads}); parallel/head_padding.py rounds them up"
            )
        self.key_heads = config.linear_num_key_heads // tp
        if self.exchange_heads:
            check_heads(self.key_heads, pg_collection.cp)
        self.value_heads = config.linear_num_value_heads // tp
        self.key_dim = config.linear_key_head_dim
        self.value_dim = config.linear_value_head_dim
        q_size = config.linear_num_key_heads * self.key_dim
        v_size = config.linear_num_value_heads * self.value_dim
        self.conv_sections = (q_size, q_size, v_size)
        self.in_sections = (*self.conv_sections, v_size) if output_gate else self.conv_sections

        self.in_proj = self._input_linear(submodules.in_proj, sum(self.in_sections), name, "in_proj")
        self.ab_proj = self._input_linear(submodules.ab_proj, 2 * config.linear_num_value_heads, name, "ab_proj")
        self.conv1d = ShortConv(self.conv_sections, config.linear_conv_kernel_dim, config, self.tp_group)
        self.A_log = self._per_head_fp32(sample_a_log)
        self.dt_bias = self._per_head_fp32(sample_dt_bias)
        if config.params_dtype != torch.float32:
            support_in_optimizers()
        self.out_norm = HeadNorm(config, self.value_dim, norm_eps)
        self.out_proj = build_module(
            submodules.out_proj,
            v_size,
            config.hidden_size,
            config=config,
            init_method=config.output_layer_init_method,
            bias=False,
            input_is_parallel=True,
            skip_bias_add=True,
            is_expert=False,
            tp_comm_buffer_name="proj",
            tp_group=self.tp_group,
            name=f"{name}.out_proj" if name else None,
        )
        self._describe_splits()

    def _describe_splits(self) -> None:
        """What each parameter consists of: its parts' stored names, and which heads are padding."""
        sizes = true_sizes(self.config)
        heads, key_heads = sizes.gdn_value_heads, sizes.gdn_key_heads
        true = [key_heads * self.key_dim] * 2 + [heads * self.value_dim] * 2
        names = ("query", "key", "value", "z")
        projected = [Part(*part) for part in zip(true, self.in_sections, names, strict=False)]
        per_head = Part(heads, self.config.linear_num_value_heads)
        out = Part(heads * self.value_dim, self.conv_sections[2])
        group = self.tp_group
        describe_split(self.in_proj.weight, projected, group)
        describe_split(self.ab_proj.weight, [replace(per_head, name=n) for n in ("alpha", "beta")], group)
        describe_split(self.conv1d.weight, projected[:3], group)
        describe_split(self.A_log, [per_head], group)
        describe_split(self.dt_bias, [per_head], group)
        describe_split(self.out_proj.weight, [out], group, dim=1)

    def _input_linear(self, spec: ModuleSpec | type, size: int, name: str | None, suffix: str) -> Any:
        return build_module(
            spec,
            self.config.hidden_size,
            size,
            config=self.config,
            init_method=self.config.init_method,
            gather_output=False,
            bias=False,
            skip_bias_add=False,
            is_expert=False,
            tp_comm_buffer_name="qkv",
            tp_group=self.tp_group,
            name=f"{name}.{suffix}" if name else None,
        )

    def _per_head_fp32(self, sample: Sampler) -> nn.Parameter:
        param = nn.Parameter(torch.empty(self.value_heads, dtype=torch.float32))
        init_sharded_(param, (self.config.linear_num_value_heads,), sample, self.config, self.tp_group)
        return param

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> GatedDeltaNet:
        """Keep A_log and dt_bias in fp32 when Megatron casts the model to bf16: exp(A_log) needs the bits."""
        return super()._apply(keeping_fp32(fn, (self.A_log, self.dt_bias)), recurse)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        inference_context: Any = None,
        packed_seq_params: PackedSeqParams | None = None,
        **unused: Any,
    ) -> tuple[torch.Tensor, None]:
        """hidden_states [s, b, D] (s/TP under sequence parallelism) → ([s, b, D], None).

        Packed documents (THD): b = 1, `packed_seq_params.cu_seqlens_q` [documents + 1] holds their bounds; conv and
        state start afresh at each.
        """
        if inference_context is not None:
            raise NotImplementedError("GatedDeltaNet has no inference context: export the model to Hugging Face")
        projected = self.in_proj(hidden_states)[0]  # [s, b, (2·Hk·K + 2·H·V)]
        ab = self.ab_proj(hidden_states)[0]  # [s, b, 2·H]
        between = partial(self._between_projections, packed_seq_params=packed_seq_params)
        if not (self.recompute and self.training and torch.is_grad_enabled()):
            return self.out_proj(between(projected, ab))[0], None
        recomputed = Recomputed(between, projected, ab)
        output = self.out_proj(recomputed.output)[0]
        recomputed.discard_until(output)
        return output, None

    def _between_projections(
        self, projected: torch.Tensor, ab: torch.Tensor, packed_seq_params: PackedSeqParams | None
    ) -> torch.Tensor:
        """[s, b, 2·Hk·K + 2·H·V] and [s, b, 2·H] → [s, b, H·V], contiguous."""
        wait_for_parameters(self.conv1d, self.out_norm)
        projected, ab = projected.transpose(0, 1), ab.transpose(0, 1)
        if self.pg_collection.cp.size() > 1:
            y = self._context_parallel(projected, ab, packed_seq_params)
        else:
            bounds = packed_seq_params.cu_seqlens_q if packed_seq_params is not None else None
            y = self._mix(projected, ab, self._heads(), cu_seqlens=bounds)
        return y.transpose(0, 1).contiguous()

    def _heads(self) -> _Heads:
        return _Heads(self.key_heads, self.value_heads, self.conv1d.weight, self.A_log, self.dt_bias)

    def _context_parallel(
        self, projected: torch.Tensor, ab: torch.Tensor, packed_seq_params: PackedSeqParams | None
    ) -> torch.Tensor:
        """As `_mix`, for this rank's tokens of the sequence. Rows of a batch are documents of one packed row."""
        rows, tokens = projected.shape[:2]
        group = self.pg_collection.cp
        routes = routes_of(tokens, rows, packed_seq_params, group, projected.device)
        projected, ab = (x.reshape(rows * tokens, -1) for x in (projected, ab))
        if not self.exchange_heads:
            y = self._mix(projected[None], ab[None], self._heads(), cu_seqlens=routes.cu_segments, routes=routes)
            return y.view(rows, tokens, -1)
        tp, per_head = self.tp_group.size(), (self.value_heads,)
        in_sections, conv_sections = ([n // tp for n in sizes] for sizes in (self.in_sections, self.conv_sections))
        heads = _Heads(
            self.key_heads // group.size(),
            self.value_heads // group.size(),
            share(self.conv1d.weight, conv_sections, group),
            share(self.A_log, per_head, group),
            share(self.dt_bias, per_head, group),
        )
        projected = to_heads(projected, in_sections, routes, group)
        ab = to_heads(ab, per_head * 2, routes, group)
        y = self._mix(projected[None], ab[None], heads, cu_seqlens=routes.cu_documents)
        return to_tokens(y[0], routes, group).view(rows, tokens, -1)

    def _mix(
        self,
        projected: torch.Tensor,
        ab: torch.Tensor,
        heads: _Heads,
        cu_seqlens: torch.Tensor | None = None,
        routes: Routes | None = None,
    ) -> torch.Tensor:
        """Convolution, gated delta rule and gated norm: [b, s, 2·Hk·K + 2·H·V] and [b, s, 2·H] to [b, s, H·V].

        cu_seqlens: bounds of documents, or with routes of this rank's pieces of documents; then b = 1.
        routes: where the tokens before each piece are, to pass states.
        """
        channels = 2 * heads.key_heads * self.key_dim + heads.value_heads * self.value_dim
        halo, pass_states = None, None
        observer = self.state_observer if self.training else None
        observer = observer if observer is not None and observer.wanted else None
        if routes is not None:
            halo = state_passing.conv_halo(projected[0, :, :channels], routes, self.pg_collection.cp)
            pass_states = state_passing.passing(routes, self.pg_collection.cp, self.cp_exchange)
            if observer is not None:
                pass_states = state_passing.observed(pass_states, routes, observer)
        y, final = mixer_core(
            projected,
            ab,
            heads.conv_weight,
            heads.A_log,
            heads.dt_bias,
            shared_by_heads(self.out_norm.weight, self.tp_group),
            num_key_heads=heads.key_heads,
            num_value_heads=heads.value_heads,
            key_dim=self.key_dim,
            value_dim=self.value_dim,
            allow_neg_eigval=self.allow_neg_eigval,
            norm_eps=self.out_norm.eps,
            cu_seqlens=cu_seqlens,
            conv_halo=halo,
            output_final_state=observer is not None and pass_states is None,
            states_every=self.states_every,
            keep_intermediates=self.keep_intermediates,
            pass_states=pass_states,
            backend=self.backend,
        )
        if observer is not None and final is not None:
            observer(final)
        return y

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """Projections are stored as their parts (query, key, value, z; alpha, beta), real heads only: TP can change."""
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        per_head = {"A_log": self.A_log, "dt_bias": self.dt_bias}
        state = make_sharded_tensors_for_checkpoint(
            per_head,
            prefix,
            dict.fromkeys(per_head, 0),
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )
        for name, module in self.named_children():
            state.update(
                sharded_state_dict_default(module, f"{prefix}{name}.", sharded_offsets, metadata, self.tp_group)
            )
        return without_padding(state)

    def set_for_recompute_input_layernorm(self) -> None:
        """In FP8 or FP4, under --recompute-modules layernorm: the norm's output is freed and made again before the
        backward pass, so that q|k|v|z must keep it, not an FP8 copy. a|b, in bf16, does already."""
        from megatron.core.extensions.transformer_engine import set_save_original_input

        set_save_original_input(self.in_proj)

    def backward_dw(self) -> None:
        """Weight gradients of the linears, when Megatron delays them."""
        self.out_proj.backward_dw()
        self.ab_proj.backward_dw()
        self.in_proj.backward_dw()
