"""Writes a torch distributed checkpoint tensor by tensor, without a process group: the inverse of `dcp_reader`.

torch's own writer wants all tensors in memory at once and a planner. The files are the same: each chunk is what
torch.save makes, and `.metadata` is torch's own records, which `dcp_reader` and torch both read.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import pickle  # only to write; nothing is loaded
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_hybrid.tools.atomic_file import flush_to_disk, fsync_folder
from megatron_hybrid.tools.cli import ToolError
from megatron_hybrid.tools.convert.in_order import InOrder, workers
from megatron_hybrid.tools.dcp_reader import METADATA_FILE

if TYPE_CHECKING:
    from torch import Tensor

CHUNK_BYTES = 64 * 2**20  # a rank that loads a part of a tensor reads whole chunks
FILE_BYTES = 4 * 2**30


class DcpWriter:
    """Writes `__LANE_N.distcp` files into a folder, and `.metadata` at the end, so that it says the rest is there.

    Args:
        folder: an existing empty folder.
        chunk_bytes: rows of a tensor are stored in blocks of at most this size.
        file_bytes: a file is closed and the next begun once it is this large.
        lanes: threads that write, each into files of its own; each holds up to three blocks.
    """

    def __init__(
        self, folder: Path, chunk_bytes: int = CHUNK_BYTES, file_bytes: int = FILE_BYTES, lanes: int = workers()
    ) -> None:
        self._folder, self._chunk_bytes = folder, chunk_bytes
        self._tensors: dict[str, Any] = {}
        self._lanes = [_Lane(folder, lane, file_bytes) for lane in range(lanes)]
        self._turn = itertools.cycle(self._lanes)

    def add_tensor(self, name: str, tensor: Tensor) -> None:
        """Stores a contiguous CPU tensor, which must not be changed afterwards; host memory: a few blocks more."""
        import torch
        from torch.distributed.checkpoint.metadata import (
            ChunkStorageMetadata,
            TensorProperties,
            TensorStorageMetadata,
        )

        chunks: list[ChunkStorageMetadata] = []
        for start, rows in self._blocks(tensor):
            part = tensor if rows is None else tensor[start : start + rows]
            offsets = torch.Size([start, *[0] * (tensor.dim() - 1)] if tensor.dim() else [])
            if part.untyped_storage().nbytes() != part.nbytes:  # torch.save would store all that a view belongs to
                part = part.clone()
            next(self._turn).store(name, part, offsets, len(chunks))
            chunks.append(ChunkStorageMetadata(offsets, part.shape))
        self._tensors[name] = TensorStorageMetadata(TensorProperties(dtype=tensor.dtype), tensor.shape, chunks)

    def add_object(self, name: str, content: object) -> None:
        """Stores plain data as torch.save does, to be read with weights_only."""
        import torch

        buffer = io.BytesIO()
        torch.save(content, buffer)
        self.add_bytes(name, buffer.getvalue())

    def add_bytes(self, name: str, content: bytes) -> None:
        """Stores an object as another checkpoint has it, what torch.save made of it, without reading it."""
        from torch.distributed.checkpoint.metadata import BytesStorageMetadata

        self._lanes[0].store(name, io.BytesIO(content), None, None)
        self._tensors[name] = BytesStorageMetadata()

    def finish(self) -> None:
        """Closes the files and writes `.metadata`, all of it on the disk."""
        from torch.distributed.checkpoint.metadata import Metadata

        for lane in self._lanes:
            lane.finish()
        places = {index: place for lane in self._lanes for index, place in lane.places.items()}
        with open(self._folder / METADATA_FILE, "wb") as handle:
            pickle.dump(Metadata(state_dict_metadata=self._tensors, storage_data=places), handle)
            flush_to_disk(handle)
        fsync_folder(self._folder)

    def abandon(self) -> None:
        """Closes the files in work; without `.metadata` nobody takes the folder for a checkpoint."""
        for lane in self._lanes:
            lane.abandon()

    def _blocks(self, tensor: Tensor) -> list[tuple[int, int | None]]:
        """First row and number of rows of each block; None for a tensor stored whole."""
        if tensor.nbytes <= self._chunk_bytes or tensor.dim() == 0 or tensor.shape[0] == 1:
            return [(0, None)]
        rows = max(1, self._chunk_bytes // (tensor.nbytes // tensor.shape[0]))
        return [(start, min(rows, tensor.shape[0] - start)) for start in range(0, tensor.shape[0], rows)]


class _Lane:
    """One thread and the file it writes."""

    def __init__(self, folder: Path, lane: int, file_bytes: int) -> None:
        self.places: dict[Any, Any] = {}
        self._folder, self._lane, self._file_bytes, self._files = folder, lane, file_bytes, 0
        self._handle: io.BufferedWriter | None = None
        self._thread = InOrder(f"write{lane}", 2)

    def store(self, name: str, content: Tensor | io.BytesIO, offsets: Any, index: int | None) -> None:
        """Hands a chunk over; its place is known after `finish`."""
        self._thread.submit(self._store, name, content, offsets, index)

    def finish(self) -> None:
        """Everything is on the disk then."""
        self._thread.submit(self._close_file)
        self._thread.finish()

    def abandon(self) -> None:
        """Stops early."""
        self._thread.stop()
        if self._handle is not None:
            with contextlib.suppress(OSError):  # the disk is full, and the folder goes anyway
                self._handle.close()

    def _store(self, name: str, content: Tensor | io.BytesIO, offsets: Any, index: int | None) -> None:
        import torch
        from torch.distributed.checkpoint.filesystem import _StorageInfo
        from torch.distributed.checkpoint.metadata import MetadataIndex

        if self._handle is not None and self._handle.tell() >= self._file_bytes:
            self._close_file()
        if self._handle is None:
            path = self._folder / f"__{self._lane}_{self._files}.distcp"
            self._handle = open(path, "wb")  # noqa: SIM115 closed at its end
            self._files += 1
        start = self._handle.tell()
        if isinstance(content, io.BytesIO):
            self._handle.write(content.getbuffer())
        else:
            try:
                torch.save(content, self._handle)
            except RuntimeError as error:  # what torch makes of a write that failed
                reason = error.__context__ if isinstance(error.__context__, OSError) else error
                raise ToolError(f"{self._handle.name}: {name} could not be written ({reason})") from None
        place = _StorageInfo(os.path.basename(self._handle.name), start, self._handle.tell() - start)
        self.places[MetadataIndex(name, offsets, index)] = place

    def _close_file(self) -> None:
        if self._handle is not None:
            with self._handle:
                flush_to_disk(self._handle)
            self._handle = None
