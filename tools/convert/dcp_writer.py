"""Writes a torch distributed checkpoint tensor by tensor, without a process group: the inverse of `dcp_reader`.

torch's own writer wants all tensors in memory at once and a planner. The files are the same: each chunk is what
torch.save makes, and `.metadata` is torch's own records, which `dcp_reader` and torch both read.
"""

from __future__ import annotations

import io
import itertools
import pickle  # only to write; nothing is loaded
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from megatron_hybrid.tools.atomic_file import flush_to_disk, fsync_folder
from megatron_hybrid.tools.cli import ToolError
from megatron_hybrid.tools.convert.in_order import InOrder, workers
from megatron_hybrid.tools.dcp_reader import METADATA_FILE
from megatron_hybrid.tools.direct_io import DirectWriter

if TYPE_CHECKING:
    from torch import Tensor

CHUNK_BYTES = 64 * 2**20  # a rank that loads a part of a tensor reads whole chunks
FILE_BYTES = 2**30  # so that there are files enough to be read and checked side by side


class DcpWriter:
    """Writes `__LANE_N.distcp` files into a folder, and `.metadata` at the end, so that it says the rest is there.

    In a with statement it finishes at the end of the block; where that raises, there is no `.metadata`. `hashes` has
    then what `checkpoint.commit.hash_file` would say of each `.distcp` file, found while it was written.

    Args:
        folder: an existing empty folder.
        chunk_bytes: rows of a tensor are stored in blocks of at most this size.
        file_bytes: a file is closed and the next begun once it is this large.
        lanes: threads that write, each into files of its own, a block at a time.
    """

    def __init__(
        self, folder: Path, chunk_bytes: int = CHUNK_BYTES, file_bytes: int = FILE_BYTES, lanes: int = workers()
    ) -> None:
        self._folder, self._chunk_bytes = folder, chunk_bytes
        self._tensors: dict[str, Any] = {}
        self.hashes: dict[str, dict[str, Any]] = {}
        self._lanes = [_Lane(folder, lane, file_bytes) for lane in range(lanes)]
        self._turn = itertools.cycle(self._lanes)

    def __enter__(self) -> DcpWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self.finish() if kind is None else self.abandon()

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
            part = _alone(part)
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
            lane.end()
        for lane in self._lanes:
            lane.finish()
            self.hashes |= lane.hashes
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


def _alone(part: Tensor) -> Tensor:
    """The same memory as a tensor that knows of nothing else: torch.save stores all that a view belongs to."""
    import torch

    if part.untyped_storage().nbytes() == part.nbytes:
        return part
    content = torch.from_numpy(part.reshape(-1).view(torch.uint8).numpy())
    return content.view(part.dtype).view(part.shape)


class _HashedFile:
    """A file that is written once from front to back by one thread, and its hash."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._digest = xxhash.xxh3_128()
        self._file = DirectWriter(path)
        self._content = self._file.range(0)

    @property
    def size_bytes(self) -> int:
        """What was written so far."""
        return self._content.size_bytes

    def write(self, content: Any) -> int:
        """For torch.save."""
        import numpy

        self._digest.update(content)
        self._content.write(numpy.frombuffer(content, numpy.uint8))
        return len(content)

    def flush(self) -> None:
        """For torch.save, which does not mean the disk."""

    def entry(self) -> dict[str, Any]:
        """What `checkpoint.commit.hash_file` would say."""
        return {"bytes": self.size_bytes, "xxh3": self._digest.hexdigest()}

    def finish(self) -> None:
        """Everything is on the disk then."""
        self._content.end()
        self._file.finish(self.size_bytes)
        self._file.close()

    def abandon(self) -> None:
        """Closes it as it is."""
        self._file.close()


class _Lane:
    """A thread and the file it writes."""

    def __init__(self, folder: Path, lane: int, file_bytes: int) -> None:
        self.places: dict[Any, Any] = {}
        self.hashes: dict[str, dict[str, Any]] = {}
        self._folder, self._lane, self._file_bytes, self._files = folder, lane, file_bytes, 0
        self._file: _HashedFile | None = None
        self._thread = InOrder(f"write{lane}", 1)

    def store(self, name: str, content: Tensor | io.BytesIO, offsets: Any, index: int | None) -> None:
        """Hands a chunk over; its place is known after `finish`."""
        self._thread.submit(self._store, name, content, offsets, index)

    def end(self) -> None:
        """Nothing more comes."""
        self._thread.submit(self._close_file)

    def finish(self) -> None:
        """After `end`: everything is on the disk then."""
        self._thread.finish()

    def abandon(self) -> None:
        """Stops early."""
        self._thread.stop()
        if self._file is not None:
            self._file.abandon()

    def _store(self, name: str, content: Tensor | io.BytesIO, offsets: Any, index: int | None) -> None:
        import torch
        from torch.distributed.checkpoint.filesystem import _StorageInfo
        from torch.distributed.checkpoint.metadata import MetadataIndex

        if self._file is not None and self._file.size_bytes >= self._file_bytes:
            self._close_file()
        if self._file is None:
            self._file = _HashedFile(self._folder / f"__{self._lane}_{self._files}.distcp")
            self._files += 1
        start = self._file.size_bytes
        if isinstance(content, io.BytesIO):
            self._file.write(content.getbuffer())
        else:
            try:
                torch.save(content, self._file)  # type: ignore[arg-type]
            except RuntimeError as error:  # what torch makes of a write that failed
                reason = error.__context__ if isinstance(error.__context__, OSError) else error
                raise ToolError(f"{self._file.path}: {name} could not be written ({reason})") from None
        place = _StorageInfo(self._file.path.name, start, self._file.size_bytes - start)
        self.places[MetadataIndex(name, offsets, index)] = place

    def _close_file(self) -> None:
        if self._file is not None:
            self.hashes[self._file.path.name] = self._file.entry()
            self._file.finish()
            self._file = None
