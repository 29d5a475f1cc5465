"""Steps beside datatrove's own in its pipelines: our reader, which loses no line, and a writer that counts.

Needs the extra `clean`. Every step before the last may run more than once, so the last pass alone records.
"""

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import zstandard
from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep

from megatron_hybrid.tools.atomic_file import atomic_open
from megatron_hybrid.tools.cli import ToolError
from megatron_hybrid.tools.corpus.documents import LineParser, LongDocument, Place, read_documents
from megatron_hybrid.tools.corpus.plan import Options, Segment
from megatron_hybrid.tools.jsonl_reader import RejectedLine

KEPT = "kept"


@dataclass(frozen=True)
class Group:
    """The files one task reads, all of one source, in order."""

    source: str
    paths: tuple[str, ...]


class Tally:
    """What one task did with its lines: lines = documents + rejected; documents fall from step to step."""

    def __init__(self) -> None:
        self.lines = 0
        self.rejected: Counter[str] = Counter()
        self.passed: Counter[str] = Counter()  # documents that came out of a step

    def as_dict(self) -> dict[str, Any]:
        """For the record of the task."""
        return {"lines": self.lines, "rejected": dict(sorted(self.rejected.items())), "passed": dict(self.passed)}


class Read(PipelineStep):
    """Yields the documents of the group of a task, in an order that never changes."""

    type, name = "READER", "megatron_hybrid"

    def __init__(self, groups: list[Group], options: Options, on_error: str, scratch: Path, tally: Tally) -> None:
        super().__init__()
        self.groups, self.options, self.on_error, self.scratch, self.tally = groups, options, on_error, scratch, tally

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """Raises ToolError for a file that is damaged, and for a line that is no document unless those are skipped."""
        parser = LineParser(self.options)
        tally = self.tally
        tally.__init__()  # type: ignore[misc]  # one process runs many tasks
        for path in self.groups[rank].paths:

            def reject(place: Place, error: RejectedLine, raw: bytes, path: str = path) -> None:
                tally.rejected[error.reason] += 1
                if self.on_error == "fail" and error.reason != "blank_line":
                    raise ToolError(f"{path}:{place.line}: {error.reason}: {error}; repair it, or pass --on-error skip")

            def count(lines: int) -> None:
                tally.lines += lines

            for batch in read_documents(path, Segment(0), parser, self.options, self.scratch, reject, count):
                if isinstance(batch, LongDocument):
                    texts, places, metadata = ["".join(batch.text.pieces())], [batch.place], batch.metadata
                else:
                    texts, metadata = batch.texts, batch.metadata
                    places = [batch.place(index) for index in range(len(texts))]
                for index, text in enumerate(texts):
                    raw = metadata[index] if metadata else b""
                    where = {"path": path, "offset": places[index].offset, "raw": raw}
                    tally.passed["read"] += 1
                    yield Document(text, f"{path}:{places[index].offset}", metadata=where)


class Passed(PipelineStep):
    """Counts the documents that came through the step before."""

    type, name = "COUNT", "megatron_hybrid"

    def __init__(self, step: str, tally: Tally) -> None:
        super().__init__()
        self.step, self.tally = step, tally

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """Yields what it gets."""
        for document in data:
            self.tally.passed[self.step] += 1
            yield document


class Removed:
    """Lists the documents a filter of datatrove takes out; given to it as its exclusion writer."""

    def __init__(self, folder: Path, step: str, groups: list[Group]) -> None:
        self.folder, self.step, self.groups = folder, step, groups
        self._entries: list[bytes] = []

    def __enter__(self) -> "Removed":
        self._entries = []
        return self

    def __exit__(self, failed: type | None, *ignored: object) -> None:
        if failed is None and self._entries:
            with atomic_open(self._path) as handle:
                handle.write(b"".join(self._entries))

    def write(self, document: Document, rank: int = 0) -> None:
        """Adds one document; of its text only what is said to be contaminated."""
        self._path = self.folder / f"{self.step}-{rank:05d}.jsonl"
        entry = {"source": self.groups[rank].source, "step": self.step}
        entry |= {key: document.metadata[key] for key in ("path", "offset")}
        keys = ("contaminated_task", "contaminated_ngram")
        entry |= {key: document.metadata[key] for key in keys if key in document.metadata}
        self._entries.append(json.dumps(entry).encode() + b"\n")


class Write(PipelineStep):
    """Writes what is left of a task as SOURCE/RANK.jsonl.zst, then the task's tally; both appear whole."""

    type, name = "WRITER", "megatron_hybrid"

    def __init__(self, output: Path | None, records: Path, groups: list[Group], text_key: str, tally: Tally) -> None:
        super().__init__()
        self.output, self.records, self.groups, self.tally = output, records, groups, tally
        self._start = b"{" + json.dumps(text_key).encode() + b":"

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> None:
        """With no `output`, only counts."""
        with ExitStack() as stack:
            stream: Any = None
            if self.output is not None:
                path = self.output / self.groups[rank].source / f"{rank:05d}.jsonl.zst"
                handle = stack.enter_context(atomic_open(path))
                compressor = zstandard.ZstdCompressor(level=3, write_checksum=True)
                stream = stack.enter_context(compressor.stream_writer(handle, closefd=False))
            for document in data:
                self.tally.passed[KEPT] += 1
                if stream is not None:
                    raw: bytes = document.metadata["raw"]
                    end = b"," + raw[1:] if len(raw) > 2 else b"}"
                    stream.write(self._start + msgspec.json.encode(document.text) + end + b"\n")
        with atomic_open(self.records / f"{rank:05d}.json") as handle:
            handle.write(json.dumps(self.tally.as_dict()).encode())
