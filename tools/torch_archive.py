"""The archives of one tensor that a torch_dist checkpoint is made of: checked, and read without torch.load.

torch.save makes a zip file that is not compressed: a small pickle that describes the tensor, and its bytes. torch.load
reads those by copies of its own and does not compare their checksum. Here the pickle is read by an unpickler that
knows only what a plain tensor needs, and the bytes go from the disk to where they belong, through the checksum.
"""

from __future__ import annotations

import io
import math
import os
import pickle  # only to subclass Unpickler below; nothing is loaded with pickle.load or pickle.loads
import struct
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from megatron_hybrid.tools.cli import ToolError
from megatron_hybrid.tools.direct_io import DirectFile

if TYPE_CHECKING:
    from numpy import ndarray

Shape = tuple[int, ...]
DTYPES = {"FloatStorage": ("float32", 4), "BFloat16Storage": ("bfloat16", 2), "HalfStorage": ("float16", 2)}
SMALL_BYTES = 2**16  # the description and the other entries beside the tensor's bytes


@dataclass(frozen=True)
class Payload:
    """Where in an archive the bytes of its tensor lie, in order and without gaps, and their checksum."""

    entry: str
    dtype: str
    shape: Shape
    offset_bytes: int
    size_bytes: int
    crc32: int

    def pieces(self, path: Path, archive_offset_bytes: int, place: str) -> Iterator[ndarray[Any, Any]]:
        """The bytes, in order, as arrays that hold until the next is asked for.

        Raises:
            ToolError: at the end, if the checksum is not theirs. `place` says in the message what was read.
        """
        from isal import isal_zlib  # ten times as fast as zlib's

        checksum = 0
        with DirectFile(path, os.O_RDONLY) as file:
            for piece in file.pieces(archive_offset_bytes + self.offset_bytes, self.size_bytes):
                checksum = isal_zlib.crc32(piece, checksum)
                yield piece
        if checksum != self.crc32:
            raise _damaged(place, self.entry)


@dataclass(frozen=True)
class _Rebuilt:
    """What the pickle of a tensor says: the arguments of torch's function that rebuilds it."""

    storage: object
    offset: object
    shape: Shape
    strides: Shape
    requires_grad: object
    hooks: object


class _Unpickler(pickle.Unpickler):
    """Builds the description of a plain tensor; whatever else is named stops it."""

    def find_class(self, module: str, name: str) -> Any:
        """A stand-in for what the pickle names."""
        if module == "torch" and name in DTYPES:
            return name
        return {("torch._utils", "_rebuild_tensor_v2"): _Rebuilt, ("collections", "OrderedDict"): dict}[module, name]

    def persistent_load(self, identity: Any) -> Any:
        """A storage, as torch.save describes it."""
        return identity


def plain_payload(archive: FileSlice) -> Payload | None:
    """What an archive holds; None where that is not one plain tensor, or not clear: torch.load shall judge then."""
    try:
        with zipfile.ZipFile(archive) as opened:
            entries = {entry.filename: entry for entry in opened.infolist()}
            if len(entries) < len(opened.infolist()) or any(entry.compress_type for entry in entries.values()):
                return None
            folder = next(iter(entries)).split("/")[0]
            # Small ones are read here, which compares their checksums too.
            small = {name: opened.read(entry) for name, entry in entries.items() if entry.file_size <= SMALL_BYTES}
            tensor = _Unpickler(io.BytesIO(small[f"{folder}/data.pkl"])).load()
            _, storage, key, _, count = tensor.storage
            entry = entries[f"{folder}/data/{key}"]
            archive.seek(entry.header_offset)
            header = archive.read(30)
            start = entry.header_offset + 30 + sum(struct.unpack("<HH", header[26:]))
            dtype, item_bytes = DTYPES[storage]
            size_bytes = math.prod(tensor.shape) * item_bytes
            contiguous = tuple(math.prod(tensor.shape[dimension + 1 :]) for dimension in range(len(tensor.shape)))
            plain = (
                not set(entries) - set(small) - {entry.filename}
                and small[f"{folder}/byteorder"] == sys.byteorder.encode()
                and (tensor.offset, tensor.strides, tensor.hooks) == (0, contiguous, {})
                and size_bytes == count * item_bytes == entry.file_size == entry.compress_size
                and not entry.flag_bits & 1  # encrypted
                and header[:4] == b"PK\3\4"
                and start + size_bytes <= len(archive)
            )
    except Exception:  # a damaged or hostile archive raises nearly anything
        return None
    return Payload(entry.filename, dtype, tensor.shape, start, size_bytes, entry.CRC) if plain else None


class FileSlice(io.RawIOBase):
    """A read-only view of `length_bytes` bytes of an open file, for readers that expect a whole file."""

    def __init__(self, handle: BinaryIO, offset_bytes: int, length_bytes: int) -> None:
        self._handle, self._offset, self._length = handle, offset_bytes, length_bytes
        self._position = 0

    def __len__(self) -> int:
        return self._length

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._length}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        wanted = max(0, min(len(buffer), self._length - self._position))
        self._handle.seek(self._offset + self._position)
        count = self._handle.readinto(memoryview(buffer)[:wanted])  # type: ignore[attr-defined]
        self._position += count
        return count


def check_archive(view: FileSlice, place: str) -> None:
    """Compares the checksums that torch.save stored with the bytes; torch.load itself does not look at them."""
    try:
        with zipfile.ZipFile(view) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise ToolError(f"{place}: is compressed, which torch.save never does; refused")
            damaged = archive.testzip()
    except (zipfile.BadZipFile, NotImplementedError, EOFError, ValueError) as error:
        raise ToolError(f"{place}: unreadable ({first_line(error)}); use another iteration") from None
    if damaged is not None:
        raise _damaged(place, damaged)


def _damaged(place: str, entry: str) -> ToolError:
    return ToolError(f"{place}: checksum of {entry} does not match; the file is damaged, use another iteration")


def first_line(error: Exception) -> str:
    """What an error says, on one line."""
    lines = str(error).splitlines()
    return lines[0][:200] if lines else type(error).__name__
