"""Memory for large tensors, one after the other: new pages cost the kernel as much time as their hash costs us."""

from __future__ import annotations

import math
import threading
import weakref
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy import ndarray
    from torch import Tensor

LARGE_BYTES = 2**20


class ReusedMemory:
    """Makes tensors in what earlier ones have left; never more pieces than tensors were alive at once."""

    def __init__(self) -> None:
        self._free: list[ndarray[Any, Any]] = []
        self._taking = threading.Lock()  # what is given back is appended at any time

    def empty(self, shape: tuple[int, ...], dtype: str) -> Tensor:
        """A tensor like torch.empty's; its memory is free again once no view of it is left."""
        import numpy
        import torch

        kind = getattr(torch, dtype)
        size_bytes = math.prod(shape) * kind.itemsize
        if size_bytes < LARGE_BYTES:
            return torch.empty(shape, dtype=kind)
        memory = self._take(size_bytes)
        if memory is None:
            memory = numpy.empty(size_bytes, numpy.uint8)
        part = memory[:size_bytes]
        weakref.finalize(part, self._free.append, memory).atexit = False
        return torch.from_numpy(part).view(kind).view(shape)

    def _take(self, size_bytes: int) -> ndarray[Any, Any] | None:
        """The smallest free piece that is large enough. If none is, the largest goes, since a new one will come."""
        with self._taking:
            sizes = [piece.nbytes for piece in self._free]
            if fitting := [size for size in sizes if size >= size_bytes]:
                return self._free.pop(sizes.index(min(fitting)))
            if sizes:
                self._free.pop(sizes.index(max(sizes)))
            return None
