"""Large files, read and written past the page cache where the file system can (O_DIRECT).

A conversion touches every byte once. Through the page cache each byte costs a copy and a part of a new page, together
more than its hash, and pushes out what others keep there. Past it the disk reads and writes our memory itself, but
whole blocks only, so that all goes through one buffer per thread, which stays in the processor's caches.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import threading
from collections.abc import Buffer, Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy import ndarray

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
        """Closes it."""
        os.close(self._descriptor)

    def pieces(self, offset_bytes: int, size_bytes: int) -> Iterator[ndarray[Any, Any]]:
        """The bytes of a range, in order, as arrays that hold until the next is asked for.

        Raises:
            EOFError: the file ends before.
        """
        buffer = _buffer()
        end = offset_bytes + size_bytes
        while offset_bytes < end:
            start = offset_bytes - offset_bytes % BLOCK_BYTES
            wanted = min(len(buffer), -(-(end - start) // BLOCK_BYTES) * BLOCK_BYTES)
            count = self._call(os.preadv, buffer[:wanted], start)
            if start + count <= offset_bytes:
                raise EOFError(f"{self._path}: it ends before byte {end}")
            piece = buffer[offset_bytes - start : min(count, end - start)]
            yield piece
            offset_bytes += len(piece)

    def write(self, offset_bytes: int, content: ndarray[Any, Any]) -> None:
        """Writes whole blocks from a page of memory on."""
        while len(content):
            written = self._call(os.pwritev, content, offset_bytes)
            content, offset_bytes = content[written:], offset_bytes + written

    def resize(self, size_bytes: int) -> None:
        """Cuts the file, or makes it longer with zeros."""
        os.ftruncate(self._descriptor, size_bytes)

    def sync(self) -> None:
        """Waits until all is on the disk."""
        os.fsync(self._descriptor)

    def _call(self, call: Callable[..., int], content: ndarray[Any, Any], offset_bytes: int) -> int:
        try:
            return call(self._descriptor, [content], offset_bytes)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)  # some file systems refuse only here
            fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags & ~os.O_DIRECT)
            return call(self._descriptor, [content], offset_bytes)


class DirectWriter:
    """A new file of a size known before, whose ranges several threads write, in any order."""

    def __init__(self, path: Path, size_bytes: int) -> None:
        self._file = DirectFile(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        self._size_bytes = size_bytes
        self._edges: list[tuple[int, bytes]] = []  # parts of blocks
        self._file.resize(size_bytes)  # or writes that make the file longer wait for each other

    def __enter__(self) -> DirectWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def write(self, offset_bytes: int, content: Buffer, seen: Callable[[Any], object] = len) -> None:
        """Writes bytes and gives them, piece by piece in order, to `seen`, which makes a hash of them."""
        import numpy

        buffer = _buffer()
        content = numpy.frombuffer(content, numpy.uint8)
        while len(content):
            inside = offset_bytes % BLOCK_BYTES
            count = min(len(content), BLOCK_BYTES - inside if inside else len(buffer))
            if count > BLOCK_BYTES:
                count -= count % BLOCK_BYTES
            piece = buffer[:count]
            piece[:] = content[:count]
            seen(piece)
            if count % BLOCK_BYTES:
                self._edges.append((offset_bytes, piece.tobytes()))
            else:
                self._file.write(offset_bytes, piece)
            content, offset_bytes = content[count:], offset_bytes + count

    def finish(self) -> None:
        """All is on the disk then, once every range was written."""
        blocks: dict[int, bytearray] = {}
        for offset_bytes, part in self._edges:
            inside = offset_bytes % BLOCK_BYTES
            block = blocks.setdefault(offset_bytes - inside, bytearray(BLOCK_BYTES))
            block[inside : inside + len(part)] = part
        piece = _buffer()[:BLOCK_BYTES]
        for offset_bytes, block in blocks.items():
            piece[:] = memoryview(block)
            self._file.write(offset_bytes, piece)
        self._file.resize(self._size_bytes)
        self._file.sync()


def _buffer() -> ndarray[Any, Any]:
    """This thread's memory for pieces, at the beginning of a page."""
    import numpy

    if not hasattr(_held, "buffer"):
        memory = numpy.empty(PIECE_BYTES + BLOCK_BYTES, numpy.uint8)
        start = -memory.ctypes.data % BLOCK_BYTES
        _held.buffer = memory[start : start + PIECE_BYTES]
    return _held.buffer
