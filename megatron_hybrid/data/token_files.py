"""Token files as training reads them, memory-mapped: raw ids (`.npy` by name only) and Megatron's `.bin/.idx`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_hybrid.tools.cli import ToolError
from megatron_hybrid.tools.indexed_dataset import HEADER, bin_path, idx_path, read_summary

NUMPY_MAGIC = b"\x93NUMPY"
RAW_DTYPES = {"uint32": "<u4", "uint16": "<u2"}
SCAN_TOKENS = 1 << 22  # documents are looked for in blocks of so many ids, so memory stays flat


class DataError(ToolError):
    """Data that cannot be trained on as asked. One line: file or flag, value, what is legal, what to do next."""


@dataclass(frozen=True)
class TokenFile:
    """Ids that lie end to end in one file.

    Attributes:
        dtype: numpy's, little-endian.
        prefix: of the `.bin/.idx` dataset, None for raw ids.
        mask: file beside it of one byte per token, 1 where the token is a label; None: all are.
    """

    path: Path
    dtype: str
    tokens: int
    prefix: str | None = None
    mask: Path | None = None

    @cached_property
    def ids(self) -> NDArray[Any]:
        return np.memmap(self.path, mode="r", dtype=self.dtype)

    @cached_property
    def label_mask(self) -> NDArray[np.bool_] | None:
        return None if self.mask is None else np.memmap(self.mask, mode="r", dtype=np.bool_)

    @cached_property
    def _index(self) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        """Byte offsets and lengths of the sequences of a `.bin/.idx` dataset."""
        assert self.prefix is not None
        sequences = read_summary(self.prefix).sequences
        index = np.memmap(idx_path(self.prefix), mode="r", dtype=np.uint8)
        lengths = np.frombuffer(index, "<i4", sequences, HEADER.size)
        return np.frombuffer(index, "<i8", sequences, HEADER.size + 4 * sequences), lengths

    def read(self, start: int, stop: int, vocab_size: int) -> NDArray[np.int64]:
        """Ids [start, stop).

        Raises:
            DataError: an id outside the vocabulary; says where.
        """
        ids = self.ids[start:stop].astype(np.int64)
        if ids.size and (ids.max() >= vocab_size or ids.min() < 0):
            at = int(np.argmax((ids >= vocab_size) | (ids < 0)))
            raise DataError(
                f"{self.path}: token {start + at:,} has id {ids[at]}, outside the vocabulary of {vocab_size:,}; use "
                "the tokenizer the file was made with, or give --instance-dtype as it was written"
            )
        return ids

    def ends_between(self, start: int, stop: int, eod: int) -> NDArray[np.int64]:
        """Where documents end in (start, stop), relative to start: after each end-of-document id, or by the index."""
        if self.prefix is None:
            ends = np.flatnonzero(self.ids[start:stop] == eod) + 1
        else:
            offsets, _ = self._index
            itemsize = np.dtype(self.dtype).itemsize
            first, last = np.searchsorted(offsets, [start * itemsize + 1, stop * itemsize])
            ends = np.unique(offsets[first:last] // itemsize) - start
        return ends[ends < stop - start]

    def documents(self, eod: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(first token, length) of every document that is not empty.

        In raw files, of those that end with the end-of-document id: what follows the last one is left out, as
        OLMo-core's `iter_document_indices` does.
        """
        if self.prefix is not None:
            offsets, lengths = self._index
            starts, sizes = offsets // np.dtype(self.dtype).itemsize, lengths.astype(np.int64)
        else:
            blocks = range(0, self.tokens, SCAN_TOKENS)
            ends = [np.flatnonzero(self.ids[at : at + SCAN_TOKENS] == eod) + at + 1 for at in blocks]
            bounds = np.concatenate([np.zeros(1, dtype=np.int64), *ends])
            starts, sizes = bounds[:-1], np.diff(bounds)
        return starts[sizes > 0], sizes[sizes > 0]


def open_raw(path: Path, dtype: str, mask_rule: str = "") -> TokenFile:
    """A file of raw ids.

    Args:
        dtype: a key of RAW_DTYPES.
        mask_rule: 'A:B': its label mask is the file whose name has B where this one's has A; empty: no mask.

    Raises:
        DataError: missing, no whole number of ids, with a numpy header, or without the mask asked for.
    """
    itemsize = np.dtype(RAW_DTYPES[dtype]).itemsize
    try:
        size = path.stat().st_size
        with open(path, "rb") as handle:
            header = handle.read(len(NUMPY_MAGIC))
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; correct --instance-data or --instance-root") from None
    if header == NUMPY_MAGIC:
        raise DataError(f"{path}: has numpy's header; token files are raw ids in spite of .npy: write them with tofile")
    if size == 0 or size % itemsize:
        raise DataError(
            f"{path}: {size} bytes, no whole number of {itemsize}-byte ids above 0; fetch it again, or give another "
            "--instance-dtype"
        )
    tokens = size // itemsize
    return TokenFile(path, RAW_DTYPES[dtype], tokens, mask=_mask_of(path, tokens, mask_rule))


def _mask_of(path: Path, tokens: int, rule: str) -> Path | None:
    if not rule:
        return None
    here, colon, there = rule.partition(":")
    if not (here and colon and there):
        raise DataError(f"--instance-label-mask {rule}: must be A:B, such as token_ids:labels_mask")
    if here not in path.name:
        raise DataError(f"--instance-label-mask {rule}: {here!r} is not in the name of {path}")
    mask = path.with_name(path.name.replace(here, there))
    if not mask.is_file():
        raise DataError(f"{mask}: no such file; it should hold the label mask of {path.name} (--instance-label-mask)")
    if mask.stat().st_size != tokens:
        raise DataError(f"{mask}: {mask.stat().st_size} bytes for {tokens} tokens of {path.name}; one byte per token")
    return mask


def open_prefix(prefix: str) -> TokenFile:
    """A `.bin/.idx` dataset; raises DatasetError for what is missing or damaged."""
    summary = read_summary(prefix)
    dtype = np.dtype(summary.dtype).newbyteorder("<").str
    return TokenFile(bin_path(prefix), dtype, summary.tokens, prefix=prefix)
