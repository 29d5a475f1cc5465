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
        self.seen: dict[int, StorageWeakRef] = {}

    def __torch_dispatch__(self, call: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = call(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                if storage._cdata not in self.before:
                    reference = StorageWeakRef(storage)
                    self.seen[reference.cdata] = reference
        return out

    def alive_bytes(self) -> int:
        """Of all that is still held by anything; Triton's interpreter leaves cycles, which are collected first."""
        gc.collect()
        held = (torch.UntypedStorage._new_with_weak_ptr(reference.cdata) for reference in self.seen.values())
        return sum(storage.nbytes() for storage in held if storage is not None)  # as large as it is now


def storage_bytes(tensors: list[torch.Tensor]) -> int:
    """Of distinct storages."""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


class Traffic(TorchDispatchMode):
    """Bytes that this rank receives, {ranks of the group: bytes}, as a ring moves them."""

    def __init__(self) -> None:
        super().__init__()
        self.received: dict[tuple[int, ...], float] = {}

    def __torch_dispatch__(self, call: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if call.namespace == "c10d":
            self._count(call._opname, args)
        return call(*args, **(kwargs or {}))

    def _count(self, name: str, args: Any) -> None:
        group = next((x for x in args if isinstance(x, torch.ScriptObject) and "ProcessGroup" in str(x._type())), None)
        if group is None:
            return
        ranks = tuple(torch.distributed.get_process_group_ranks(torch.distributed.ProcessGroup.unbox(group)))
        out, *inputs = ([x for x in tree_leaves(arg) if isinstance(x, torch.Tensor)] for arg in args[:2])
        others = (len(ranks) - 1) / len(ranks)
        shares = {"allreduce": (2 * others, out), "allgather": (others, out), "alltoall": (others, out)}
        shares |= {"reduce_scatter": (others, inputs[0]), "recv": (1, out)}
        share, tensors = next((value for key, value in shares.items() if key in name), (0, out))
        size = sum(x.numel() * x.element_size() for x in tensors)
        self.received[ranks] = self.received.get(ranks, 0) + share * size
