"""Reading JSONL: every line arrives, every fault has a name, a truncated file never passes for a short one."""

import gzip
import json
import struct
from pathlib import Path

import pytest
import zstandard

from megatron_hybrid.tools.cli import ToolError
from megatron_hybrid.tools.jsonl_reader import REASONS, RejectedLine, parse_text, read_lines

LINES = [json.dumps({"text": f"document {number} " + "word " * (number % 50)}).encode() for number in range(2000)]
CONTENT = b"".join(line + b"\n" for line in LINES)
SKIPPABLE_FRAME = struct.pack("<II", 0x184D2A50, 4) + b"note"


def compress(kind: str, content: bytes = CONTENT) -> bytes:
    """`content` as the bytes of one kind of file."""
    zstd = zstandard.ZstdCompressor(level=1, write_checksum=True)  # as the zstd program does
    half = len(content) // 2
    return {
        "plain": content,
        "gzip": gzip.compress(content),
        "gzip-two-members": gzip.compress(content[:half]) + gzip.compress(content[half:]),
        "zstd": zstd.compress(content),
        "zstd-two-frames": zstd.compress(content[:half]) + zstd.compress(content[half:]),
        "zstd-skippable-frames": SKIPPABLE_FRAME + zstd.compress(content) + SKIPPABLE_FRAME,
    }[kind]


KINDS = ["plain", "gzip", "gzip-two-members", "zstd", "zstd-two-frames", "zstd-skippable-frames"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_line_arrives_with_its_number(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_bytes(compress(kind))
    assert list(read_lines(path)) == list(enumerate(LINES, 1))


@pytest.mark.parametrize("kind", KINDS)
def test_progress_adds_up_to_the_stored_size(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_bytes(compress(kind))
    steps: list[int] = []
    list(read_lines(path, steps.append))
    assert sum(steps) == path.stat().st_size


def test_last_line_without_newline_arrives(tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": "b"}')
    assert [line for _, line in read_lines(path)] == [b'{"text": "a"}', b'{"text": "b"}']


def test_only_newline_ends_a_line(tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    line = '{"text": "a\u2028b\x0bc\x85d"}'.encode() + b"\r"
    path.write_bytes(line + b"\n" + line)
    assert [content for _, content in read_lines(path)] == [line, line]


@pytest.mark.parametrize("kind", KINDS[1:5])
@pytest.mark.parametrize("lost_bytes", [1, 5, 300])
def test_truncated_stream_is_an_error_that_names_the_file(tmp_path: Path, kind: str, lost_bytes: int) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_bytes(compress(kind)[:-lost_bytes])
    with pytest.raises(ToolError, match=r"corpus\.jsonl: truncated or corrupt after line \d+"):
        list(read_lines(path))


@pytest.mark.parametrize("kind", ["gzip", "zstd"])
def test_corrupt_stream_is_an_error(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "corpus.jsonl"
    content = bytearray(compress(kind))
    for position in range(len(content) // 2, len(content) // 2 + 64):
        content[position] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(ToolError, match=r"corpus\.jsonl: truncated or corrupt"):
        list(read_lines(path))


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize(("content", "message"), [(b"", "is empty"), (CONTENT, "starts with")], ids=["empty", "plain"])
def test_content_that_belies_the_suffix_is_an_error(tmp_path: Path, suffix: str, content: bytes, message: str) -> None:
    path = tmp_path / f"corpus.jsonl{suffix}"
    path.write_bytes(content)
    with pytest.raises(ToolError, match=rf"corpus\.jsonl{suffix}: named {suffix}, but the file {message}"):
        list(read_lines(path))


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        pytest.param(b"", "blank_line", id="blank"),
        pytest.param(b" \t\r", "blank_line", id="white-space"),
        pytest.param(b'{"text": "a', "malformed_json", id="cut-json"),
        pytest.param(b'{"text": "a"} {"text": "b"}', "malformed_json", id="two-objects-on-a-line"),
        pytest.param(b"[" * 200_000, "malformed_json", id="nesting-too-deep"),
        pytest.param(b'{"text": "a", "n": ' + b"9" * 5000 + b"}", "malformed_json", id="integer-too-long"),
        pytest.param(b'["text"]', "not_an_object", id="array"),
        pytest.param(b"null", "not_an_object", id="null"),
        pytest.param(b'{"content": "a"}', "missing_key", id="missing-key"),
        pytest.param(b'{"text": null}', "wrong_type", id="null-text"),
        pytest.param(b'{"text": 5}', "wrong_type", id="number-text"),
        pytest.param(b'{"text": ["a"]}', "wrong_type", id="list-text"),
        pytest.param(b'{"text": "\xff"}', "invalid_utf8", id="invalid-utf8"),
        pytest.param(b'{"text": "\xed\xa0\x80"}', "invalid_utf8", id="surrogate-as-utf8-bytes"),
        pytest.param('{"text": "a"}'.encode("utf-16"), "invalid_utf8", id="utf16"),
        pytest.param(b'{"text": "a\\ud800b"}', "lone_surrogate", id="lone-surrogate-escape"),
        pytest.param(b'{"text": ""}', "empty_text", id="empty-text"),
    ],
)
def test_line_without_a_document_is_rejected_with_its_reason(line: bytes, reason: str) -> None:
    with pytest.raises(RejectedLine) as rejected:
        parse_text(line, "text")
    assert rejected.value.reason == reason
    assert str(rejected.value).startswith(REASONS[reason])
    assert "\n" not in str(rejected.value)


@pytest.mark.parametrize(
    ("line", "text"),
    [
        pytest.param(b'{"text": "a"}\r', "a", id="carriage-return"),
        pytest.param(b'{"text": "\\ud83c\\udf89"}', "🎉", id="surrogate-pair"),
        pytest.param('{"text": "漢字"}'.encode(), "漢字", id="utf8"),
        pytest.param(b'{"text": "a\\u0000b"}', "a\0b", id="nul"),
        pytest.param(b'{"text": " "}', " ", id="one-space"),
        pytest.param(b'{"id": {"text": 1}, "text": "a"}', "a", id="other-keys"),
    ],
)
def test_line_with_a_document_gives_its_text(line: bytes, text: str) -> None:
    assert parse_text(line, "text") == text


def test_byte_order_mark_is_dropped_from_the_first_line_only() -> None:
    line = b'\xef\xbb\xbf{"text": "a"}'
    assert parse_text(line, "text", first_line=True) == "a"
    with pytest.raises(RejectedLine, match="BOM"):
        parse_text(line, "text")
