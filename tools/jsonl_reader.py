"""Reads text documents from JSONL files: plain, gzip or zstd, told apart by their first bytes.

Two questions, kept apart: `read_lines` yields every line of a file or fails (a compressed file that
ends early never passes for a short one); `parse_text` says what one line holds, or why it is no document.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

from megatron_hybrid.tools.corpus.streams import damaged, decompression_errors, open_input, read_chunks

UTF8_BOM = b"\xef\xbb\xbf"

# Why a line (or row) is no document. `blank_line` holds nothing, so it is counted but never an error.
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
    "document_too_long": "the document is longer than can be encoded in bounded memory",
    "truncated_stream": "the file breaks off here, and what follows is lost",
}


class RejectedLine(Exception):
    """One line that is no document: `reason` is a key of REASONS, `detail` the particulars."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{REASONS[reason]}{': ' if detail else ''}{detail}")
        self.reason = reason


def read_lines(path: Path, on_bytes: Callable[[int], object] = lambda count: None) -> Iterator[tuple[int, bytes]]:
    """Yields (line number from 1, line without its newline) for every line of a JSONL file.

    `on_bytes` is called with the number of stored (compressed) bytes consumed since its last call.
    Raises InputFault, naming the file and the last whole line, where a compressed stream is truncated
    or corrupt: how many lines are lost there is unknown, so this can be an error only.
    """
    number = 0
    rest: list[bytes] = []
    with open_input(str(path)) as source:
        try:
            for chunk in read_chunks(str(path), source, on_bytes=on_bytes):
                first, *others = chunk.split(b"\n")
                rest.append(first)
                for following in others:
                    number += 1
                    yield number, b"".join(rest)
                    rest = [following]
        except decompression_errors() as error:
            raise damaged(str(path), f"line {number}", error) from error
    if last := b"".join(rest):
        yield number + 1, last


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
