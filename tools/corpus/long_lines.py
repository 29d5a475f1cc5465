"""One line of JSON of any length, without holding it: spooled to disk, checked, and read back in pieces.

The value of the text key is cut out of the line as it is spooled; what is left, the skeleton, is parsed
as any other line and so decides whether the line is a document. Its text is then decoded piece by piece.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, TYPE_CHECKING

import msgspec

from megatron_hybrid.tools.jsonl_reader import UTF8_BOM, RejectedLine

if TYPE_CHECKING:
    from megatron_hybrid.tools.corpus.documents import LineParser

STRING_PART = re.compile(rb'[^"\\]*+')
HIGH_SURROGATE = re.compile(rb"\\u[dD][89abAB][0-9a-fA-F]{2}")
OUTSIDE = re.compile(rb'["{}\[\]]')
PIECE_BYTES = 1 << 20  # of the raw JSON string, decoded at a time
SKELETON_BYTES = 8 << 20  # a line with more than this beside its text is no document
KEEP_BYTES = 64 << 10  # the longest key that can be recognised
PLACEHOLDER = b'"x"'
_decode_string = msgspec.json.Decoder(str).decode


class LongText:
    """The text of a long line: `pieces` yields it in order; `raw_bytes` is its size as JSON."""

    def __init__(self, file: IO[bytes], start: int, end: int) -> None:
        self._file = file
        self._start = start
        self._end = end

    def pieces(self) -> Iterator[str]:
        """Strings of about PIECE_BYTES; raises RejectedLine where the text is not valid."""
        self._file.seek(self._start)
        left = self._end - self._start
        rest = b""
        while left or rest:
            chunk = self._file.read(min(PIECE_BYTES, left))
            left -= len(chunk)
            data = rest + chunk
            cut = len(data) if not left else _safe_cut(data)
            yield _decoded(data[:cut])
            rest = data[cut:]


def _decoded(raw: bytes) -> str:
    try:
        return _decode_string(b'"' + raw + b'"')
    except UnicodeDecodeError as error:
        raise RejectedLine("invalid_utf8", f"byte {error.object[error.start]:#04x}") from None
    except msgspec.DecodeError as error:
        try:
            text = json.loads(b'"' + raw + b'"')
        except ValueError:
            raise RejectedLine("malformed_json", str(error)) from None
        surrogate = next((character for character in text if "\ud800" <= character <= "\udfff"), "")
        if surrogate:
            raise RejectedLine("lone_surrogate", f"U+{ord(surrogate):04X}") from None
        return str(text)


def _safe_cut(data: bytes) -> int:
    """The last place of `data` that splits no escape, no surrogate pair and no UTF-8 sequence."""
    for cut in range(len(data) - 16, max(len(data) - 64, 0), -1):
        if data[cut] & 0xC0 != 0x80 and b"\\" not in data[max(0, cut - 12) : cut]:
            return cut
    cut = data.rfind(b"\\", 0, len(data) - 12)  # escapes all along: cut before one
    run = len(data[: cut + 1]) - len(data[: cut + 1].rstrip(b"\\"))
    if run % 2 == 0:
        cut -= 1  # this backslash is the second half of an escaped one
    if HIGH_SURROGATE.fullmatch(data, max(0, cut - 6), cut):
        cut -= 6
    return max(cut, 0)


class _Scanner:
    """Finds the value of a top-level key in a line of JSON that arrives in chunks."""

    def __init__(self, key: str) -> None:
        self._key = key
        self._depth = 0
        self._in_string = False
        self._string_start = 0  # file offset after the opening quote
        self._string = bytearray()  # the start of the string, in case it is a key
        self._expect_value = False
        self._position = 0
        self._escaped = False
        self.spans: list[tuple[int, int]] = []  # of values of the key that are strings

    def feed(self, chunk: bytes) -> None:
        at = 0
        while at < len(chunk):
            at = self._inside(chunk, at) if self._in_string else self._outside(chunk, at)
        self._position += len(chunk)

    def _inside(self, chunk: bytes, at: int) -> int:
        if self._escaped:
            self._escaped = False
            self._keep(chunk[at : at + 1])
            return at + 1
        match = STRING_PART.match(chunk, at)
        end = match.end() if match else at
        self._keep(chunk[at : min(end, at + KEEP_BYTES)])
        if end == len(chunk):
            return end
        if chunk[end] == 0x5C:
            self._escaped = True
            self._keep(b"\\")
            return end + 1
        self._in_string = False
        if self._depth == 1:
            self._string_done(self._position + end)
        return end + 1

    def _keep(self, part: bytes) -> None:
        if len(self._string) <= KEEP_BYTES:
            self._string += part

    def _string_done(self, end: int) -> None:
        if self._expect_value:
            self.spans.append((self._string_start, end))
            self._expect_value = False
            return
        try:
            is_key = json.loads(b'"' + self._string + b'"') == self._key
        except ValueError:
            is_key = False
        self._expect_value = is_key  # an array holds strings too, but at depth 2

    def _outside(self, chunk: bytes, at: int) -> int:
        match = OUTSIDE.search(chunk, at)
        between = chunk[at : match.start() if match else len(chunk)]
        if self._depth == 1 and b"," in between:
            self._expect_value = False  # the value was a number, true, false or null
        if match is None:
            return len(chunk)
        found = match.group()
        if found == b'"':
            self._in_string = True
            self._string_start = self._position + match.end()
            self._string.clear()
        elif found in b"{[":
            self._depth += 1
            self._expect_value = False
        else:
            self._depth -= 1
        return match.end()


@contextmanager
def read_long_line(
    pieces: Iterator[bytes], parser: "LineParser", scratch: Path, first_line: bool
) -> Iterator[tuple[LongText, bytes]]:
    """Yields (text, metadata object) of one long line; raises RejectedLine if it is no document.

    Consumes `pieces`. The line is spooled to a nameless file in `scratch`. A fault inside the text
    is found before anything is yielded.
    """
    scanner = _Scanner(parser.key)
    with TemporaryFile(dir=scratch) as file:
        for number, piece in enumerate(pieces):
            if first_line and number == 0:
                piece = piece.removeprefix(UTF8_BOM)
            file.write(piece)
            scanner.feed(piece)
        size = file.tell()
        start, end = scanner.spans[-1] if scanner.spans else (size, size)  # of equal keys the last counts
        skeleton_bytes = size - (end - start)
        if skeleton_bytes > SKELETON_BYTES:
            raise RejectedLine("document_too_long", f"{skeleton_bytes:,} bytes beside the text of {parser.key!r}")
        file.seek(0)
        head = file.read(start)
        file.seek(end)
        tail = file.read()
        if scanner.spans and start < end:
            head, tail = head[:-1] + PLACEHOLDER, tail[1:]  # the quotes are outside the span
        _, metadata = parser.line(head + tail, first_line=False)
        text = LongText(file, start, end)
        for _ in text.pieces():
            pass
        yield text, metadata
