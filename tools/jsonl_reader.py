"""Reads text documents from JSONL files: plain, gzip or zstd, told apart by their first bytes.

Two questions, kept apart: `read_lines` yields every line of a file or fails (a compressed file that
ends early never passes for a short one); `parse_text` says what one line holds, or why it is no document.
"""

import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from megatron_hybrid.tools.cli import ToolError

GZIP_MAGIC = b"\x1f\x8b"
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
ZSTD_SKIPPABLE = {bytes([0x50 + low, 0x2A, 0x4D, 0x18]) for low in range(16)}  # seekable and pzstd files
ZSTD_MAX_WINDOW = 2**31  # files made with `zstd --long=31`
READ_BYTES = 128 << 10  # compressed bytes decoded at a time; bounds what one step can inflate to
UTF8_BOM = b"\xef\xbb\xbf"

# Why a line is no document. `blank_line` holds nothing, so it is counted but never an error.
REASONS = {
    "blank_line": "the line is blank",
    "invalid_utf8": "the line is not UTF-8",
    "malformed_json": "the line is not JSON",
    "not_an_object": "the line is JSON, but not an object",
    "missing_key": "the object has no such key",
    "wrong_type": "the value is not a string",
    "lone_surrogate": "the text has a lone surrogate, which UTF-8 cannot hold",
    "empty_text": "the text is empty",
    "no_tokens": "the tokenizer makes no token of the text",
}


class RejectedLine(Exception):
    """One line that is no document: `reason` is a key of REASONS, `detail` the particulars."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{REASONS[reason]}{': ' if detail else ''}{detail}")
        self.reason = reason


class _ZstdStream(io.RawIOBase):
    """Decompressed bytes of a zstd file of one or more frames.

    Raises EOFError where the file ends inside a frame; zstandard's own stream_reader ends without
    an error there, after whatever it could decode.
    """

    def __init__(self, source: BinaryIO) -> None:
        import zstandard

        self._source = source
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=ZSTD_MAX_WINDOW)
        self._frame: Any = None
        self._input = b""
        self._output = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Fills `buffer` with up to its length of decompressed bytes; 0 at the end of the last frame."""
        while not self._output:
            if not self._input:
                self._input = self._source.read(READ_BYTES)
            if not self._input:
                if self._frame is not None:
                    raise EOFError("the file ends inside a zstd frame")
                return 0
            if self._frame is None:
                self._frame = self._decompressor.decompressobj()
            self._output = memoryview(self._frame.decompress(self._input))
            self._input = b""
            if self._frame.eof:
                self._input, self._frame = self._frame.unused_data, None
        size = min(len(buffer), len(self._output))
        buffer[:size] = self._output[:size]
        self._output = self._output[size:]
        return size


def open_decompressed(path: Path, source: io.BufferedReader) -> io.BufferedReader:
    """Wraps `source`, opened at the start of `path`, so that it reads as decompressed bytes.

    Raises ToolError if `path` is named .gz or .zst and its content is something else.
    """
    magic = source.read(4)
    source.seek(0)
    is_gzip = magic.startswith(GZIP_MAGIC)
    is_zstd = magic == ZSTD_MAGIC or magic in ZSTD_SKIPPABLE
    for suffix, matches in ((".gz", is_gzip), (".zst", is_zstd)):
        if path.suffix == suffix and not matches:
            what = "is empty" if not magic else f"starts with {magic!r}"
            raise ToolError(f"{path}: named {suffix}, but the file {what}; fetch it again or rename it")
    if is_gzip:
        return io.BufferedReader(gzip.GzipFile(fileobj=source, mode="rb"), READ_BYTES)
    if is_zstd:
        return io.BufferedReader(_ZstdStream(source), READ_BYTES)
    return source


def read_lines(path: Path, on_bytes: Callable[[int], object] | None = None) -> Iterator[tuple[int, bytes]]:
    """Yields (line number from 1, line without its newline) for every line of a JSONL file.

    `on_bytes` is called with the number of stored (compressed) bytes consumed since its last call.
    Raises ToolError, naming the file and the last whole line, where a compressed stream is truncated
    or corrupt: how many lines are lost there is unknown, so this can be an error only.
    """
    import zstandard

    number, consumed = 0, 0
    with open(path, "rb") as source:
        stream = open_decompressed(path, source)
        try:
            for number, line in enumerate(stream, 1):
                if on_bytes is not None and number % 64 == 0:
                    position = source.tell()
                    on_bytes(position - consumed)
                    consumed = position
                yield number, line.removesuffix(b"\n")
        except (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
            raise ToolError(
                f"{path}: truncated or corrupt after line {number} ({error}); the lines lost cannot be "
                "counted, so --on-error skip does not apply: fetch the file again"
            ) from error
        if on_bytes is not None:
            on_bytes(source.tell() - consumed)


def parse_text(line: bytes, key: str, first_line: bool = False) -> str:
    """The text under `key` of one JSONL line; raises RejectedLine, with a reason of REASONS, if there is none.

    `first_line` drops a UTF-8 byte order mark, which some editors put at the start of a file.
    """
    if first_line:
        line = line.removeprefix(UTF8_BOM)
    if not line.strip():
        raise RejectedLine("blank_line")
    try:
        decoded = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RejectedLine("invalid_utf8", f"byte {line[error.start]:#04x} at {error.start}") from None
    try:
        value = json.loads(decoded)
    except (ValueError, RecursionError) as error:  # ValueError: also an integer of over 4,300 digits
        raise RejectedLine("malformed_json", str(error)) from None
    if not isinstance(value, dict):
        raise RejectedLine("not_an_object", type(value).__name__)
    if key not in value:
        raise RejectedLine("missing_key", f"{key!r}; it has {', '.join(map(repr, list(value)[:8])) or 'none'}")
    text = value[key]
    if not isinstance(text, str):
        raise RejectedLine("wrong_type", f"{key!r} holds {type(text).__name__}")
    if not text:
        raise RejectedLine("empty_text")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RejectedLine("lone_surrogate", f"U+{ord(text[error.start]):04X} at {error.start}") from None
    return text
