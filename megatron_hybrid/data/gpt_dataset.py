"""Train, validation and test sets from Megatron's `.bin/.idx` files, by Megatron's own GPTDataset."""

from __future__ import annotations

from typing import Any

from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.training import get_args
from megatron.training.utils import get_blend_and_blend_per_split


class InnerTargets(GPTDataset):
    """Megatron's dataset without each sample's last target, which lies outside the sample: 8,191 of 8,192, as OLMo's.

    Every token stays a target or an input as Megatron cuts the samples; only the loss leaves the last position out.
    """

    def __getitem__(self, index: int | None) -> dict[str, Any]:
        sample = super().__getitem__(index)
        mask = sample["loss_mask"].clone()  # Megatron gives one mask to all samples
        mask[-1] = 0
        return {**sample, "loss_mask": mask}


def build_datasets(num_samples: list[int], vp_stage: int | None = None) -> list[Any]:
    """The datasets, from the arguments.

    Args:
        num_samples: of train, validation and test.

    Returns:
        The three datasets.
    """
    args = get_args()
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=build_tokenizer(args),
        reset_position_ids=args.reset_position_ids or args.document_masking,  # they mark where documents begin
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=False,  # attention is causal by construction
        object_storage_cache_path=args.object_storage_cache_path,
        mid_level_dataset_surplus=args.mid_level_dataset_surplus,
    )
    real = GPTDataset if args.last_target else InnerTargets
    kind = MockGPTDataset if args.mock_data else real
    return BlendedMegatronDatasetBuilder(kind, num_samples, lambda: True, config).build()
