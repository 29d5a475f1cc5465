"""Gathers a corpus that every machine already has: the sources and documentation of its own Python.

    python -m megatron_hybrid.tools.gather_corpus --output corpus.jsonl.zst --max-mb 16

One JSON object per document, {"text": ..., "source": ...}: the standard library's .py files with their
docstrings (its test suite too, where installed), its .rst, .txt and .md files, and the topics of Python's
help(). A small standard library (a container image without tests) is topped up from site-packages.
The same Python and flags give the same bytes. It serves to see a model learn, not to make a good one.
"""

import argparse
import hashlib
import json
import os
import random
import sysconfig
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from megatron_hybrid.tools.atomic_file import atomic_open
from megatron_hybrid.tools.cli import Parser, ToolError, byte_progress_bar, run_cli

SUFFIXES = frozenset({".py", ".rst", ".txt", ".md"})
SKIPPED_FOLDERS = frozenset({"__pycache__", "site-packages", "dist-packages", "_bundled"})
PYDOC_TOPICS = "pydoc_data/topics.py"  # gathered topic by topic, as text
ENOUGH_BYTES = 10_000_000  # a standard library smaller than this is topped up from site-packages
COMPRESSION_LEVEL = 6


@dataclass(frozen=True)
class Candidate:
    """A document that may be gathered: its name in the corpus and where its bytes are."""

    name: str
    size_bytes: int
    path: Path | None = None
    content: bytes = b""

    def read(self) -> bytes:
        """The bytes of the document; raises OSError if its file cannot be read."""
        return self.content if self.path is None else self.path.read_bytes()


@dataclass
class Tally:
    """What became of the candidates."""

    documents: int = 0
    text_bytes: int = 0
    skipped: Counter[str] = field(default_factory=Counter)


def files_under(root: Path, label: str) -> list[Candidate]:
    """Text files below `root`, named `label`/relative/path, leaving out links and SKIPPED_FOLDERS."""
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in SKIPPED_FOLDERS]
        for name in names:
            path = Path(folder, name)
            if path.suffix in SUFFIXES and path.is_file() and not path.is_symlink():
                relative = path.relative_to(root).as_posix()
                found.append(Candidate(f"{label}/{relative}", path.stat().st_size, path))
    return found


def pydoc_topics() -> list[Candidate]:
    """The topics of Python's help(), such as `help('assert')`; none where Python lacks them."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return []
    contents = {name: text.encode("utf-8") for name, text in topics.items()}
    return [Candidate(f"pydoc/{name}", len(content), None, content) for name, content in contents.items()]


def find_candidates(stdlib: Path, site_packages: Path, seed: int) -> list[Candidate]:
    """Everything to gather, sorted by name and then shuffled with `seed`."""
    files = [file for file in files_under(stdlib, "stdlib") if not file.name.endswith(PYDOC_TOPICS)]
    candidates = files + pydoc_topics()
    if sum(candidate.size_bytes for candidate in candidates) < ENOUGH_BYTES and site_packages.is_dir():
        candidates += files_under(site_packages, "site-packages")
    candidates.sort(key=lambda candidate: candidate.name)
    random.Random(seed).shuffle(candidates)
    return candidates


def decode(candidate: Candidate, seen: set[bytes]) -> tuple[str, str]:
    """(text, "") of a document to keep, or ("", why not); adds its hash to `seen`."""
    try:
        content = candidate.read()
        text = content.decode("utf-8")
    except OSError:
        return "", "unreadable"
    except UnicodeDecodeError:
        return "", "not UTF-8"
    if not text.strip():
        return "", "empty"
    digest = hashlib.sha256(content).digest()
    if digest in seen:
        return "", "duplicate"
    seen.add(digest)
    return text, ""


def write_corpus(candidates: list[Candidate], output: BinaryIO, max_bytes: float) -> Tally:
    """Writes zstd-compressed JSONL until `max_bytes` of text; a document that would pass it is left out."""
    import zstandard

    tally, seen = Tally(), set[bytes]()
    total = sum(candidate.size_bytes for candidate in candidates)
    compressor = zstandard.ZstdCompressor(level=COMPRESSION_LEVEL, write_checksum=True)
    with (
        byte_progress_bar("gathering", int(min(total, max_bytes))) as bar,
        compressor.stream_writer(output, closefd=False) as stream,
    ):
        for candidate in candidates:
            text, reason = decode(candidate, seen)
            size = len(text.encode("utf-8"))
            if not reason and tally.text_bytes + size > max_bytes:
                reason = "over --max-mb"
            if reason:
                tally.skipped[reason] += 1
                continue
            line = json.dumps({"text": text, "source": candidate.name}, ensure_ascii=False)
            stream.write(line.encode("utf-8") + b"\n")
            tally.documents += 1
            tally.text_bytes += size
            bar.update(size)
    return tally


def gather(output: Path, max_mb: float | None, seed: int) -> Tally:
    """Writes the corpus to `output`; raises ToolError for a bad flag or where there is nothing to gather."""
    if output.suffix != ".zst":
        raise ToolError(f"--output {output}: the corpus is zstd-compressed JSONL; end the name in .jsonl.zst")
    if max_mb is not None and max_mb <= 0:
        raise ToolError(f"--max-mb {max_mb:g}: must be above 0; leave it out to gather everything")
    stdlib, site_packages = sysconfig.get_path("stdlib"), sysconfig.get_path("purelib")
    candidates = find_candidates(Path(stdlib), Path(site_packages), seed)
    with atomic_open(output) as handle:
        tally = write_corpus(candidates, handle, float("inf") if max_mb is None else max_mb * 1e6)
        if not tally.documents:
            raise ToolError(
                f"no documents: {len(candidates)} files in {stdlib} and {site_packages}, skipped: "
                f"{dict(tally.skipped) or 'none'}; raise --max-mb, or bring a corpus of your own as JSONL"
            )
    return tally


def parser() -> argparse.ArgumentParser:
    """The command line of this tool."""
    result = Parser(
        prog="python -m megatron_hybrid.tools.gather_corpus",
        description="Gathers the sources and documentation of this Python into a small JSONL corpus.",
    )
    result.add_argument("--output", type=Path, required=True, metavar="FILE.jsonl.zst", help="corpus to write")
    result.add_argument(
        "--max-mb", type=float, metavar="N", help="stop at N MB (10^6 bytes) of text (default: everything)"
    )
    result.add_argument("--seed", type=int, default=1234, help="of the order of the documents (default: 1234)")
    return result


def main() -> None:
    """Command-line entry point."""
    args = parser().parse_args()
    tally = gather(args.output, args.max_mb, args.seed)
    skipped = ", ".join(f"{reason} {count:,}" for reason, count in sorted(tally.skipped.items()))
    print(
        f"{args.output}: {tally.documents:,} documents, {tally.text_bytes / 1e6:,.1f} MB of text in "
        f"{args.output.stat().st_size / 1e6:,.1f} MB; skipped: {skipped or 'none'}"
    )


if __name__ == "__main__":
    run_cli(main)
