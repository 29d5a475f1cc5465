"""Cuts a byte stream into blocks of whole lines, whatever the length of the lines."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

MAX_LINE_BYTES = 8 << 20  # longer lines are handed out in pieces, so memory does not follow the file


@dataclass
class LineBlock:
    """Consecutive whole lines, without their newlines."""

    lines: list[bytes]
    first_line: int  # number of the first one, from 1 at the start of the segment
    offset: int  # of the first one, in decompressed bytes from the start of the file


@dataclass
class LongLine:
    """A line longer than MAX_LINE_BYTES. `pieces` must be consumed before the next block is asked for."""

    pieces: Iterator[bytes]
    first_line: int
    offset: int


class LineCutter:
    """Iterates over the lines of `chunks` that start before byte `end`, in blocks.

    `start` is the offset of the first chunk. A segment that starts inside a file begins one byte early,
    at `start` - 1, and owns only the lines that start at or after `start`: then every line of a file
    belongs to exactly one of the segments the file is cut into. `end` may be set while chunks are read, by
    what reads them, before it hands out the first byte at or after it.
    """

    def __init__(self, chunks: Iterable[bytes], start: int = 0, end: int | None = None) -> None:
        self._chunks = iter(chunks)
        self.end = end
        self.offset = max(start - 1, 0)  # of self._rest
        self._rest = b""
        self.lines = 0  # lines handed out so far
        self.exhausted = False
        self._inside = start > 0

    def _skip_first_line(self) -> None:
        """Drops everything up to and including the first newline: it belongs to the segment before."""
        for chunk in self._chunks:
            at = chunk.find(b"\n")
            if at >= 0:
                self._rest = chunk[at + 1 :]
                self.offset += at + 1
                return
            self.offset += len(chunk)
            if self._past_end():
                return
        self.exhausted = True

    def __iter__(self) -> Iterator[LineBlock | LongLine]:
        """Yields the blocks; re-raises what reading the chunks raises, after all whole lines before it."""
        if self._inside:
            self._skip_first_line()
        held = [self._rest] if self._rest else []  # pieces of the data not handed out yet
        held_bytes = len(self._rest)
        while not self.exhausted and not self._past_end():
            cut = held[-1].rfind(b"\n") if held else -1
            if cut >= 0:
                data = b"".join(held)
                cut += len(data) - len(held[-1])
                lines = data[:cut].split(b"\n")
                held = [data[cut + 1 :]] if cut + 1 < len(data) else []
                held_bytes = len(data) - cut - 1
                yield from self._block(lines, cut + 1)
                continue
            if held_bytes > MAX_LINE_BYTES:
                long = LongLine(self._pieces(held), self.lines + 1, self.offset)
                self.lines += 1
                yield long
                for _ in long.pieces:  # whatever the caller left
                    pass
                held, held_bytes = ([self._rest] if self._rest else []), len(self._rest)
                continue
            chunk = next(self._chunks, None)
            if chunk is None:
                self.exhausted = True
                if held:
                    yield from self._block([b"".join(held)], held_bytes)
                return
            held.append(chunk)
            held_bytes += len(chunk)

    def _past_end(self) -> bool:
        return self.end is not None and self.offset >= self.end

    def _block(self, lines: list[bytes], size: int) -> Iterator[LineBlock]:
        """The block of `lines`, less those that start at or after the end of the segment."""
        if self.end is not None and self.offset + size > self.end:
            at = self.offset
            for number, line in enumerate(lines):
                if at >= self.end:
                    lines = lines[:number]
                    break
                at += len(line) + 1
            self.exhausted = True
        block = LineBlock(lines, self.lines + 1, self.offset)
        self.offset += size
        self.lines += len(lines)
        if lines:
            yield block

    def _pieces(self, held: list[bytes]) -> Iterator[bytes]:
        """The bytes of one long line, of which `held` was read already; leaves what follows in _rest."""
        self._rest = b""
        queue = iter(held)
        while True:
            piece = next(queue, None)
            if piece is None:
                piece = next(self._chunks, None)
            if piece is None:
                self.exhausted = True
                return
            at = piece.find(b"\n")
            if at >= 0:
                self.offset += at + 1
                self._rest = piece[at + 1 :]
                if at:
                    yield piece[:at]
                return
            self.offset += len(piece)
            yield piece
