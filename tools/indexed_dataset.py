"""Writer and reader of Megatron's token files, `PREFIX.bin` and `PREFIX.idx`, in numpy alone.

The format is that of `megatron.core.datasets.indexed_dataset` (MMapIndexedDataset), all little-endian:

    .bin   token ids, one after the other, no header
    .idx   offset  0   9 bytes  magic "MMIDIDX" and two zero bytes
           offset  9   uint64   version, 1
           offset 17   uint8    dtype code of the token ids
           offset 18   uint64   S, number of sequences
           offset 26   uint64   D, number of document boundaries (documents + 1)
           offset 34   int32[S] length of each sequence, in tokens
                       int64[S] offset of each sequence in .bin, in bytes
                       int64[D] first sequence of each document; the last entry is S

Here, as in all GPT data, one document is one sequence. Megatron's own reader checks the magic and the
version and nothing else: a truncated .bin opens, and fails days later when the lost document is drawn.
"""

import os
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import xxhash
from numpy.typing import NDArray

from megatron_hybrid.tools.atomic_file import flush_to_disk, fsync_folder, temporary_path
from megatron_hybrid.tools.cli import ToolError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, document boundaries
DTYPE_CODES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}  # 6, 7: floats
UINT16_VOCAB_LIMIT = 65500  # Megatron's DType.optimal_dtype; the 36 ids below 2**16 stay unused
MAX_DOCUMENT_TOKENS = 2**31 - 1  # lengths are int32
BLOCK_SEQUENCES = 1 << 20  # the index is written and checked in blocks, so memory stays flat
OBJECT_STORAGE = ("s3://", "msc://")  # prefixes Megatron reads without a local file


class DatasetError(ToolError):
    """A dataset that is missing, damaged or of another format. The message is one line and names the file."""


@dataclass(frozen=True)
class DatasetSummary:
    """What the header of a dataset says, once found consistent with the sizes of its two files."""

    prefix: str
    dtype: str
    sequences: int
    documents: int
    tokens: int


@dataclass(frozen=True)
class WrittenDataset:
    """The result of `IndexedDatasetWriter.commit`; the hashes (XXH3, 128 bits) are of the files as written."""

    dtype: str
    documents: int
    tokens: int
    bin_bytes: int
    bin_xxh3: str
    idx_bytes: int
    idx_xxh3: str


def bin_path(prefix: str | Path) -> Path:
    """Path of the token ids of the dataset `prefix`."""
    return Path(f"{prefix}.bin")


def idx_path(prefix: str | Path) -> Path:
    """Path of the index of the dataset `prefix`."""
    return Path(f"{prefix}.idx")


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The dtype Megatron stores ids below `vocab_size` in: uint16 below 65,500, int32 from there on.

    `vocab_size` must count every id that can occur, added tokens included (largest id + 1).
    Matches `megatron.core.datasets.indexed_dataset.DType.optimal_dtype`.
    """
    return np.dtype("<u2" if vocab_size < UINT16_VOCAB_LIMIT else "<i4")


class HashedFile:
    """A file being written, with the XXH3 hash and the number of the bytes written so far."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.xxh3 = xxhash.xxh3_128()
        self.written_bytes = 0
        self._handle: BinaryIO = open(path, "wb")  # noqa: SIM115 - closed by finish or discard

    def write(self, data: bytes | NDArray[Any]) -> None:
        buffer = data if isinstance(data, bytes) else memoryview(np.ascontiguousarray(data)).cast("B")
        self.xxh3.update(buffer)
        self.written_bytes += self._handle.write(buffer)

    def finish(self) -> None:
        flush_to_disk(self._handle)
        self._handle.close()

    def position(self) -> tuple[Any, int]:
        """Where the file is now, for `back_to`."""
        return self.xxh3.copy(), self.written_bytes

    def back_to(self, position: tuple[Any, int]) -> None:
        """Takes back all that was written since `position`."""
        self.xxh3, self.written_bytes = position[0].copy(), position[1]
        self._handle.flush()
        self._handle.truncate(self.written_bytes)
        self._handle.seek(self.written_bytes)

    def discard(self) -> None:
        self._handle.close()
        self.path.unlink(missing_ok=True)


class IndexedDatasetWriter:
    """Writes `PREFIX.bin` and `PREFIX.idx`, which carry these names only once both are complete.

    Use as a context manager and call `commit` at the end of the block; leaving the block in any
    other way removes the temporary files. Memory: 4 bytes per document, when added in batches.
    """

    def __init__(self, prefix: str | Path, vocab_size: int) -> None:
        """Starts a dataset at `prefix` whose ids lie in [0, vocab_size); makes the parent folder."""
        self.prefix = str(prefix)
        self.vocab_size = vocab_size
        self.dtype = token_dtype(vocab_size)
        self.documents = 0
        self.tokens = 0
        self._lengths: list[NDArray[np.int32]] = []
        bin_path(prefix).parent.mkdir(parents=True, exist_ok=True)
        self._bin: HashedFile | None = HashedFile(temporary_path(bin_path(prefix)))

    def __enter__(self) -> "IndexedDatasetWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bin is not None:
            self._bin.discard()
            self._bin = None

    def add_document(self, token_ids: Sequence[int] | NDArray[np.integer[Any]]) -> None:
        """Appends one document (1-D, may be empty) as one sequence. Raises DatasetError for a bad id."""
        ids = np.asarray(token_ids, dtype=np.int64 if len(token_ids) == 0 else None)
        self.add_documents(ids, np.array([ids.size], dtype=np.int64))

    def add_documents(self, token_ids: NDArray[np.integer[Any]], lengths: NDArray[np.integer[Any]]) -> None:
        """Appends `len(lengths)` documents that lie end to end in `token_ids` (1-D).

        Raises DatasetError, and writes nothing, if an id is outside [0, vocab_size), if a length
        is outside [0, 2**31), or if the lengths do not add up to the number of ids.
        """
        self._check_ids(token_ids)
        if lengths.size and (lengths.min() < 0 or lengths.max() > MAX_DOCUMENT_TOKENS):
            raise DatasetError(
                f"{self.prefix}.bin: a document of {int(lengths.max())} tokens; the format allows 0 to "
                f"{MAX_DOCUMENT_TOKENS}: split it"
            )
        if int(lengths.sum(dtype=np.int64)) != token_ids.size:
            raise DatasetError(
                f"{self.prefix}.bin: {token_ids.size} ids for documents of "
                f"{int(lengths.sum(dtype=np.int64))} tokens in all"
            )
        self._open_bin().write(token_ids.astype(self.dtype, copy=False))
        self._lengths.append(lengths.astype("<i4"))
        self.documents += int(lengths.size)
        self.tokens += int(token_ids.size)

    @contextmanager
    def long_document(self) -> Iterator[Callable[[NDArray[np.integer[Any]]], None]]:
        """A document that arrives in pieces: yields the function that appends ids to it.

        If the block raises, the document is taken back and the error goes on.
        """
        position, tokens = self._open_bin().position(), 0

        def extend(token_ids: NDArray[np.integer[Any]]) -> None:
            nonlocal tokens
            self._check_ids(token_ids)
            tokens += int(token_ids.size)
            if tokens > MAX_DOCUMENT_TOKENS:
                raise DatasetError(f"{self.prefix}.bin: a document of over {MAX_DOCUMENT_TOKENS} tokens; split it")
            self._open_bin().write(token_ids.astype(self.dtype, copy=False))

        try:
            yield extend
        except BaseException:
            self._open_bin().back_to(position)
            raise
        self._lengths.append(np.array([tokens], dtype="<i4"))
        self.documents += 1
        self.tokens += tokens

    def _open_bin(self) -> HashedFile:
        if self._bin is None:
            raise DatasetError(f"{self.prefix}: documents added after the dataset was closed")
        return self._bin

    def _check_ids(self, token_ids: NDArray[np.integer[Any]]) -> None:
        """Raises DatasetError unless `token_ids` is a 1-D array of integers in [0, vocab_size)."""
        if token_ids.dtype.kind not in "iu" or token_ids.ndim != 1:
            raise DatasetError(
                f"{self.prefix}.bin: token ids must be a 1-D array of integers, not "
                f"{token_ids.ndim}-D {token_ids.dtype}"
            )
        if token_ids.size and (token_ids.min() < 0 or token_ids.max() >= self.vocab_size):
            worst = int(token_ids.min() if token_ids.min() < 0 else token_ids.max())
            raise DatasetError(
                f"{self.prefix}.bin: token id {worst} is outside the vocabulary, 0 to "
                f"{self.vocab_size - 1}; use the tokenizer these ids came from"
            )

    def commit(self) -> WrittenDataset:
        """Completes both files and gives them their final names, `.bin` first, then `.idx`.

        An older `.idx` is removed before that, so that no crash can pair it with the new `.bin`.
        """
        if self._bin is None:
            raise DatasetError(f"{self.prefix}: committed after the dataset was closed")
        index = HashedFile(temporary_path(idx_path(self.prefix)))
        try:
            self._write_index(index)
            index.finish()
            self._bin.finish()
            folder = bin_path(self.prefix).parent
            idx_path(self.prefix).unlink(missing_ok=True)
            fsync_folder(folder)
            os.replace(self._bin.path, bin_path(self.prefix))
            os.replace(index.path, idx_path(self.prefix))
            fsync_folder(folder)
        except BaseException:
            index.discard()
            raise
        written, self._bin = self._bin, None
        return WrittenDataset(
            dtype=self.dtype.name,
            documents=self.documents,
            tokens=self.tokens,
            bin_bytes=written.written_bytes,
            bin_xxh3=written.xxh3.hexdigest(),
            idx_bytes=index.written_bytes,
            idx_xxh3=index.xxh3.hexdigest(),
        )

    def _write_index(self, index: HashedFile) -> None:
        lengths = np.concatenate([np.zeros(0, dtype="<i4"), *self._lengths])
        write_index(index, self.dtype.name, [lengths], [np.zeros(0, dtype="<i8")])


def write_index(
    index: HashedFile,
    dtype: str,
    lengths: Sequence[NDArray[np.int32]],
    boundaries: Sequence[NDArray[np.int64]],
) -> None:
    """Writes the index of datasets that lie end to end in one .bin, from the arrays of each.

    `lengths` are the tokens of each dataset's sequences, `boundaries` its document index; an empty one
    stands for one document per sequence. Memory: blocks of BLOCK_SEQUENCES, whatever the number of documents.
    """
    itemsize = np.dtype(dtype).itemsize
    code = next(code for code, name in DTYPE_CODES.items() if name == dtype)
    sequences = sum(part.size for part in lengths)
    documents = sum(
        bounds.size - 1 if bounds.size else part.size for part, bounds in zip(lengths, boundaries, strict=True)
    )
    index.write(HEADER.pack(MAGIC, VERSION, code, sequences, documents + 1))
    for part in lengths:
        for start in range(0, part.size, BLOCK_SEQUENCES):
            index.write(part[start : start + BLOCK_SEQUENCES])
    offset = 0
    for part in lengths:
        for start, pointers in _expected_pointers(part, itemsize, offset):
            index.write(pointers)
            end = int(pointers[-1]) + int(part[start + pointers.size - 1]) * itemsize
        offset = end if part.size else offset
    index.write(np.zeros(1, dtype="<i8"))
    first = 0
    for part, bounds in zip(lengths, boundaries, strict=True):
        for start in range(1, (bounds.size or part.size + 1), BLOCK_SEQUENCES):
            stop = min(start + BLOCK_SEQUENCES, bounds.size or part.size + 1)
            block = bounds[start:stop] if bounds.size else np.arange(start, stop, dtype="<i8")
            index.write((block + first).astype("<i8", copy=False))
        first += part.size


def _expected_pointers(
    lengths: NDArray[np.int32], itemsize: int, offset: int = 0
) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Byte offsets of sequences that lie end to end from `offset` on, as (first sequence, offsets) by block."""
    for start in range(0, lengths.size, BLOCK_SEQUENCES):
        ends = offset + np.cumsum(lengths[start : start + BLOCK_SEQUENCES], dtype=np.int64) * itemsize
        yield start, np.concatenate([np.array([offset], dtype=np.int64), ends[:-1]]).astype("<i8")
        offset = int(ends[-1])


class IndexedDatasetReader:
    """Reads a dataset, after checking every entry of its index; documents are views of the mapped file."""

    def __init__(self, prefix: str | Path) -> None:
        """Opens and checks the dataset at `prefix`; raises DatasetError, in one line, for any fault."""
        self.summary = read_summary(prefix)
        self.prefix = str(prefix)
        index = np.memmap(idx_path(prefix), mode="r", dtype=np.uint8)
        sequences, boundaries = self.summary.sequences, self.summary.documents + 1
        at = HEADER.size
        self.lengths: NDArray[np.int32] = np.frombuffer(index, "<i4", sequences, at)
        at += 4 * sequences
        self.pointers: NDArray[np.int64] = np.frombuffer(index, "<i8", sequences, at)
        at += 8 * sequences
        self.document_indices: NDArray[np.int64] = np.frombuffer(index, "<i8", boundaries, at)
        self.tokens: NDArray[Any] = np.memmap(
            bin_path(prefix), mode="r", dtype=np.dtype(self.summary.dtype).newbyteorder("<")
        )
        self._check_index()

    def __len__(self) -> int:
        """Number of sequences, which is the number of documents in GPT data."""
        return self.summary.sequences

    def __getitem__(self, index: int) -> NDArray[Any]:
        """Token ids of one sequence, 1-D, in the dataset's dtype. Raises IndexError past the end."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"{self.prefix}: sequence {index} of {len(self)}")
        start = int(self.pointers[index]) // self.tokens.dtype.itemsize
        return self.tokens[start : start + int(self.lengths[index])]

    def _check_index(self) -> None:
        path = idx_path(self.prefix)
        if (self.lengths < 0).any():
            at = int(np.argmax(self.lengths < 0))
            raise _damaged(path, f"sequence {at} has length {self.lengths[at]}")
        for start, expected in _expected_pointers(self.lengths, self.tokens.dtype.itemsize):
            wrong = self.pointers[start : start + expected.size] != expected
            if wrong.any():
                at = int(np.argmax(wrong))
                raise _damaged(
                    path,
                    f"sequence {start + at} starts at byte {self.pointers[start + at]} where byte "
                    f"{expected[at]} follows from the lengths",
                )
        boundaries = self.document_indices
        if boundaries[0] != 0 or boundaries[-1] != len(self) or (np.diff(boundaries) < 0).any():
            raise _damaged(path, f"document boundaries do not rise from 0 to {len(self)}")


def _damaged(path: Path, what: str) -> DatasetError:
    return DatasetError(f"{path}: {what}; copy or build the dataset again")


def read_summary(prefix: str | Path) -> DatasetSummary:
    """Checks the header and both file sizes of a local dataset, in constant time, and returns its size.

    Raises DatasetError, in one line that names the file, for a file that is missing or truncated, a
    wrong magic or version, a dtype that holds no token ids, or no tokens at all.
    """
    _require_files(str(prefix))
    index, data = idx_path(prefix), bin_path(prefix)
    idx_bytes, bin_bytes = index.stat().st_size, data.stat().st_size
    with open(index, "rb") as handle:
        header = handle.read(HEADER.size)
        if not header.startswith(MAGIC):
            raise DatasetError(f"{index}: not a Megatron index: it starts with {header[:9]!r}, not {MAGIC!r}")
        if len(header) < HEADER.size:
            raise _damaged(index, f"truncated, {idx_bytes} bytes where the header alone has {HEADER.size}")
        _, version, code, sequences, boundaries = HEADER.unpack(header)
        if version != VERSION:
            raise DatasetError(f"{index}: version {version} of the format; only version {VERSION} is known")
        if code not in DTYPE_CODES:
            legal = ", ".join(f"{code} ({name})" for code, name in DTYPE_CODES.items())
            raise DatasetError(f"{index}: dtype code {code}; token ids have one of {legal}")
        expected = HEADER.size + 12 * sequences + 8 * boundaries
        if idx_bytes not in (expected, expected + sequences):  # + sequences: modes of multimodal data
            raise _damaged(index, f"{idx_bytes} bytes where {sequences} sequences take {expected}")
        itemsize = np.dtype(DTYPE_CODES[code]).itemsize
        end_of_data = 0
        if sequences:
            handle.seek(HEADER.size + 4 * (sequences - 1))
            last_length = struct.unpack("<i", handle.read(4))[0]
            handle.seek(HEADER.size + 4 * sequences + 8 * (sequences - 1))
            end_of_data = struct.unpack("<q", handle.read(8))[0] + last_length * itemsize
    if bin_bytes != end_of_data:
        raise _damaged(data, f"{bin_bytes} bytes where {index.name} describes {end_of_data}")
    if bin_bytes == 0 or boundaries < 2:
        raise DatasetError(f"{data}: no tokens; Megatron cannot map an empty file, leave this prefix out")
    return DatasetSummary(str(prefix), DTYPE_CODES[code], sequences, boundaries - 1, bin_bytes // itemsize)


def _require_files(prefix: str) -> None:
    missing = [path for path in (idx_path(prefix), bin_path(prefix)) if not path.is_file()]
    if not missing:
        return
    stem = prefix.removesuffix(".bin").removesuffix(".idx")
    if stem != prefix and idx_path(stem).is_file():
        raise DatasetError(f"{missing[0]}: no such file; give the prefix without its suffix: {stem}")
    if len(missing) == 1:
        there = bin_path(prefix) if missing[0] == idx_path(prefix) else idx_path(prefix)
        raise DatasetError(
            f"{missing[0]}: no such file, though {there.name} is there: the dataset was not finished or "
            "not copied whole; build or copy it again"
        )
    if Path(prefix).is_dir():
        found = sorted(path for path in Path(prefix).glob("*.idx"))
        advice = f"such as {found[0].with_suffix('')}" if found else "but it holds no .idx file"
        raise DatasetError(f"{prefix}: a folder; give the prefix of a dataset in it, {advice}")
    raise DatasetError(
        f"{missing[0]}: no such file, nor {missing[1].name}; correct the prefix (the path without .bin or "
        f".idx) or build it: python -m megatron_hybrid.tools.preprocess --output-prefix {prefix} ..."
    )


def require_dataset(prefix: str | Path) -> DatasetSummary | None:
    """Raises DatasetError unless `prefix` names a dataset that is there and whole; returns its size.

    Constant time, for a trainer to call before any process group is made; `IndexedDatasetReader`
    also checks every entry of the index. A prefix in object storage (s3://, msc://) is not looked
    at and returns None.
    """
    if str(prefix).startswith(OBJECT_STORAGE):
        return None
    return read_summary(prefix)
