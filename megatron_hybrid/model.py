"""Megatron arguments and a stack spec to a HybridModel; how many parameters it has."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.models.hybrid.hybrid_layer_allocation import get_hybrid_total_pipeline_segment_count
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.spec_utils import ModuleSpec

from megatron_hybrid.fp8 import check_widths
from megatron_hybrid.layer_specs.olmo_hybrid import build_stack_spec
from megatron_hybrid.modules.cross_entropy import chunked_token_losses, token_losses
from megatron_hybrid.modules.init import use_olmo_init
from megatron_hybrid.modules.parameter_gather import wait_for_parameters
from megatron_hybrid.modules.recompute import allowing_norm_out
from megatron_hybrid.modules.weight_gradient import stand_in_for_apex
from megatron_hybrid.parallel.head_padding import (
    ALIGNMENT,
    Part,
    describe_split,
    padded_config,
    real_numel,
    rounded_up,
    split_of,
    true_sizes,
    without_padding,
)


class OlmoHybridModel(HybridModel):
    """Megatron's HybridModel for any tensor-parallel size: the vocabulary is padded, and no padding is stored.

    Given labels, it returns each token's cross entropy [b, s], as Megatron's. With `report_logsumexp` it returns
    [2, b, s]: cross entropy and logsumexp, for the z-loss. With `loss_chunk_tokens` above 0 the output layer's logits
    exist for so many tokens at a time.
    """

    post_process: bool
    report_logsumexp = False
    loss_chunk_tokens = 0

    def __init__(
        self, config: TransformerConfig, hybrid_stack_spec: ModuleSpec, vocab_size: int, *args: Any, **kwargs: Any
    ) -> None:
        """vocab_size: rows of the embedding and of the output layer, as stored; padded here."""
        padded = rounded_up(vocab_size, config.tensor_model_parallel_size, ALIGNMENT)
        super().__init__(config, hybrid_stack_spec, padded, *args, **kwargs)
        self.vocabulary_rows = vocab_size
        rows = [Part(vocab_size, padded)]
        if self.pre_process:
            describe_split(self.embedding.word_embeddings.weight, rows, self.pg_collection.tp)
        if self.post_process:
            describe_split(self.output_layer.weight, rows, self.pg_collection.tp)
            if padded > vocab_size:
                self.output_layer.register_forward_hook(hide_padded_logits)

    def forward(self, *args: Any, labels: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor:
        if labels is None or not self.loss_chunk_tokens or not self.post_process:
            return super().forward(*args, labels=labels, **kwargs)
        self.post_process = False  # the parent then stops at the hidden states
        try:
            hidden = super().forward(*args, **kwargs)
        finally:
            self.post_process = True
        wait_for_parameters(self.output_layer)
        group, weight = self.pg_collection.tp, self.output_layer.weight
        mapping = gather_from_sequence_parallel_region
        hidden = (mapping if self.config.sequence_parallel else copy_to_tensor_model_parallel_region)(
            hidden, group=group
        )
        losses = chunked_token_losses(
            hidden, weight, labels.t().contiguous(), group, self.loss_chunk_tokens, real_rows(weight)
        )
        return self._report(losses)

    def compute_language_model_loss(self, labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """labels [b, s], logits [s, b, rows of this rank]."""
        if not self.report_logsumexp:
            return super().compute_language_model_loss(labels, logits)
        return self._report(token_losses(logits, labels.t().contiguous(), self.pg_collection.tp))

    def _report(self, losses: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """Losses and logsumexp, [s, b] each."""
        return torch.stack(losses).transpose(1, 2) if self.report_logsumexp else losses[0].t().contiguous()

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        return without_padding(super().sharded_state_dict(prefix, sharded_offsets, metadata))


def hide_padded_logits(output_layer: Any, inputs: Any, output: tuple[torch.Tensor, Any]) -> None:
    """Forward hook of the output layer: logits of padded rows become the lowest number, which softmax turns into 0.

    Not −infinity: fused cross-entropies that go over a rank's columns first would subtract it from itself.
    output[0]: [..., this rank's rows], or [..., all rows] where the layer gathers.
    """
    logits, split = output[0], split_of(output_layer.weight)
    assert split is not None
    gathered = logits.shape[-1] != output_layer.weight.shape[0]
    rows = split.parts[0].true if gathered else real_rows(output_layer.weight)
    if rows < logits.shape[-1]:
        logits[..., rows:].fill_(torch.finfo(logits.dtype).min)


def real_rows(weight: torch.Tensor) -> int:
    """Rows of the output layer on this rank that are no padding."""
    split = split_of(weight)
    assert split is not None
    return next(real for *_, real in split.shares())


def build_model(
    config: TransformerConfig,
    *,
    pattern: str,
    padded_vocab_size: int,
    max_sequence_length: int,
    position_embedding_type: str = "rope",
    rotary_base: int = 500000,
    stack_spec: ModuleSpec | None = None,
    report_logsumexp: bool = False,
    loss_chunk_tokens: int = 0,
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
    pg_collection: ProcessGroupCollection | None = None,
) -> HybridModel:
    """One pipeline stage of an OLMo-Hybrid, with OLMo's initialisation and untied embeddings.

    Args:
        config: changed in place: its init methods become OLMo's.
        pattern: `G` and `*` layers, `|` between pipeline stages.
        padded_vocab_size: rows of the embedding and of the output layer, for any tensor-parallel size: the
            tokenizer's vocabulary rounded up to --make-vocab-size-divisible-by.
        stack_spec: default the released architecture.
        report_logsumexp, loss_chunk_tokens: see OlmoHybridModel.

    Raises:
        ValueError: an interleaved pipeline whose messages Megatron would pair up wrongly; a width on this rank that
            FP8 cannot take.
    """
    _check_interleaving(config, pattern)
    if config.gradient_accumulation_fusion:
        stand_in_for_apex()
    check_widths({**vars(config), **true_sizes(config).settings()})
    use_olmo_init(config)
    model = OlmoHybridModel(
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
    model.report_logsumexp, model.loss_chunk_tokens = report_logsumexp, loss_chunk_tokens
    return model


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
        report_logsumexp=args.z_loss > 0,
        loss_chunk_tokens=args.loss_chunk_tokens,
        **stage,
    )


def config_from_args(args: argparse.Namespace) -> TransformerConfig:
    """Megatron's config of parsed arguments, its sizes rounded up to what the tensor-parallel size divides."""
    from megatron.training.arguments import core_transformer_config_from_args

    make = allowing_norm_out(lambda values: core_transformer_config_from_args(argparse.Namespace(**values)))
    return padded_config(make, vars(args))


def count_parameters(modules: Iterable[torch.nn.Module]) -> int:
    """Parameters held by these modules (on this rank), padding left out."""
    return sum(real_numel(p) for module in modules for p in module.parameters())
