"""Instances as Megatron's trainer takes them, in their order: --instance-data. Letters: T sequence length.

Megatron's sampler hands out positions from consumed_train_samples on, so that number alone says where a run stands.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_hybrid.config import HybridConfig
from megatron_hybrid.data.fingerprint import FILE_NAME, Reading, describe, differences, record
from megatron_hybrid.data.instances import Cutter, FixedInstances, Instance, Instances, ListedInstances
from megatron_hybrid.data.order import SampleOrder
from megatron_hybrid.data.packing import PackedInstances, load_index
from megatron_hybrid.data.repetition import repeats_itself
from megatron_hybrid.data.sources import Places, check_samples, permuted, select
from megatron_hybrid.data.token_files import DataError
from megatron_hybrid.tools.cli import ToolError

#: What opening data raises: one line each.
Refused = ToolError


@dataclass(frozen=True)
class Plan:
    """Everything that decides which tokens a sample is: of training or of validation."""

    data: str
    places: Places
    sequence_length: int
    batch: int
    vocab_size: int
    eod: int
    pad: int
    seed: int
    epochs: int
    shuffle: bool
    packing: str
    group_files: int
    file_seed: int
    mixture_tokens: int
    cache: Path | None


def plan_of(args: argparse.Namespace, tokenizer: Any, validation: bool = False) -> Plan:
    """The plan that Megatron's parsed arguments describe.

    Raises:
        DataError: a flag that does not fit --instance-data.
    """
    options = HybridConfig.from_args(args)
    if args.dataloader_type != "single":
        raise DataError(
            f"--dataloader-type {args.dataloader_type}: with --instance-data the order is its own; use single"
        )
    if options.instance_group_files < 1 or options.instance_epochs < 1:
        flag = "group-files" if options.instance_group_files < 1 else "epochs"
        raise DataError(
            f"--instance-{flag} {getattr(options, 'instance_' + flag.replace('-', '_'))}: must be 1 or more"
        )
    pad = getattr(tokenizer, "pad", None)
    root = options.instance_root
    return Plan(
        data=options.instance_valid_data if validation else options.instance_data,
        places=Places(Path(root), options.instance_tokenizer_dir, options.instance_dtype, options.instance_label_mask),
        sequence_length=args.seq_length,
        batch=args.eval_global_batch_size if validation else args.global_batch_size,
        vocab_size=tokenizer.vocab_size,
        eod=tokenizer.eod,
        pad=pad if isinstance(pad, int) and 0 <= pad < tokenizer.vocab_size else tokenizer.eod,
        seed=args.seed if options.data_seed < 0 else options.data_seed,
        epochs=2**31 if validation else options.instance_epochs,  # validation starts over where its data ends
        shuffle=options.instance_shuffle and not validation,
        packing=options.instance_packing,
        group_files=options.instance_group_files,
        file_seed=-1 if validation else options.instance_file_seed,
        mixture_tokens=options.mixture_tokens,
        cache=Path(args.data_cache_path) if args.data_cache_path else None,
    )


@lru_cache(maxsize=4)  # the check before process groups, and each pipeline stage of a rank, ask for the same
def open_plan(plan: Plan) -> tuple[Instances, SampleOrder]:
    """The instances of a plan and their order.

    Raises:
        ToolError: one line for what is missing, damaged or other than asked for.
    """
    selection = select(plan.data, plan.places, plan.sequence_length, plan.batch, plan.mixture_tokens, plan.vocab_size)
    if plan.file_seed >= 0:
        selection = permuted(selection, plan.file_seed)
    instances: Instances
    if plan.packing == "best_fit":
        if selection.counts is not None or selection.index is not None:
            raise DataError(
                f"--instance-packing best_fit: {plan.data} counts instances of fixed length; give files, a folder or a "
                "label,path list, or leave the flag out"
            )
        index = load_index(selection.files, plan.sequence_length, plan.eod, plan.group_files, plan.cache)
        instances = PackedInstances(selection.files, index, plan.sequence_length, plan.vocab_size, plan.pad)
    else:
        cutter = Cutter(plan.sequence_length, plan.vocab_size, plan.eod)
        if selection.index is not None:
            instances = ListedInstances(selection.files, cutter, selection.index)
        else:
            instances = FixedInstances(selection.files, cutter, selection.counts)
    order = SampleOrder(len(instances), plan.batch, plan.seed, plan.epochs, plan.shuffle, plan.cache)
    return instances, order


def check(args: argparse.Namespace, tokenizer: Any, consumed: int | None = None) -> str:
    """Opens the data of a run before any process group is made; returns one line that says what it is.

    Args:
        consumed: samples that the checkpoint to load has seen, None where it does not say.

    Raises:
        ToolError: one line.
    """
    plan = plan_of(args, tokenizer)
    instances, order = open_plan(plan)
    if args.rank == 0:
        check_samples(instances.files, plan.vocab_size)
    wanted = args.train_samples or (args.train_iters or 0) * args.global_batch_size
    if wanted > len(order) and not args.skip_train:
        raise DataError(
            f"--instance-epochs {plan.epochs}: {plan.data} gives {len(order):,} samples ({len(instances):,} instances, "
            f"{order.per_epoch:,} in whole batches), {wanted:,} are to be trained on, {wanted - len(order):,} more; "
            f"add data, train on less, or allow {-(-wanted // order.per_epoch)} epochs"
        )
    options = HybridConfig.from_args(args)
    if options.instance_valid_data:
        validation, _ = open_plan(plan_of(args, tokenizer, validation=True))
        if args.rank == 0:
            check_samples(validation.files, plan.vocab_size)
    elif args.eval_iters or args.full_validation:
        raise DataError(
            f"--eval-iters {args.eval_iters}: no validation data; give --instance-valid-data, or --eval-iters 0"
        )
    if args.rank == 0:
        reading = Reading(
            sequence_length=plan.sequence_length,
            packing=plan.packing,
            group_files=plan.group_files,
            label_mask=options.instance_label_mask,
            repetition_filter=options.repetition_filter,
            document_masking=options.document_masking,
        )
        reached = wanted if consumed is None else consumed
        _compare_with_checkpoints(args, describe(instances, order, reading), reached)
    tokens = sum(file.tokens for file in dict.fromkeys(instances.files))
    return (
        f"data: {len(instances):,} instances of {plan.sequence_length} tokens from {len(instances.files):,} files of "
        f"{tokens:,} tokens, {wanted / order.per_epoch:.3f} epochs, "
        + (f"shuffled with seed {plan.seed}" if plan.shuffle else "in their own order")
    )


def _compare_with_checkpoints(args: argparse.Namespace, description: dict[str, Any], reached: int) -> None:
    """Refuses to go on with other data than --save and --load hold checkpoints of; records it in --save."""
    folders = {Path(name).resolve(): (flag, name) for flag, name in (("--load", args.load), ("--save", args.save))
               if name}  # fmt: skip
    for folder, (flag, name) in folders.items():
        if args.finetune or args.allow_data_change or not any(folder.glob("iter_*")):
            continue
        if found := differences(folder, description, reached, lambda line: print(line, file=sys.stderr)):
            raise DataError(
                f"{flag} {name}: its checkpoints were trained on other data ({'; '.join(found)}; there: "
                f"{Path(name) / FILE_NAME}, here: --instance-data {args.instance_data} and the flags); give what it "
                "was trained with; for a new stage, --pretrained-checkpoint with a --save and --load of its own; or "
                "add --allow-data-change"
            )
    if args.save:
        record(Path(args.save), description)


class InstanceDataset(torch.utils.data.Dataset):
    """Position in training to a row: tokens, labels, loss_mask, counted_mask, position_ids, each [T].

    Labels are the tokens shifted to the left inside the row; its last position has none, so T − 1 targets. Borders of
    documents are targets too, masked or not, as in OLMo-core.

    loss_mask, fp32: 1 where the label counts. counted_mask, fp32: what the loss is divided by: the same, but all T
    positions of a row that the repetition filter rejected (its loss_mask is 0), as in OLMo-core.
    position_ids, int64: start at 0 anew with each document if `document_masking`.
    """

    def __init__(
        self, instances: Instances, order: SampleOrder, *, repetition_filter: bool, document_masking: bool
    ) -> None:
        self.instances, self.order = instances, order
        self.repetition_filter, self.document_masking = repetition_filter, document_masking

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, position: int) -> dict[str, torch.Tensor]:
        number = int(self.order.ids(position, 1)[0])
        return self.row(self.instances.read(number, self.document_masking))

    def row(self, instance: Instance) -> dict[str, torch.Tensor]:
        tokens = torch.from_numpy(instance.tokens)
        labels, mask = torch.zeros_like(tokens), torch.zeros(tokens.shape)
        labels[:-1] = tokens[1:]
        mask[:-1] = 1.0 if instance.label_mask is None else torch.from_numpy(instance.label_mask[1:]).float()
        counted = mask
        if self.repetition_filter and repeats_itself(instance.tokens):
            counted, mask = torch.ones_like(mask), torch.zeros_like(mask)
        positions = np.arange(len(tokens))
        if instance.lengths is not None:
            positions -= np.repeat(np.cumsum(instance.lengths) - instance.lengths, instance.lengths)
        return {
            "tokens": tokens,
            "labels": labels,
            "loss_mask": mask,
            "counted_mask": counted,
            "position_ids": torch.from_numpy(positions),
        }


def build(args: argparse.Namespace, tokenizer: Any) -> list[InstanceDataset | None]:
    """Training and validation sets; the third, the test set, is None."""
    options = HybridConfig.from_args(args)

    def dataset(validation: bool) -> InstanceDataset:
        instances, order = open_plan(plan_of(args, tokenizer, validation))
        return InstanceDataset(
            instances,
            order,
            repetition_filter=options.repetition_filter and not validation,
            document_masking=options.document_masking,
        )

    return [dataset(False), dataset(True) if options.instance_valid_data else None, None]


def sample_ids(args: argparse.Namespace, tokenizer: Any, batch: int) -> list[int]:
    """Ids of the samples of global batch `batch` (from 0; iteration − 1): the same under every layout.

    With --instance-data numbers of instances, `Instances.where` says which tokens those are; without it positions in
    Megatron's sample order.
    """
    if not args.instance_data:
        return list(range(batch * args.global_batch_size, (batch + 1) * args.global_batch_size))
    _, order = open_plan(plan_of(args, tokenizer))
    return [int(number) for number in order.ids_of_batch(batch)]
