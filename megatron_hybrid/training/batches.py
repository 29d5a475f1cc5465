"""Microbatches as the model takes them: on its device, this context-parallel rank's part.

Letters: b rows, T sequence length, W context-parallel size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import get_batch_on_this_cp_rank

from megatron_hybrid.parallel.packed import pack

BATCH_KEYS = ("tokens", "labels", "loss_mask", "counted_mask", "position_ids")


def next_batch(
    batches: Iterator[Any] | None,
    device: torch.device,
    groups: ProcessGroupCollection,
    vocabulary_rows: int,
    document_masking: bool = False,
    multiple: int = 1,
) -> dict[str, Any]:
    """The next microbatch on `device`, this context-parallel rank's zigzag part of it.

    All None in pipeline stages between first and last, which get no data.

    Args:
        vocabulary_rows: of the embedding, all ranks together.
        document_masking: position 0 in `position_ids` begins a document that sees no other; the rows become one packed
            row, and `packed_seq_params` describes it.
        multiple: of each rank's tokens, where documents are padded.

    Raises:
        ValueError: an id without a row.
    """
    if batches is None:
        return dict.fromkeys((*BATCH_KEYS, "packed_seq_params"))
    batch = next(batches)
    batch = {key: batch[key] for key in BATCH_KEYS if key in batch}
    _refuse_unknown_ids(batch, vocabulary_rows)
    batch.setdefault("counted_mask", batch["loss_mask"])  # Megatron's datasets divide by what they train on
    if document_masking:
        return _packed_batch(batch, device, groups, multiple)
    batch = {key: value.to(device, non_blocking=True) for key, value in batch.items()}
    if groups.cp.size() > 1:
        batch = get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=groups.cp)
    return {**batch, "packed_seq_params": None}


def _refuse_unknown_ids(batch: dict[str, torch.Tensor], rows: int) -> None:
    """Tensor-parallel ranks would embed such an id as zeros, and as a target give it no logit, without a word."""
    largest = max(int(batch[key].max()) for key in ("tokens", "labels"))
    if largest >= rows:
        raise ValueError(
            f"the data hold id {largest}, and the embedding has {rows} rows (--padded-vocab-size): give the tokenizer "
            "that made the data, or prepare them again"
        )


def _packed_batch(
    batch: dict[str, torch.Tensor], device: torch.device, groups: ProcessGroupCollection, multiple: int
) -> dict[str, Any]:
    """[b, T] each to [1, tokens], cut between context-parallel ranks document by document.

    With W > 1 every document gets up to 2·W − 1 tokens of padding at its end, for the zigzag parts; causal as it all
    is, no token before them sees them, and they are not in the loss.
    """
    world = groups.cp.size()
    rows = {key: value.reshape(-1) for key, value in batch.items()}
    lengths = document_lengths(batch["position_ids"])
    index, padded = padded_documents(lengths, world, groups.tp.size(), multiple)
    documents = pack(padded, world, groups.cp.rank(), device=device)
    if world > 1:
        index = index[documents.local_index().cpu()]
    packed: dict[str, Any] = {}
    for key, value in rows.items():
        picked = torch.where(index >= 0, value[index.clamp(min=0)], 0)
        packed[key] = picked[None].to(device, non_blocking=True)
    return {**packed, "packed_seq_params": documents}


def document_lengths(position_ids: torch.Tensor) -> list[int]:
    """Tokens of each document, row after row. position_ids: [b, T], 0 at the start of every row and document.

    Raises:
        ValueError: a row that does not start at position 0.
    """
    if position_ids[:, 0].any():
        raise ValueError(
            "--document-masking: a row of the batch does not start at position 0; use the project's datasets"
        )
    starts = torch.nonzero(position_ids.reshape(-1) == 0).flatten()
    ends = torch.cat([starts[1:], torch.tensor([position_ids.numel()])])
    return (ends - starts).tolist()


def padded_documents(lengths: list[int], world: int, tp: int, multiple: int = 1) -> tuple[torch.Tensor, list[int]]:
    """(index, lengths): which token stands at each place of the padded row, −1 for padding, and its documents.

    With world > 1 documents are rounded up to 2·world tokens, and one of padding alone is added where ranks, the
    tensor-parallel ones too, would not have the same number of tokens each, and that a multiple of `multiple`. With
    world 1 nothing is padded: then the flags say how many tokens there are.
    """
    if world == 1:
        return torch.arange(sum(lengths)), lengths
    part = 2 * world
    padded = [-(-length // part) * part for length in lengths]
    extra = -sum(padded) % math.lcm(part, world * tp * multiple)
    true, size = torch.tensor([*lengths, 0]), torch.tensor([*padded, extra])
    document = torch.repeat_interleave(torch.arange(len(size)), size)
    position = torch.arange(int(size.sum())) - (size.cumsum(0) - size)[document]
    index = (true.cumsum(0) - true)[document] + position
    return torch.where(position < true[document], index, -1), [*padded, extra] if extra else padded
