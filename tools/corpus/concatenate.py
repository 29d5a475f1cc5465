"""Several datasets end to end as one: tokens copied by the kernel, the index rewritten in blocks."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_hybrid.tools.atomic_file import flush_to_disk, fsync_folder, temporary_path
from megatron_hybrid.tools.indexed_dataset import (
    HEADER,
    DatasetError,
    HashedFile,
    bin_path,
    idx_path,
    read_summary,
    write_index,
)

COPY_BYTES = 1 << 28  # asked of the kernel at a time
MAX_DOCUMENTS = 2**31 - 1  # Megatron's document ids are int32


@dataclass(frozen=True)
class Concatenated:
    """What was written: sizes, and the XXH3 hash of the new index."""

    dtype: str
    documents: int
    tokens: int
    bin_bytes: int
    idx_bytes: int
    idx_xxh3: str


def map_index(prefix: str | Path) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """(lengths, document boundaries) of a dataset, mapped, not read."""
    summary = read_summary(prefix)
    index = np.memmap(idx_path(prefix), mode="r", dtype=np.uint8)
    lengths = np.frombuffer(index, "<i4", summary.sequences, HEADER.size)
    boundaries = np.frombuffer(index, "<i8", summary.documents + 1, HEADER.size + 12 * summary.sequences)
    return lengths, boundaries


def concatenate(parts: Sequence[str | Path], output: str | Path) -> Concatenated:
    """Writes the datasets `parts`, in order, as the dataset `output`; both of its files appear whole.

    Raises DatasetError if their dtypes differ, if one is damaged, or if there are too many documents.
    """
    summaries = [read_summary(part) for part in parts]
    for summary in summaries:
        if summary.dtype != summaries[0].dtype:
            raise DatasetError(
                f"{summary.prefix}.idx: {summary.dtype}, but {summaries[0].prefix}.idx is {summaries[0].dtype}; only "
                "datasets of one vocabulary can be merged"
            )
    documents = sum(summary.documents for summary in summaries)
    if documents > MAX_DOCUMENTS:
        raise DatasetError(f"{output}: {documents:,} documents; Megatron's ids allow {MAX_DOCUMENTS:,}: merge fewer")
    bin_path(output).parent.mkdir(parents=True, exist_ok=True)
    data = temporary_path(bin_path(output))
    index = HashedFile(temporary_path(idx_path(output)))
    try:
        bin_bytes = join_files([bin_path(part) for part in parts], data)
        arrays = [map_index(part) for part in parts]
        write_index(index, summaries[0].dtype, [one[0] for one in arrays], [one[1] for one in arrays])
        index.finish()
        idx_path(output).unlink(missing_ok=True)
        fsync_folder(bin_path(output).parent)
        rename_over(data, bin_path(output))
        os.replace(index.path, idx_path(output))
        fsync_folder(bin_path(output).parent)
    except BaseException:
        data.unlink(missing_ok=True)
        index.discard()
        raise
    tokens = sum(summary.tokens for summary in summaries)
    return Concatenated(summaries[0].dtype, documents, tokens, bin_bytes, index.written_bytes, index.xxh3.hexdigest())


def rename_over(source: Path, target: Path) -> None:
    """os.replace, also where both are links to one file: there rename does nothing and leaves both names."""
    os.replace(source, target)
    source.unlink(missing_ok=True)


def join_files(parts: Sequence[Path], output: Path) -> int:
    """Writes `parts` end to end to `output`, flushed; returns its bytes.

    A single part is shared by a hard link where the file system has them; more are copied inside the
    kernel, which shares the blocks instead of copying on file systems that can (reflink).
    """
    output.unlink(missing_ok=True)
    if len(parts) == 1:
        try:
            os.link(parts[0], output)
            return output.stat().st_size
        except OSError:
            pass  # another file system, or one without links
    with open(output, "wb") as target:
        for part in parts:
            with open(part, "rb") as source:
                _copy(source.fileno(), target.fileno(), os.fstat(source.fileno()).st_size)
        flush_to_disk(target)
    return output.stat().st_size


def _copy(source: int, target: int, size: int) -> None:
    """Copies `size` bytes from the start of one file to the end of another."""
    done = 0
    while done < size:
        try:
            count = os.copy_file_range(source, target, min(COPY_BYTES, size - done), done)
        except OSError:  # not between these file systems
            data = os.pread(source, min(1 << 22, size - done), done)
            count = os.write(target, data)
        if count == 0:
            raise OSError(f"file ended after {done} of {size} bytes while it was copied")
        done += count
