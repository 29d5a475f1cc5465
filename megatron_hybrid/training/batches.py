"""Microbatches as the model takes them: on its device, this context-parallel rank's part."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.utils import get_batch_on_this_cp_rank

BATCH_KEYS = ("tokens", "labels", "loss_mask", "position_ids")


def next_batch(
    batches: Iterator[Any] | None, device: torch.device, cp_group: torch.distributed.ProcessGroup
) -> dict[str, Any]:
    """The next microbatch on `device`, this context-parallel rank's zigzag part of it.

    All None in pipeline stages between first and last, which get no data.
    """
    if batches is None:
        return dict.fromkeys(BATCH_KEYS)
    batch = next(batches)
    batch = {key: batch[key].to(device, non_blocking=True) for key in BATCH_KEYS}
    return get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=cp_group) if cp_group.size() > 1 else batch
