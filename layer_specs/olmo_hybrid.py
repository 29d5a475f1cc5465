"""Stack specs of OLMo-Hybrid for Megatron-Core's HybridModel: `G` a Gated DeltaNet layer, `*` an attention layer.

Each symbol is a whole decoder layer, mixer and MLP, so that layers map one to one to Hugging Face's. The released
model mixes norm placements: GDN layers normalise before mixer and MLP, attention layers after them ("reordered").

With Transformer Engine the MLP's pre-norm and fc1 are one module. Not so the mixers' norm and projection:
- In a GDN layer a|b, outside FP8, reads the normalised input too. Transformer Engine (2.20) can return it, but then
  runs the norm in bf16 and quantises its output afterwards, which is what two modules do. Under sequence parallelism
  one gather could serve both projections, but a|b would keep the whole sequence for its backward pass on every rank.
- In attention (`--norm-placement pre`) the norm's weight would come after others of its layer, and Megatron's optimizer
  can store moments by place, without names: they would be loaded for other parameters, with nothing said.

    --spec megatron_hybrid.layer_specs.olmo_hybrid olmo_hybrid_stack_spec
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from megatron_hybrid.compat import use_transformer_engine
from megatron_hybrid.config import HybridConfig
from megatron_hybrid.modules.attention import OlmoAttention, SdpaAttention
from megatron_hybrid.modules.gated_delta_net import GatedDeltaNet, GatedDeltaNetSubmodules
from megatron_hybrid.modules.mlp import PaddedMLP
from megatron_hybrid.modules.norms import RMSNorm, post_normed, pre_normed

Implementation = Literal["auto", "local", "transformer_engine"]


class OlmoHybridStack(HybridStack):
    """Megatron's stack with a final norm of choice; Megatron's hard-codes Transformer Engine's."""

    def __init__(
        self, config: TransformerConfig, submodules: HybridStackSubmodules, final_norm: type, **kwargs: Any
    ) -> None:
        super().__init__(config, submodules, post_layer_norm=False, **kwargs)
        if self.post_process:
            self.final_norm = final_norm(config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)
            self.post_layer_norm = True


@dataclass(frozen=True)
class Backend:
    """The building blocks a spec is made of. normed_linear: a norm and a column-parallel linear in one."""

    column_linear: type
    row_linear: type
    norm: type
    core_attention: type
    normed_linear: type | None = None


def local_backend() -> Backend:
    """Megatron's own linears and plain PyTorch: CPU, or a GPU without Transformer Engine."""
    return Backend(ColumnParallelLinear, RowParallelLinear, RMSNorm, SdpaAttention)


def transformer_engine_backend() -> Backend:
    """Transformer Engine's modules through Megatron's wrappers."""
    from megatron.core.extensions.transformer_engine import (
        TEColumnParallelLinear,
        TEDotProductAttention,
        TELayerNormColumnParallelLinear,
        TENorm,
        TERowParallelLinear,
    )

    return Backend(
        TEColumnParallelLinear, TERowParallelLinear, TENorm, TEDotProductAttention, TELayerNormColumnParallelLinear
    )


#: {start of a parameter's name in a fused module: in checkpoints, where it is that of two modules}
FUSED_NORM_NAMES = {"mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm."}


def _layer(mixer: ModuleSpec, backend: Backend, row_linear: type, norm_first: bool) -> ModuleSpec:
    norm = backend.norm if norm_first else IdentityOp
    mlp_norm, fc1 = pre_normed(norm, backend.column_linear, backend.normed_linear if norm_first else None)
    mlp = MLPSubmodules(linear_fc1=fc1, linear_fc2=row_linear)
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=mixer,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=mlp_norm,
            mlp=partial(PaddedMLP.as_mlp_submodule, submodules=mlp),
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=FUSED_NORM_NAMES,
        ),
    )


def _row_linear(backend: Backend, norm_first: bool) -> type:
    return backend.row_linear if norm_first else post_normed(backend.row_linear, backend.norm)


def gdn_layer_spec(options: HybridConfig, backend: Backend) -> ModuleSpec:
    """A `G` layer. The a|b projection stays a Megatron linear: 60 rows at 7B do not fit FP8's alignment."""
    norm_first = options.norm_placement in ("released", "pre")
    row_linear = _row_linear(backend, norm_first)
    mixer = ModuleSpec(
        module=GatedDeltaNet,
        params={
            "allow_neg_eigval": options.gdn_allow_neg_eigval,
            "output_gate": options.gdn_output_gate,
            "norm_eps": options.gdn_norm_epsilon,
            "cp_comm": options.gdn_cp_comm_type,
            "backend": None if options.gdn_backend == "auto" else options.gdn_backend,
            "states_every": options.gdn_states_every,
            "keep_intermediates": options.gdn_keep_intermediates,
        },
        submodules=GatedDeltaNetSubmodules(
            in_proj=backend.column_linear, ab_proj=ColumnParallelLinear, out_proj=row_linear
        ),
    )
    return _layer(mixer, backend, row_linear, norm_first)


def attention_layer_spec(options: HybridConfig, backend: Backend) -> ModuleSpec:
    """A `*` layer."""
    norm_first = options.norm_placement == "pre"
    row_linear = _row_linear(backend, norm_first)
    mixer = ModuleSpec(
        module=OlmoAttention,
        params={"attn_mask_type": AttnMaskType.causal, "qk_norm": options.qk_norm_width},
        submodules=SelfAttentionSubmodules(
            linear_qkv=backend.column_linear, core_attention=backend.core_attention, linear_proj=row_linear
        ),
    )
    return _layer(mixer, backend, row_linear, norm_first)


def build_stack_spec(options: HybridConfig | None = None, implementation: Implementation = "auto") -> ModuleSpec:
    """The stack spec for the given options.

    Args:
        options: default the released architecture.
        implementation: `auto` takes Transformer Engine where it is installed and a GPU is present.
    """
    options = options or HybridConfig()
    with_te = use_transformer_engine() if implementation == "auto" else implementation == "transformer_engine"
    backend = transformer_engine_backend() if with_te else local_backend()
    return ModuleSpec(
        module=OlmoHybridStack,
        params={"final_norm": backend.norm},
        submodules=HybridStackSubmodules(
            gdn_layer=gdn_layer_spec(options, backend), attention_layer=attention_layer_spec(options, backend)
        ),
    )


#: The released OLMo-Hybrid architecture.
olmo_hybrid_stack_spec = build_stack_spec()
