"""A counting allocator: every tensor that operations make while it watches, until its memory is freed."""

from __future__ import annotations

import gc
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Watch(TorchDispatchMode):
    """Use as a context. Storages that were there before (parameters, seen as views) do not count."""

    def __init__(self, before: list[torch.Tensor]) -> None:
        super().__init__()
        self.before = {tensor.untyped_storage()._cdata for tensor in before}
        self.seen: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, call: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = call(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                if storage._cdata not in self.before:
                    reference = StorageWeakRef(storage)
                    self.seen[reference.cdata] = (reference, storage.nbytes())
        return out

    def alive_bytes(self) -> int:
        """Of all that is still held by anything; Triton's interpreter leaves cycles, which are collected first."""
        gc.collect()
        return sum(size for reference, size in self.seen.values() if not reference.expired())


def storage_bytes(tensors: list[torch.Tensor]) -> int:
    """Of distinct storages."""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())
