"""Makes Megatron datasets of token files that exist already, without copying them: only an index is written.

    python -m megatron_hybrid.tools.import_tokens --input 'tokens/**/*.npy' --output-dir imported \\
        --vocab-size 100278 --eod-id 100257

The files are those of OLMo-core and dolma: raw ids, no header. Ids below 2**31 have the same bytes as uint32
and as int32, so PREFIX.bin is a link to the file. Documents end at the end-of-document id, or where the table
of spans beside a file (NAME.csv.gz, as dolma writes it: start,end,...) says.
"""

import argparse
import csv
import gzip
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_hybrid.tools.cli import Parser, ToolError, run_cli

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

BLOCK_TOKENS = 1 << 18  # 1 MB of uint32 stays in the cache of a core
DTYPES = {"uint32": ("<u4", "int32"), "uint16": ("<u2", "uint16")}
NUMPY_MAGIC = b"\x93NUMPY"


@dataclass(frozen=True)
class Imported:
    """One file as a dataset."""

    prefix: str
    documents: int
    tokens: int
    unterminated: bool  # the last document does not end with the end-of-document id
    spans: bool  # the documents come from a table beside the file


def scan(path: Path, dtype: str, vocab_size: int, eod_id: int) -> tuple["NDArray[np.int64]", int, str]:
    """(positions after each end-of-document id, number of tokens, XXH3 hash); one pass, flat memory but the positions.

    Raises ToolError, naming the file, for ids outside the vocabulary and sizes that are no whole number of ids.
    """
    import numpy as np
    import xxhash

    itemsize = np.dtype(dtype).itemsize
    size = path.stat().st_size
    if size == 0 or size % itemsize:
        raise ToolError(f"{path}: {size} bytes, no whole number of {itemsize}-byte ids above 0; fetch it again")
    digest = xxhash.xxh3_128()
    buffer = bytearray(BLOCK_TOKENS * itemsize)
    view = memoryview(buffer)
    ends: list[NDArray[np.int64]] = []
    done = 0
    with open(path, "rb", buffering=0) as handle:
        while count := handle.readinto(view):
            if done == 0 and buffer.startswith(NUMPY_MAGIC):
                raise ToolError(
                    f"{path}: has a header of numpy; files of OLMo-core and dolma are raw ids in spite of .npy"
                )
            while count % itemsize:  # a short read, as network file systems may give
                count += handle.readinto(view[count:]) or 0
            digest.update(view[:count])
            block = np.frombuffer(buffer, dtype, count // itemsize)
            largest = int(block.max())
            if largest >= vocab_size:
                at = done + int(np.argmax(block >= vocab_size))
                raise ToolError(
                    f"{path}: id {largest} near token {at}, outside the vocabulary of {vocab_size}; check --vocab-size "
                    "and --dtype"
                )
            ends.append(np.flatnonzero(block == eod_id) + (done + 1))
            done += block.size
    return np.concatenate(ends), done, digest.hexdigest()


def read_spans(path: Path, tokens: int) -> "NDArray[np.int64]":
    """Ends of the documents in a dolma table; raises ToolError unless its spans cover the file without gaps."""
    import numpy as np

    ends = [0]
    with gzip.open(path, "rt", newline="") as handle:
        for number, row in enumerate(csv.reader(handle), 1):
            try:
                start, end = int(row[0]), int(row[1])
            except (ValueError, IndexError):
                raise ToolError(f"{path}: line {number} does not begin with start,end: {row[:3]}") from None
            if start != ends[-1] or end < start:
                raise ToolError(
                    f"{path}: line {number} spans {start} to {end}, after a document that ends at {ends[-1]}"
                )
            ends.append(end)
    if ends[-1] != tokens:
        raise ToolError(f"{path}: its spans end at {ends[-1]}, the file has {tokens} tokens; fetch both again")
    return np.array(ends[1:], dtype=np.int64)


def import_file(
    path: Path, prefix: Path, source: str, dtype: str, vocab_size: int, eod_id: int, use_spans: bool
) -> Imported:
    """Links `path` as PREFIX.bin and writes PREFIX.idx and PREFIX.json."""
    import numpy as np

    from megatron_hybrid.tools.atomic_file import atomic_open, fsync_folder, temporary_path
    from megatron_hybrid.tools.corpus.concatenate import rename_over
    from megatron_hybrid.tools.corpus.finish import MANIFEST_VERSION
    from megatron_hybrid.tools.indexed_dataset import HashedFile, bin_path, idx_path, write_index

    raw, stored = DTYPES[dtype]
    ends, tokens, digest = scan(path, raw, vocab_size, eod_id)
    unterminated = not ends.size or int(ends[-1]) != tokens
    table = path.with_suffix(".csv.gz")
    spans = use_spans and table.is_file()
    if spans:
        ends = read_spans(table, tokens)
    elif unterminated:
        ends = np.append(ends, tokens)
    lengths = np.diff(ends, prepend=0)
    if lengths.max() >= 2**31:
        raise ToolError(f"{path}: a document of {int(lengths.max()):,} tokens; the format allows 2**31 - 1")
    prefix.parent.mkdir(parents=True, exist_ok=True)
    index = HashedFile(temporary_path(idx_path(prefix)))
    try:
        write_index(index, stored, [lengths.astype("<i4")], [np.zeros(0, dtype="<i8")])
        index.finish()
    except BaseException:
        index.discard()
        raise
    link = temporary_path(bin_path(prefix))
    link.unlink(missing_ok=True)
    try:
        os.link(path, link)
    except OSError:  # another file system
        os.symlink(path.resolve(), link)
    rename_over(link, bin_path(prefix))
    rename_over(index.path, idx_path(prefix))
    fsync_folder(prefix.parent)
    entry: dict[str, Any] = {
        "prefix": prefix.name,
        "source": source,
        "dtype": stored,
        "documents": int(lengths.size),
        "tokens": tokens,
        "bin": {"bytes": path.stat().st_size, "parts": [{"offset": 0, "bytes": path.stat().st_size, "xxh3": digest}]},
        "idx": {"bytes": index.written_bytes, "xxh3": index.xxh3.hexdigest()},
    }
    content = {
        "manifest_version": MANIFEST_VERSION,
        "imported_from": str(path),
        "tokenizer": {"vocab_size": vocab_size, "eod_id": eod_id},
        "options": {"append_eod": not unterminated and not spans},
        "datasets": [entry],
    }
    with atomic_open(Path(f"{prefix}.json")) as handle:
        handle.write(json.dumps(content, indent=1).encode() + b"\n")
    return Imported(str(prefix), int(lengths.size), tokens, unterminated, spans)


def find_files(arguments: list[str]) -> Iterator[tuple[Path, Path]]:
    """(file, its path below the fixed part of the argument) of every argument, sorted within each."""
    import glob

    for argument in arguments:
        folder = Path(argument)
        if folder.is_dir():
            found = sorted(folder.rglob("*.npy"))
            root = folder
        else:
            found = sorted(Path(one) for one in glob.glob(argument, recursive=True))
            fixed = [part for part in folder.parts if not glob.has_magic(part)]
            root = Path(*fixed) if len(fixed) < len(folder.parts) else folder.parent
        if not found:
            raise ToolError(f"--input {argument}: no such file, and no folder with .npy files")
        for path in found:
            yield path, path.relative_to(root)


def parser() -> argparse.ArgumentParser:
    """The command line of this tool."""
    result = Parser(
        prog="python -m megatron_hybrid.tools.import_tokens",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument(
        "--input", nargs="+", required=True, metavar="PATH", help="token files, globs, or folders of .npy"
    )
    result.add_argument("--output-dir", type=Path, required=True, metavar="D", help="where links and indexes go")
    result.add_argument("--source", metavar="NAME", help="name of the source (default: the folder of each file)")
    result.add_argument("--dtype", choices=tuple(DTYPES), default="uint32", help="of the ids (default: uint32)")
    result.add_argument("--vocab-size", type=int, required=True, metavar="N", help="ids must be below it")
    result.add_argument("--eod-id", type=int, required=True, metavar="N", help="the end-of-document id")
    result.add_argument(
        "--ignore-spans", action="store_true", help="find documents by the id even with a .csv.gz beside"
    )
    result.add_argument("--overwrite", action="store_true", help="replace datasets of the same names")
    return result


def check_arguments(args: argparse.Namespace) -> None:
    """Raises ToolError, naming the flag, for sizes that Megatron cannot read."""
    small = args.dtype == "uint16"
    if not 0 < args.vocab_size <= 2**31 or (small and args.vocab_size >= 65500):
        raise ToolError(
            f"--vocab-size {args.vocab_size}: with --dtype {args.dtype} it must be 1 to {65499 if small else 2**31}; "
            "between 65,500 and 65,536 Megatron itself disagrees about the dtype"
        )
    if not small and args.vocab_size <= 65536:
        raise ToolError(
            f"--vocab-size {args.vocab_size}: Megatron's --dataloader-fast-cache-load reads vocabularies up to 65,536 "
            "as uint16, these files hold uint32; preprocess the text again"
        )
    if not 0 <= args.eod_id < args.vocab_size:
        raise ToolError(f"--eod-id {args.eod_id}: must be 0 to {args.vocab_size - 1}")


def main() -> None:
    """Command-line entry point."""
    args = parser().parse_args()
    check_arguments(args)
    documents = tokens = files = 0
    started = time.perf_counter()
    taken: dict[Path, Path] = {}
    for path, relative in find_files(args.input):
        prefix = args.output_dir / relative.with_suffix("")
        if prefix in taken:
            raise ToolError(f"--input {path}: would have the name of {taken[prefix]}; import them into two folders")
        taken[prefix] = path
        if Path(f"{prefix}.idx").exists() and not args.overwrite:
            raise ToolError(f"{prefix}.idx exists; choose another --output-dir or pass --overwrite")
        source = args.source or path.parent.name
        one = import_file(path, prefix, source, args.dtype, args.vocab_size, args.eod_id, not args.ignore_spans)
        if one.unterminated:
            print(f"{path}: its last tokens do not end with the end-of-document id; they make a document all the same")
        documents, tokens, files = documents + one.documents, tokens + one.tokens, files + 1
    seconds = time.perf_counter() - started
    print(
        f"{args.output_dir}: {files:,} files, {documents:,} documents, {tokens:,} tokens, {seconds:.1f} s, "
        f"{tokens / seconds / 1e6:,.0f} M tokens/s"
    )


if __name__ == "__main__":
    run_cli(main)
