"""Megatron arguments and a stack spec to a HybridModel; how many parameters it has."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import Any

import torch
from megatron.core.models.hybrid.hybrid_layer_allocation import get_hybrid_total_pipeline_segment_count
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.spec_utils import ModuleSpec

from megatron_hybrid.layer_specs.olmo_hybrid import build_stack_spec
from megatron_hybrid.modules.init import use_olmo_init


def build_model(
    config: TransformerConfig,
    *,
    pattern: str,
    padded_vocab_size: int,
    max_sequence_length: int,
    position_embedding_type: str = "rope",
    rotary_base: int = 500000,
    stack_spec: ModuleSpec | None = None,
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
    pg_collection: ProcessGroupCollection | None = None,
) -> HybridModel:
    """One pipeline stage of an OLMo-Hybrid, with OLMo's initialisation and untied embeddings.

    Args:
        config: changed in place: its init methods become OLMo's.
        pattern: `G` and `*` layers, `|` between pipeline stages.
        padded_vocab_size: rows of the embedding and of the output layer.
        stack_spec: default the released architecture.

    Raises:
        ValueError: an interleaved pipeline whose messages Megatron would pair up wrongly.
    """
    _check_interleaving(config, pattern)
    use_olmo_init(config)
    return HybridModel(
        config,
        stack_spec or build_stack_spec(),
        padded_vocab_size,
        max_sequence_length,
        hybrid_layer_pattern=pattern,
        pre_process=pre_process,
        post_process=post_process,
        position_embedding_type=position_embedding_type,
        rotary_base=rotary_base,
        share_embeddings_and_output_weights=False,
        vp_stage=vp_stage,
        pg_collection=pg_collection,
    )


def _check_interleaving(config: TransformerConfig, pattern: str) -> None:
    """With two pipeline ranks, Megatron's batched exchange of interleaved stages gives wrong gradients, silently.

    Its argument parser refuses that; a model built without the parser gets no such check from Megatron.
    """
    stages, pp = get_hybrid_total_pipeline_segment_count(pattern), config.pipeline_model_parallel_size
    if pp == 2 and stages > pp and not config.overlap_p2p_comm:
        raise ValueError(
            f"overlap_p2p_comm=False with pipeline size 2 and {stages} stages in {pattern!r} gives wrong gradients; "
            "set overlap_p2p_comm=True and batch_p2p_comm=False"
        )


def model_from_args(
    args: argparse.Namespace,
    config: TransformerConfig,
    stack_spec: ModuleSpec,
    **stage: Any,
) -> HybridModel:
    """The model that parsed Megatron arguments describe. stage: pre_process, post_process, vp_stage, pg_collection."""
    return build_model(
        config,
        pattern=args.hybrid_layer_pattern,
        padded_vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        position_embedding_type=args.position_embedding_type,
        rotary_base=args.rotary_base,
        stack_spec=stack_spec,
        **stage,
    )


def count_parameters(modules: Iterable[torch.nn.Module]) -> int:
    """Parameters held by these modules (on this rank)."""
    return sum(p.numel() for module in modules for p in module.parameters())
