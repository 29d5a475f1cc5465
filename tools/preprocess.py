"""Turns JSONL text into a Megatron dataset: FILE... -> PREFIX.bin, PREFIX.idx and the manifest PREFIX.json.

    python -m megatron_hybrid.tools.preprocess --input corpus.jsonl.zst --output-prefix data/corpus \\
        --tokenizer-model tokenizer.model --append-eod

Every line read is accounted for: lines = documents + rejected lines, by reason. The manifest is written
last, so a prefix with a manifest is a finished one; nothing half-written carries a final name.
"""

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron_hybrid.tools.atomic_file import atomic_open
from megatron_hybrid.tools.cli import ToolError, byte_progress_bar, run_cli
from megatron_hybrid.tools.indexed_dataset import (
    IndexedDatasetWriter,
    WrittenDataset,
    bin_path,
    idx_path,
)
from megatron_hybrid.tools.jsonl_reader import RejectedLine, parse_text, read_lines
from megatron_hybrid.tools.text_encoder import SentencePieceEncoder

MANIFEST_VERSION = 1
BATCH_CHARACTERS = 1 << 20  # documents are encoded and written in batches of about this much text
SHOWN_REJECTS = 10  # rejected lines reported one by one under --on-error skip; all are counted


@dataclass
class Source:
    """What became of the lines of one input file: lines = documents + the sum of `rejected`."""

    path: str
    stored_bytes: int
    lines: int = 0
    documents: int = 0
    text_bytes: int = 0
    rejected: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Document:
    """A text and where it came from."""

    source: Source
    line: int
    text: str


class Rejections:
    """Decides what a rejected line does: count it, and stop the run unless it may be skipped."""

    def __init__(self, on_error: str) -> None:
        self._on_error = on_error
        self._shown = 0

    def add(self, source: Source, line: int, error: RejectedLine) -> None:
        """Counts one rejected line; raises ToolError for it under --on-error fail (a blank line: never)."""
        source.rejected[error.reason] += 1
        if error.reason == "blank_line":
            return
        where = f"{source.path}:{line}: {error.reason}: {error}"
        if self._on_error == "fail":
            raise ToolError(f"{where}; repair the file, or pass --on-error skip to leave such lines out")
        self._shown += 1
        if self._shown <= SHOWN_REJECTS:
            print(f"skipped {where}", file=sys.stderr)
        elif self._shown == SHOWN_REJECTS + 1:
            print("skipped more lines; they are counted in the manifest", file=sys.stderr)


def read_documents(
    source: Source, key: str, rejections: Rejections, on_bytes: Callable[[int], object]
) -> Iterator[Document]:
    """Yields the documents of one file, counting its lines and handing those without one to `rejections`."""
    for number, line in read_lines(Path(source.path), on_bytes):
        source.lines += 1
        try:
            text = parse_text(line, key, first_line=number == 1)
        except RejectedLine as error:
            rejections.add(source, number, error)
        else:
            yield Document(source, number, text)


def batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    """Groups documents, in order, into lists of about BATCH_CHARACTERS characters."""
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def write_batch(
    batch: list[Document],
    encoder: SentencePieceEncoder,
    writer: IndexedDatasetWriter,
    rejections: Rejections,
    append_eod: bool,
) -> None:
    """Encodes a batch and appends it to the dataset; a text that makes no token is a rejected line."""
    eod = np.array([encoder.eod_id] if append_eod else [], dtype=np.int32)
    parts, lengths = [], []
    for document, ids in zip(batch, encoder.encode([document.text for document in batch]), strict=True):
        if not ids.size:
            rejections.add(document.source, document.line, RejectedLine("no_tokens", repr(document.text[:20])))
            continue
        parts += [ids, eod]
        lengths.append(ids.size + eod.size)
        document.source.documents += 1
        document.source.text_bytes += len(document.text.encode("utf-8"))
    if parts:
        writer.add_documents(np.concatenate(parts), np.array(lengths, dtype=np.int64))


def check_conservation(sources: list[Source], documents: int) -> None:
    """Raises ToolError unless lines = documents + rejected, in each source and against the dataset."""
    for source in sources:
        rejected = sum(source.rejected.values())
        if source.lines != source.documents + rejected:
            raise ToolError(
                f"{source.path}: {source.lines} lines, but {source.documents} documents and {rejected} "
                "rejected: a fault of this program; please report it"
            )
    if documents != sum(source.documents for source in sources):
        raise ToolError(
            f"{documents} documents written, {sum(source.documents for source in sources)} read: a fault "
            "of this program; please report it"
        )


def manifest(
    args: argparse.Namespace, encoder: SentencePieceEncoder, sources: list[Source], written: WrittenDataset
) -> dict[str, Any]:
    """What PREFIX.json says: where the tokens came from, how many, and the hashes to check them by."""
    rejected = sum((source.rejected for source in sources), Counter[str]())
    return {
        "manifest_version": MANIFEST_VERSION,
        "lines": sum(source.lines for source in sources),
        "documents": written.documents,
        "tokens": written.tokens,
        "rejected": dict(sorted(rejected.items())),
        "dtype": written.dtype,
        "bin": {"bytes": written.bin_bytes, "sha256": written.bin_sha256},
        "idx": {"bytes": written.idx_bytes, "sha256": written.idx_sha256},
        "tokenizer": {
            "path": str(args.tokenizer_model),
            "sha256": encoder.sha256,
            "vocab_size": encoder.vocab_size,
            "eod_id": encoder.eod_id,
        },
        "options": {"text_key": args.text_key, "append_eod": args.append_eod, "on_error": args.on_error},
        "sources": [asdict(source) | {"rejected": dict(sorted(source.rejected.items()))} for source in sources],
    }


def manifest_path(prefix: str | Path) -> Path:
    """Path of the manifest of the dataset `prefix`."""
    return Path(f"{prefix}.json")


def check_output_prefix(prefix: str, overwrite: bool) -> None:
    """Raises ToolError if `prefix` is a folder, or taken by another dataset or by the index of one."""
    index_cache = Path(prefix, "cache")  # where Megatron keeps it, unless told --data-cache-path
    if index_cache.is_dir():
        raise ToolError(
            f"--output-prefix {prefix}: {index_cache} is Megatron's index of earlier data of this name, which it "
            "would use for the new data too; remove that folder or choose another prefix"
        )
    if Path(prefix).is_dir() or prefix.endswith("/"):
        raise ToolError(f"--output-prefix {prefix}: a folder; add a name, such as {prefix.rstrip('/')}/corpus")
    existing = [path for path in (bin_path(prefix), idx_path(prefix), manifest_path(prefix)) if path.exists()]
    if existing and not overwrite:
        raise ToolError(f"--output-prefix {prefix}: {existing[0]} exists; choose another prefix or pass --overwrite")


def check_arguments(args: argparse.Namespace, encoder: SentencePieceEncoder) -> list[Source]:
    """The input files, after checking every flag against the disk; raises ToolError that names the flag."""
    check_output_prefix(args.output_prefix, args.overwrite)
    if args.append_eod and encoder.eod_id < 0:
        raise ToolError(
            f"--append-eod: {args.tokenizer_model} has no eos piece to use as the end-of-document token; "
            "drop --append-eod or train the tokenizer with one"
        )
    sources = []
    seen: set[Path] = set()
    for path in args.input:
        if not path.is_file():
            raise ToolError(f"--input {path}: {'not a file' if path.exists() else 'no such file'}")
        if path.resolve() in seen:
            raise ToolError(f"--input {path}: given twice; repeat data by its weight at training time instead")
        seen.add(path.resolve())
        sources.append(Source(str(path), path.stat().st_size))
    return sources


def preprocess(args: argparse.Namespace) -> dict[str, Any]:
    """Runs the whole tool and returns the manifest it wrote; raises ToolError for any fault."""
    encoder = SentencePieceEncoder(args.tokenizer_model)
    sources = check_arguments(args, encoder)
    rejections = Rejections(args.on_error)
    started = time.perf_counter()
    with (
        byte_progress_bar("tokenizing", sum(source.stored_bytes for source in sources), show_rate=False) as bar,
        IndexedDatasetWriter(args.output_prefix, encoder.vocab_size) as writer,
    ):
        for source in sources:
            for batch in batches(read_documents(source, args.text_key, rejections, bar.update)):
                write_batch(batch, encoder, writer, rejections, args.append_eod)
                rate = sum(source.text_bytes for source in sources) / 1e6 / (time.perf_counter() - started)
                bar.set_postfix_str(f"{writer.tokens / 1e6:,.1f}M tokens, {rate:,.1f} MB/s of text", refresh=False)
        check_conservation(sources, writer.documents)
        if not writer.documents:
            raise ToolError(
                f"--input: no documents in {', '.join(source.path for source in sources)} (rejected: "
                f"{dict(sum((source.rejected for source in sources), Counter[str]())) or 'none'}); "
                "Megatron cannot read an empty dataset"
            )
        manifest_path(args.output_prefix).unlink(missing_ok=True)
        content = manifest(args, encoder, sources, writer.commit())
    with atomic_open(manifest_path(args.output_prefix)) as handle:
        handle.write(json.dumps(content, indent=2).encode() + b"\n")
    return content


def parser() -> argparse.ArgumentParser:
    """The command line of this tool."""
    result = argparse.ArgumentParser(
        prog="python -m megatron_hybrid.tools.preprocess",
        description="Turns JSONL text into a Megatron dataset: PREFIX.bin, PREFIX.idx, manifest PREFIX.json.",
    )
    result.add_argument(
        "--input", type=Path, nargs="+", required=True, metavar="FILE", help="JSONL files: plain, .gz or .zst"
    )
    result.add_argument(
        "--output-prefix", required=True, metavar="P", help="output path without suffix, as in --data-path"
    )
    result.add_argument(
        "--tokenizer-model", type=Path, required=True, metavar="FILE", help="SentencePiece tokenizer.model"
    )
    result.add_argument("--text-key", default="text", metavar="KEY", help="key that holds the text (default: text)")
    result.add_argument("--append-eod", action="store_true", help="end each document with the tokenizer's eos piece")
    result.add_argument(
        "--on-error",
        choices=("fail", "skip"),
        default="fail",
        help="a line that is no document ends the run, or is left out and counted (default: fail); "
        "a truncated or corrupt compressed file always ends it",
    )
    result.add_argument(
        "--overwrite", action="store_true", help="replace a dataset of the same prefix (default: refuse)"
    )
    return result


def main() -> None:
    """Command-line entry point."""
    args = parser().parse_args()
    started = time.perf_counter()
    content = preprocess(args)
    seconds = time.perf_counter() - started
    text_bytes = sum(source["text_bytes"] for source in content["sources"])
    rejected = ", ".join(f"{reason} {count:,}" for reason, count in content["rejected"].items())
    print(
        f"{args.output_prefix}: {content['lines']:,} lines = {content['documents']:,} documents + "
        f"{sum(content['rejected'].values()):,} rejected{f' ({rejected})' if rejected else ''}; "
        f"{content['tokens']:,} tokens ({content['dtype']}), {text_bytes / 1e6:,.1f} MB of text, "
        f"{text_bytes / content['tokens']:.2f} bytes/token, {text_bytes / 1e6 / seconds:,.1f} MB/s"
    )


if __name__ == "__main__":
    run_cli(main)
