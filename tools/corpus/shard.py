"""One work shard: its lines in, `.bin`, `.idx`, metadata and rejects out, every line accounted for."""

import base64
import json
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from megatron_hybrid.tools.atomic_file import atomic_open
from megatron_hybrid.tools.cli import ToolError
from megatron_hybrid.tools.corpus.documents import Batch, LineParser, LongDocument, Place, read_documents
from megatron_hybrid.tools.corpus.encoders import (
    MAX_WHOLE_CHARACTERS,
    PIECE_CHARACTERS,
    Encoder,
    Ids,
    Lengths,
    TextTooLong,
    cut_text,
    encode_long,
    first_difference,
    special_pattern,
)
from megatron_hybrid.tools.corpus.plan import Plan, WorkShard
from megatron_hybrid.tools.corpus.streams import InputFault, is_compressed_name, stored_size
from megatron_hybrid.tools.corpus.tokenizer_file import TokenizerFile
from megatron_hybrid.tools.indexed_dataset import IndexedDatasetWriter
from megatron_hybrid.tools.jsonl_reader import RejectedLine

POLICIES = ("fail", "skip", "quarantine")
CHECKED_DOCUMENTS = 64  # of every shard compared with the reference at least, or all it has
CHECKED_CHARACTERS = 16384  # of each of them
CHECK_EVERY_CHARACTERS = 16 << 20  # beyond the first ones, one more document per so much text
BATCH_CHARACTERS = 1 << 20  # encoded and written at a time
QUARANTINED_BYTES = 1 << 20  # of a rejected line kept at most
FEW_TOKENS = 200  # documents shorter than this on average get their end token by a mask, not by slices
METADATA_SUFFIX, REJECTS_SUFFIX = ".meta.jsonl.zst", ".rejects.jsonl"


class BackendMismatch(Exception):
    """The fast encoder made other ids than the reference."""


class RejectedUnderFail(ToolError):
    """A line that is no document, under --on-error fail."""


@dataclass
class FileTally:
    """What became of the lines of one segment: lines = documents + the sum of `rejected`."""

    file: int
    start: int
    end: int | None
    lines: int = 0
    documents: int = 0
    rejected: Counter[str] = field(default_factory=Counter)


@dataclass
class Progress:
    """Running totals of a shard, for the progress line."""

    text_bytes: int = 0
    tokens: int = 0
    documents: int = 0
    rejected: Counter[str] = field(default_factory=Counter)


def insert_eod(ids: Ids, lengths: Lengths, eod_id: int) -> tuple[Ids, Lengths]:
    """`ids` of documents end to end, with `eod_id` after each of them; the new lengths."""
    ends = np.cumsum(lengths + 1)
    result = np.full(ids.size + lengths.size, eod_id, dtype=np.int32)
    if ids.size >= FEW_TOKENS * lengths.size:
        at = 0
        for end, length in zip(ends.tolist(), lengths.tolist(), strict=True):
            result[end - length - 1 : end - 1] = ids[at : at + length]
            at += length
    else:
        keep = np.ones(result.size, dtype=bool)
        keep[ends - 1] = False
        result[keep] = ids
    return result, lengths + 1


class ShardWork:
    """Does one work shard with one encoder. Use once."""

    def __init__(
        self,
        plan: Plan,
        shard: WorkShard,
        tokenizer: TokenizerFile,
        encoder: Encoder,
        reference: Encoder,
        parser: LineParser,
        folder: Path,
        on_error: str,
        on_progress: Callable[[Progress], None],
    ) -> None:
        self.plan, self.shard, self.tokenizer = plan, shard, tokenizer
        self.encoder, self.reference, self.parser = encoder, reference, parser
        self.folder, self.on_error, self.on_progress = folder, on_error, on_progress
        self.progress = Progress()
        self.tally = FileTally(0, 0, None)
        self.tallies: list[FileTally] = []
        self.special_literals = 0
        self.checked = 0
        self._unchecked_characters = 0
        self._special_starts, self._special = special_pattern(tokenizer)
        self._pending: list[str] = []
        self._pending_places: list[Callable[[], Place]] = []
        self._pending_metadata: list[bytes] = []
        self._pending_characters = 0
        self._path = ""
        self._rejects: BinaryIO | None = None
        self._metadata: Any = None
        self._stack = ExitStack()

    # ---- the whole ----

    def run(self) -> dict[str, Any]:
        """Writes the files of the shard under their final names and returns its record for the ledger.

        Raises BackendMismatch, InputFault or RejectedUnderFail; then none of its files carries a final name.
        """
        started, cpu_started = time.perf_counter(), time.process_time()
        prefix = self.folder / stem(self.shard, self.encoder is self.reference)
        with self._stack, IndexedDatasetWriter(prefix, self.tokenizer.vocab_size) as writer:
            self._writer = writer
            if self.plan.options.metadata_keys:
                self._open_metadata(prefix)
            for segment in self.shard.segments:
                file = self.plan.files[segment.file]
                self._path = file.path
                self._check_unchanged(file.path, file.stored_bytes, file.stamp)
                self.tally = FileTally(segment.file, segment.start, segment.end)
                self.tallies.append(self.tally)
                for batch in read_documents(
                    file.path, segment, self.parser, self.plan.options, self.folder, self._reject, self._count_lines
                ):
                    if isinstance(batch, LongDocument):
                        self._flush()
                        self._add_long(batch)
                    else:
                        self._add(batch)
                self._flush()
            self._check_conservation()
            self._stack.close()  # the sidecars become final before the tokens do
            written = writer.commit()
        self.on_progress(self.progress)
        return {
            "shard": self.shard.index,
            "fingerprint": self.plan.fingerprint,
            "encoder": self.encoder.name,
            "reference": self.encoder is self.reference,
            "checked_documents": self.checked,
            "lines": sum(tally.lines for tally in self.tallies),
            "documents": written.documents,
            "rejected": dict(sorted(self.progress.rejected.items())),
            "text_bytes": self.progress.text_bytes,
            "tokens": written.tokens,
            "special_literals": self.special_literals,
            "files": [
                [tally.file, tally.start, tally.end, tally.lines, tally.documents, dict(sorted(tally.rejected.items()))]
                for tally in self.tallies
            ],
            "bin": {"bytes": written.bin_bytes, "xxh3": written.bin_xxh3},
            "idx": {"bytes": written.idx_bytes, "xxh3": written.idx_xxh3},
            "has_rejects": self._rejects is not None,
            "seconds": round(time.perf_counter() - started, 3),
            "cpu_seconds": round(time.process_time() - cpu_started, 3),
            "peak_rss_bytes": peak_rss_bytes(),
        }

    def _check_unchanged(self, path: str, stored_bytes: int, stamp: str) -> None:
        try:
            now = stored_size(path)
        except OSError as error:
            raise InputFault(f"{path}: cannot be read ({error}); restore the file and run again") from error
        if now != (stored_bytes, stamp):
            raise InputFault(
                f"{path}: changed since it was planned ({stored_bytes} bytes then, {now[0]} now); restore it, or plan "
                "again in another folder"
            )

    def _check_conservation(self) -> None:
        for tally in self.tallies:
            rejected = sum(tally.rejected.values())
            if tally.lines != tally.documents + rejected:
                raise ToolError(
                    f"{self.plan.files[tally.file].path}: {tally.lines} lines, but {tally.documents} documents and "
                    f"{rejected} rejected: a fault of this program; please report it"
                )
        documents = sum(tally.documents for tally in self.tallies)
        if documents != self._writer.documents:
            raise ToolError(
                f"{self.shard.name}: {self._writer.documents} documents written, {documents} read: a fault of this "
                "program; please report it"
            )

    # ---- lines that are no documents ----

    def _count_lines(self, lines: int) -> None:
        self.tally.lines += lines

    def _reject(self, place: Place, error: RejectedLine, raw: bytes) -> None:
        self.tally.rejected[error.reason] += 1
        self.progress.rejected[error.reason] += 1
        if error.reason == "blank_line":
            return
        if self.on_error == "fail":
            whole = self.tally.start == 0
            where = f"{self._path}:{place.line}" if whole else f"{self._path} at byte {place.offset}"
            if not whole and is_compressed_name(self._path):
                where += f" of the text that starts at stored byte {self.tally.start}"
            raise RejectedUnderFail(
                f"{where}: {error.reason}: {error}; repair the file, or pass --on-error skip to leave such lines out"
            )
        if self._rejects is None:
            path = self.folder / f"{stem(self.shard, self.encoder is self.reference)}{REJECTS_SUFFIX}"
            self._rejects = self._stack.enter_context(atomic_open(path))
        entry: dict[str, Any] = {
            "source": self.shard.source,
            "path": self._path,
            "offset": place.offset,
            "line": place.line if self.tally.start == 0 else None,
            "reason": error.reason,
            "detail": str(error),
        }
        if is_compressed_name(self._path) and self.tally.start:
            entry["stored_offset"] = self.tally.start  # the text whose bytes `offset` counts starts there
        if self.on_error == "quarantine":
            entry["base64"] = base64.b64encode(raw[:QUARANTINED_BYTES]).decode()
            entry["bytes"] = len(raw)
        self._rejects.write(json.dumps(entry).encode() + b"\n")

    # ---- documents ----

    def _add(self, batch: Batch) -> None:
        """Queues the documents of a batch; encodes them by BATCH_CHARACTERS, long ones by themselves."""
        for index, text in enumerate(batch.texts):
            if len(text) > PIECE_CHARACTERS:
                self._flush()
                metadata = batch.metadata[index : index + 1]
                self._add_pieces(text, batch.place(index), metadata)
                continue
            self._pending.append(text)
            self._pending_places.append(lambda batch=batch, index=index: batch.place(index))  # type: ignore[misc]
            if batch.metadata:
                self._pending_metadata.append(batch.metadata[index])
            self._pending_characters += len(text)
            if self._pending_characters >= BATCH_CHARACTERS:
                self._flush()

    def _flush(self) -> None:
        """Encodes and writes the queued documents."""
        texts = self._pending
        if not texts:
            return
        ids, lengths = self.encoder.encode(texts)
        self._check(texts)
        metadata = self._pending_metadata
        if not lengths.all():
            kept = lengths > 0
            for index in np.flatnonzero(~kept).tolist():
                self._reject(self._pending_places[index](), RejectedLine("no_tokens", repr(texts[index][:20])), b"")
            texts = [text for text, keep in zip(texts, kept, strict=True) if keep]
            metadata = [entry for entry, keep in zip(metadata, kept, strict=True) if keep] if metadata else []
            lengths = lengths[kept]
        if texts:
            self._count(texts)
            if self.plan.options.append_eod:
                ids, lengths = insert_eod(ids, lengths, self.tokenizer.eod_id)
            self._writer.add_documents(ids, lengths)
            self._written(len(texts), metadata)
        self._pending, self._pending_places, self._pending_metadata = [], [], []
        self._pending_characters = 0
        self.on_progress(self.progress)

    def _add_pieces(self, text: str, place: Place, metadata: list[bytes]) -> None:
        """One document longer than a batch that is in memory."""
        self._check([text])
        try:
            ids = encode_long(self.encoder, self.tokenizer, text)
        except TextTooLong as error:
            self._reject(place, RejectedLine("document_too_long", str(error)), b"")
            return
        if not ids.size:
            self._reject(place, RejectedLine("no_tokens", repr(text[:20])), b"")
            return
        self._count([text])
        lengths = np.array([ids.size], dtype=np.int64)
        if self.plan.options.append_eod:
            ids, lengths = insert_eod(ids, lengths, self.tokenizer.eod_id)
        self._writer.add_documents(ids, lengths)
        self._written(1, metadata)
        self.on_progress(self.progress)

    def _add_long(self, document: LongDocument) -> None:
        """One document that is not in memory: encoded and written piece by piece."""
        counted = self.progress.text_bytes, self.special_literals
        try:
            with self._writer.long_document() as extend:
                tokens = 0
                for text in self._long_pieces(document):
                    ids = encode_long(self.encoder, self.tokenizer, text)
                    self._check([text])
                    self._count([text])
                    tokens += ids.size
                    extend(ids)
                    self.on_progress(self.progress)
                if not tokens:
                    raise RejectedLine("no_tokens")
                if self.plan.options.append_eod:
                    extend(np.array([self.tokenizer.eod_id], dtype=np.int32))
        except (TextTooLong, RejectedLine) as error:
            self.progress.text_bytes, self.special_literals = counted
            too_long = RejectedLine("document_too_long", str(error))
            self._reject(document.place, error if isinstance(error, RejectedLine) else too_long, b"")
        else:
            self._written(1, document.metadata)

    def _long_pieces(self, document: LongDocument) -> Any:
        """The text in strings of about PIECE_CHARACTERS that may be encoded one by one."""
        rest = ""
        for piece in document.text.pieces():
            rest += piece
            if not self.tokenizer.cuttable:
                if len(rest) > MAX_WHOLE_CHARACTERS:
                    raise TextTooLong("longer than a text this tokenizer may not cut can be")
                continue
            if len(rest) > 2 * PIECE_CHARACTERS:
                *whole, rest = cut_text(rest, more_follows=True)
                yield from whole
                if len(rest) > MAX_WHOLE_CHARACTERS:
                    raise TextTooLong(f"{len(rest):,} characters without a place to cut")
        if rest:
            yield rest

    def _count(self, texts: list[str]) -> None:
        """Counts the bytes of text, and the special-token strings in it."""
        self.progress.text_bytes += sum(len(text) if text.isascii() else len(text.encode("utf-8")) for text in texts)
        if self._special is not None:
            for text in texts:
                if any(character in text and start in text for character, start in self._special_starts):
                    self.special_literals += len(self._special.findall(text))

    def _written(self, documents: int, metadata: list[bytes]) -> None:
        self.tally.documents += documents
        self.progress.documents += documents
        self.progress.tokens = self._writer.tokens
        if self._metadata is not None:
            self._metadata.write(b"".join(entry + b"\n" for entry in metadata))

    def _check(self, texts: list[str]) -> None:
        """Compares some of `texts`: the first CHECKED_DOCUMENTS of a shard, then some all along it."""
        if self.encoder is self.reference:
            return
        self._unchecked_characters += sum(map(len, texts))
        sample = texts[: max(0, CHECKED_DOCUMENTS - self.checked)]
        if not sample and self._unchecked_characters >= CHECK_EVERY_CHARACTERS:
            sample = [texts[self.progress.documents % len(texts)]]
        if not sample:
            return
        self._unchecked_characters = 0
        self.checked += len(sample)
        cut = [text[:CHECKED_CHARACTERS] for text in sample]
        difference = first_difference(self.encoder, self.reference, cut)
        if difference:
            raise BackendMismatch(difference)

    def _open_metadata(self, prefix: Path) -> None:
        import zstandard

        handle = self._stack.enter_context(atomic_open(Path(f"{prefix}{METADATA_SUFFIX}")))
        compressor = zstandard.ZstdCompressor(level=3, write_checksum=True)
        self._metadata = self._stack.enter_context(compressor.stream_writer(handle, closefd=False))


def peak_rss_bytes() -> int:
    """The largest resident size of this program; getrusage would count that of the one that started it too."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def stem(shard: WorkShard, by_reference: bool) -> str:
    """File name of a work shard without suffix; what two encoders made never shares a name."""
    return f"{shard.name}.reference" if by_reference else shard.name
