"""`--spec megatron_hybrid.tools.gpu_bench.peer_spec megatron_gdn_stack_spec`: Megatron-Core's own GDN layer.

It runs on flash-linear-attention. Megatron looks the name up in the module's variables, so it is built at import.
"""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from typing import Any

from megatron.core.extensions import transformer_engine as te
from megatron.core.ssm.gated_delta_net import GatedDeltaNet, GatedDeltaNetSubmodules
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec

from megatron_hybrid.layer_specs.olmo_hybrid import build_stack_spec
from megatron_hybrid.tools.gpu_bench.fla import allow_fla_backward, compile_side_by_side


def _build() -> Any:
    spec = build_stack_spec(implementation="transformer_engine")
    mixer = ModuleSpec(
        module=GatedDeltaNet,
        submodules=GatedDeltaNetSubmodules(
            in_proj=te.TELayerNormColumnParallelLinear, out_norm=te.TENorm, out_proj=te.TERowParallelLinear
        ),
    )
    layer = spec.submodules.gdn_layer
    inside = replace(layer.submodules, self_attention=mixer, input_layernorm=IdentityOp)
    spec.submodules.gdn_layer = replace(layer, submodules=inside)
    return spec


if find_spec("fla") is not None:  # without it, Megatron's layer says that it is missing
    allow_fla_backward()
    compile_side_by_side()
megatron_gdn_stack_spec = _build()
