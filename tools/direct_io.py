"""Large files, read and written past the page cache where the file system can (O_DIRECT).

A conversion touches every byte once. Through the page cache each byte costs a copy and a part of a new page, together
more than its hash, and pushes out what others keep there. Past it the disk reads and writes our memory itself, but
whole blocks only, so that all goes through two buffers per thread, which stay in the processor's caches.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy import ndarray
    from torch import Tensor

BLOCK_BYTES = max(4096, mmap.PAGESIZE)  # no disk has larger ones; multiples of it may be read and written
PIECE_BYTES = 4 * 2**20  # of each call
_held = threading.local()


class DirectFile:
    """An open file that is read and written in whole blocks, past the page cache unless the file system refuses."""

    def __init__(self, path: Path, flags: int) -> None:
        """flags: os.open's."""
        self._path = path
        try:
            self._descriptor = os.open(path, flags | os.O_DIRECT, 0o666)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self._descriptor = os.open(path, flags, 0o666)

    def __enter__(self) -> DirectFile:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes it, if it is open."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def pieces(self, offset_bytes: int, size_bytes: int) -> Iterator[ndarray[Any, Any]]:
        """The bytes of a range, in order, as arrays that hold until the next is asked for.

        Raises:
            EOFError: the file ends before.
        """
        buffer = _buffer("read")
        end = offset_bytes + size_bytes
        while offset_bytes < end:
            start = offset_bytes - offset_bytes % BLOCK_BYTES
            wanted = min(len(buffer), -(-(end - start) // BLOCK_BYTES) * BLOCK_BYTES)
            count = self._transfer(os.preadv, buffer[:wanted], start)
            if start + count <= offset_bytes:
                raise EOFError(f"{self._path}: it ends before byte {end}")
            piece = buffer[offset_bytes - start : min(count, end - start)]
            yield piece
            offset_bytes += len(piece)

    def write(self, offset_bytes: int, content: ndarray[Any, Any]) -> None:
        """Writes whole blocks from a page of memory on."""
        while len(content):
            written = self._transfer(os.pwritev, content, offset_bytes)
            content, offset_bytes = content[written:], offset_bytes + written

    def resize(self, size_bytes: int) -> None:
        """Cuts the file, or makes it longer with zeros."""
        self._call(os.ftruncate, size_bytes)

    def sync(self) -> None:
        """Waits until all is on the disk."""
        self._call(os.fsync)

    def _transfer(self, call: Callable[..., int], content: ndarray[Any, Any], offset_bytes: int) -> int:
        try:
            return self._call(call, [content], offset_bytes)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)  # some file systems refuse only here
            fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags & ~os.O_DIRECT)
            return self._call(call, [content], offset_bytes)

    def _call(self, call: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return call(self._descriptor, *arguments)
        except OSError as error:
            error.filename = str(self._path)  # for the message; a descriptor has no name
            raise


class DirectWriter:
    """A new file whose ranges several threads write, in any order.

    Args:
        path: of the file.
        size_bytes: what it will have, if that is known: writes that make a file longer wait for each other.
    """

    def __init__(self, path: Path, size_bytes: int = 0) -> None:
        self._file = DirectFile(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        self._edges: list[tuple[int, bytes]] = []  # parts of blocks
        self._file.resize(size_bytes)

    def range(self, offset_bytes: int) -> Range:
        """Consecutive bytes from here on, for the calling thread to write before it begins another range."""
        return Range(self._file, self._edges, offset_bytes)

    def finish(self, size_bytes: int) -> None:
        """All is on the disk then, once every range was written, which are `size_bytes` together."""
        blocks: dict[int, bytearray] = {}
        for offset_bytes, part in self._edges:
            inside = offset_bytes % BLOCK_BYTES
            block = blocks.setdefault(offset_bytes - inside, bytearray(BLOCK_BYTES))
            block[inside : inside + len(part)] = part
        piece = _buffer("write")[:BLOCK_BYTES]
        for offset_bytes, block in blocks.items():
            piece[:] = memoryview(block)
            self._file.write(offset_bytes, piece)
        self._file.resize(size_bytes)
        self._file.sync()

    def close(self) -> None:
        """Closes the file as it is."""
        self._file.close()


class Range:
    """Consecutive bytes of a DirectWriter's file, written from front to back."""

    def __init__(self, file: DirectFile, edges: list[tuple[int, bytes]], offset_bytes: int) -> None:
        self.size_bytes = 0  # that were written
        self._file, self._edges = file, edges
        self._buffer = _buffer("write")
        self._first = self._end = offset_bytes % BLOCK_BYTES  # what is filled of the buffer
        self._offset_bytes = offset_bytes - self._first  # where in the file the buffer belongs

    def write(self, piece: ndarray[Any, Any]) -> None:
        """Takes the next bytes."""
        self.size_bytes += len(piece)
        while len(piece):
            count = min(len(piece), len(self._buffer) - self._end)
            self._buffer[self._end : self._end + count] = piece[:count]
            piece, self._end = piece[count:], self._end + count
            if self._end == len(self._buffer):
                self.end()

    def end(self) -> None:
        """Writes what has come; parts of blocks wait for their neighbours, until the file is finished."""
        start, first, end = self._offset_bytes, self._first, self._end
        self._offset_bytes, self._first, self._end = start + end, 0, 0
        blocks = min(end, BLOCK_BYTES) if first else 0
        blocks_end = max(blocks, end - end % BLOCK_BYTES)
        self._file.write(start + blocks, self._buffer[blocks:blocks_end])
        for part, part_end in ((first, blocks), (blocks_end, end)):
            if part < part_end:
                self._edges.append((start + part, self._buffer[part:part_end].tobytes()))


class Stream:
    """Bytes that come in pieces, handed on in parts of other sizes."""

    def __init__(self, pieces: Iterator[ndarray[Any, Any]]) -> None:
        self._pieces, self._rest = pieces, _buffer("read")[:0]

    def take(self, size_bytes: int) -> Iterator[ndarray[Any, Any]]:
        """The next bytes, as arrays that hold until the next is asked for."""
        while size_bytes:
            if not len(self._rest):
                self._rest = next(self._pieces)
            part, self._rest = self._rest[:size_bytes], self._rest[size_bytes:]
            size_bytes -= len(part)
            yield part

    def finish(self) -> None:
        """Goes on to the end, past what nobody wants, for the checks that are made there."""
        for _ in self._pieces:
            pass


def fill(tensor: Tensor, pieces: Iterable[ndarray[Any, Any]]) -> None:
    """Copies the bytes of a tensor into a contiguous one."""
    import torch

    content = tensor.view(-1).view(torch.uint8).numpy()
    filled = 0
    for piece in pieces:
        content[filled : filled + len(piece)] = piece
        filled += len(piece)


def _buffer(use: str) -> ndarray[Any, Any]:
    """This thread's memory for pieces to "read" or "write", at the beginning of a page."""
    import numpy

    if not hasattr(_held, use):
        memory = numpy.empty(PIECE_BYTES + BLOCK_BYTES, numpy.uint8)
        start = -memory.ctypes.data % BLOCK_BYTES
        setattr(_held, use, memory[start : start + PIECE_BYTES])
    buffer: ndarray[Any, Any] = getattr(_held, use)
    return buffer
