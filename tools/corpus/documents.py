"""Batches of documents out of one segment of a file, and everything that is no document, with its place."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from megatron_hybrid.tools.corpus.lines import LineBlock, LineCutter, LongLine
from megatron_hybrid.tools.corpus.long_lines import LongText, read_long_line
from megatron_hybrid.tools.corpus.parquet import read_rows
from megatron_hybrid.tools.corpus.plan import Options, Segment
from megatron_hybrid.tools.corpus.streams import (
    damaged,
    decompression_errors,
    is_compressed_name,
    open_input,
    read_chunks,
)
from megatron_hybrid.tools.jsonl_reader import RejectedLine, parse_text

UNPARSED = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)


@dataclass(frozen=True)
class Place:
    """Where a line or row is: `line` counts from 1 in the segment, `offset` is in decompressed bytes of the
    file (Parquet: in rows, and `line` too)."""

    line: int
    offset: int


@dataclass
class Batch:
    """Documents in order. `metadata` has one JSON object per document, or none at all."""

    texts: list[str]
    place: Callable[[int], Place]
    metadata: list[bytes]


@dataclass
class LongDocument:
    """One document too long for a batch; `text` yields its pieces and must be consumed at once."""

    text: LongText
    place: Place
    metadata: list[bytes]


# Called for every line that is no document: its place, why, and the line itself where it is known.
OnReject = Callable[[Place, RejectedLine, bytes], None]


class LineParser:
    """Parses lines of JSON: the fast decoder first, `parse_text` as the judge of what it refuses."""

    def __init__(self, options: Options) -> None:
        self.key = options.text_key
        self.metadata_keys = options.metadata_keys
        names = [f"m{index}" for index in range(len(self.metadata_keys))]
        record = msgspec.defstruct(
            "Record",
            [("text", str), *((name, msgspec.Raw, msgspec.Raw(b"null")) for name in names)],
            rename=dict(zip(["text", *names], [self.key, *self.metadata_keys], strict=True)),
        )
        self._decode: Callable[[bytes], Any] = msgspec.json.Decoder(record).decode
        self._prefixes = [json.dumps(key).encode() + b":" for key in self.metadata_keys]
        self._names = names

    def block(self, block: LineBlock, on_reject: OnReject) -> Batch:
        """The documents of a block; every other line goes to `on_reject`."""
        try:
            records = list(map(self._decode, block.lines))
            texts = [record.text for record in records]
            if all(texts):
                metadata = [self._metadata(record) for record in records] if self._names else []
                return Batch(texts, lambda index: _place(block, index), metadata)
        except UNPARSED:
            pass
        return self._line_by_line(block, on_reject)

    def _line_by_line(self, block: LineBlock, on_reject: OnReject) -> Batch:
        texts: list[str] = []
        kept: list[int] = []
        metadata: list[bytes] = []
        for index, line in enumerate(block.lines):
            try:
                text, extra = self.line(line, first_line=block.offset == 0 and index == 0)
            except RejectedLine as rejected:
                on_reject(_place(block, index), rejected, line)
                continue
            texts.append(text)
            kept.append(index)
            if self._names:
                metadata.append(extra)
        return Batch(texts, lambda index: _place(block, kept[index]), metadata)

    def line(self, line: bytes, first_line: bool) -> tuple[str, bytes]:
        """(text, metadata object) of one line; raises RejectedLine if it is no document."""
        try:
            record = self._decode(line)
            extra = self._metadata(record) if self._names else b""
            text: str = record.text
        except UNPARSED:
            text = parse_text(line, self.key, first_line)
            extra = self._slow_metadata(line.removeprefix(b"\xef\xbb\xbf")) if self._names else b""
        if not text:
            raise RejectedLine("empty_text")
        return text, extra

    def _metadata(self, record: Any) -> bytes:
        values = [bytes(getattr(record, name)) for name in self._names]
        b"".join(values).decode("utf-8")  # raises UnicodeDecodeError: the sidecar must stay JSON
        return b"{" + b",".join(map(bytes.__add__, self._prefixes, values)) + b"}"

    def _slow_metadata(self, line: bytes) -> bytes:
        data = json.loads(line)
        return json.dumps({key: data.get(key) for key in self.metadata_keys}, separators=(",", ":")).encode()

    def row(self, text: Any, values: list[Any]) -> tuple[str, bytes]:
        """(text, metadata object) of one Parquet row; raises RejectedLine if it is no document."""
        if isinstance(text, bytes):
            raise RejectedLine("invalid_utf8", f"{text[:20]!r}")
        if not isinstance(text, str):
            raise RejectedLine("wrong_type", f"{self.key!r} holds {type(text).__name__}")
        if not text:
            raise RejectedLine("empty_text")
        if not values:
            return text, b""
        return text, json.dumps(dict(zip(self.metadata_keys, values, strict=True)), default=str).encode()


def _place(block: LineBlock, index: int) -> Place:
    *_, offset = accumulate((len(line) + 1 for line in block.lines[:index]), initial=block.offset)
    return Place(block.first_line + index, offset)


def read_documents(
    path: str,
    segment: Segment,
    parser: LineParser,
    options: Options,
    scratch: Path,
    on_reject: OnReject,
    on_line_count: Callable[[int], None],
) -> Iterator[Batch | LongDocument]:
    """Yields the documents of a segment; rejects go to `on_reject`, numbers of lines to `on_line_count`.

    `scratch` is a folder for the one line that may be longer than fits in memory. Raises InputFault
    for a file that cannot be read to its end, unless `options.salvage_truncated`: then what is lost
    counts as one rejected line.
    """
    if path.endswith(".parquet"):
        yield from _parquet_batches(path, segment, parser, options, on_reject, on_line_count)
        return
    cutter: LineCutter | None = None
    with open_input(path) as source:
        try:
            cutter = _cutter(path, source, segment)
            for block in cutter:
                if isinstance(block, LongLine):
                    on_line_count(1)
                    yield from _long_document(block, parser, scratch, on_reject)
                else:
                    on_line_count(len(block.lines))
                    yield parser.block(block, on_reject)
        except decompression_errors() as error:
            lines = cutter.lines if cutter else 0
            from_byte = f" of the text from stored byte {segment.start} on" if segment.start else ""
            fault = damaged(path, f"line {lines}{from_byte}", error)
            if not options.salvage_truncated:
                raise fault from error
            on_line_count(1)
            on_reject(
                Place(lines + 1, cutter.offset if cutter else 0), RejectedLine("truncated_stream", str(error)), b""
            )


def _cutter(path: str, source: BinaryIO, segment: Segment) -> LineCutter:
    """The lines of one segment; those of a compressed file are counted from where the segment starts.

    Of a compressed file a segment owns the lines that start after its first byte and up to the first one of
    the next segment, for what stands before its first byte is not known without decompressing that too.
    """
    if not is_compressed_name(path):
        return LineCutter(read_chunks(path, source, max(segment.start - 1, 0)), segment.start, segment.end)

    def cut_reached(decoded: int) -> None:
        cutter.end = decoded + 1

    chunks = read_chunks(path, source, segment.start, cut=segment.end, on_cut=cut_reached)
    cutter = LineCutter(chunks, min(segment.start, 1))
    return cutter


def _long_document(line: LongLine, parser: LineParser, scratch: Path, on_reject: OnReject) -> Iterator[LongDocument]:
    place = Place(line.first_line, line.offset)
    try:
        with read_long_line(line.pieces, parser, scratch, first_line=line.offset == 0) as (text, metadata):
            yield LongDocument(text, place, [metadata] if parser.metadata_keys else [])
    except RejectedLine as rejected:
        on_reject(place, rejected, b"")


def _parquet_batches(
    path: str,
    segment: Segment,
    parser: LineParser,
    options: Options,
    on_reject: OnReject,
    on_line_count: Callable[[int], None],
) -> Iterator[Batch]:
    columns = [options.text_key, *options.metadata_keys]
    for first, (column, *extras) in read_rows(path, segment.start, segment.end, columns):
        on_line_count(len(column))
        texts: list[str] = []
        kept: list[int] = []
        metadata: list[bytes] = []
        for index, value in enumerate(column):
            try:
                text, extra = parser.row(value, [values[index] for values in extras])
            except RejectedLine as rejected:
                raw = value if isinstance(value, bytes) else b""
                on_reject(Place(first + index + 1, first + index), rejected, raw)
                continue
            texts.append(text)
            kept.append(index)
            if extras:
                metadata.append(extra)

        def place(index: int, first: int = first, kept: list[int] = kept) -> Place:
            return Place(first + kept[index] + 1, first + kept[index])

        yield Batch(texts, place, metadata)
