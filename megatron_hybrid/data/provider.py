"""Megatron's dataset provider: instances in an order of their own with --instance-data, else Megatron's GPTDataset."""

from __future__ import annotations

from typing import Any

from megatron.training import get_args, get_tokenizer

from megatron_hybrid.data import gpt_dataset, instance_dataset


def build_datasets(num_samples: list[int], vp_stage: int | None = None) -> list[Any]:
    """Train, validation and test sets of the run; num_samples: wanted of each.

    Every rank builds them (`is_distributed`), so that no batch is broadcast: ranks of one tensor-parallel group read
    the same samples from the same memory-mapped files.
    """
    args = get_args()
    if args.instance_data:
        return list(instance_dataset.build(args, get_tokenizer()))
    return gpt_dataset.build_datasets(num_samples, vp_stage)


build_datasets.is_distributed = True  # type: ignore[attr-defined]  # Megatron reads the attribute
