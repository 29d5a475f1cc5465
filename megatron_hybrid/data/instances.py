"""Instances of fixed length: which tokens sample number i is. Letters: T sequence length.

Every file is cut into ⌊tokens / T⌋ instances and its tail dropped; no instance spans two files, a document is split
wherever the cut falls (OLMo-core's `NumpyFSLDataset`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import xxhash
from numpy.typing import NDArray

from megatron_hybrid.data.token_files import DataError, TokenFile

#: Of an array, hashed at a time.
HASH_ROWS = 1 << 22


@dataclass(frozen=True)
class Instance:
    """One row of training.

    Attributes:
        tokens: [T] int64.
        label_mask: [T] bool, which tokens are labels; None: all.
        lengths: of its documents in order, adding up to T (padding is the last); None where they were not asked for.
    """

    tokens: NDArray[np.int64]
    label_mask: NDArray[np.bool_] | None = None
    lengths: NDArray[np.int64] | None = None


class Instances(Protocol):
    """What a dataset reads from. Numbers are those of `SampleOrder`."""

    files: Sequence[TokenFile]

    def __len__(self) -> int: ...

    def read(self, number: int, documents: bool) -> Instance:
        """Instance `number`; documents: with their lengths. Raises DataError for an id outside the vocabulary."""
        ...

    def where(self, number: int) -> str:
        """File and place of an instance, for messages."""
        ...

    def selection(self) -> str:
        """A hash of what is taken of the files, and in which order; the files themselves are not in it."""
        ...


def hash_of(array: NDArray[Any]) -> str:
    """XXH3 of an array's type and bytes, piece by piece and without a copy: a memory map is read page after page."""
    digest = xxhash.xxh3_128(repr(array.dtype.descr).encode())
    for at in range(0, len(array), HASH_ROWS):
        digest.update(np.ascontiguousarray(array[at : at + HASH_ROWS]).view(np.uint8))
    return digest.hexdigest()


class Cutter:
    """Cuts instances out of files."""

    def __init__(self, sequence_length: int, vocab_size: int, eod: int) -> None:
        self.sequence_length, self.vocab_size, self.eod = sequence_length, vocab_size, eod

    def cut(self, file: TokenFile, number: int, documents: bool) -> Instance:
        start, stop = number * self.sequence_length, (number + 1) * self.sequence_length
        tokens = file.read(start, stop, self.vocab_size)
        mask = None if file.label_mask is None else np.array(file.label_mask[start:stop])
        lengths = None
        if documents:
            ends = file.ends_between(start, stop, self.eod)
            lengths = np.diff(np.concatenate([[0], ends, [self.sequence_length]]))
        return Instance(tokens, mask, lengths)

    def where(self, file: TokenFile, number: int) -> str:
        start = number * self.sequence_length
        return f"{file.path}, tokens {start} to {start + self.sequence_length}"


class FixedInstances:
    """The first so many instances of each of a list of files, file after file. Memory: 8 bytes per file.

    A file may stand in the list more than once (repetition in a mixture).
    """

    def __init__(self, files: Sequence[TokenFile], cutter: Cutter, counts: Sequence[int] | None = None) -> None:
        """counts: instances to take of each file, from its start; None takes all."""
        self.files, self.cutter = files, cutter
        all_of_it = [file.tokens // cutter.sequence_length for file in files]
        counts = all_of_it if counts is None else counts
        assert all(count <= most for count, most in zip(counts, all_of_it, strict=True))
        self.ends: NDArray[np.int64] = np.cumsum(counts, dtype=np.int64)

    def __len__(self) -> int:
        return int(self.ends[-1])

    def _place(self, number: int) -> tuple[TokenFile, int]:
        if not 0 <= number < len(self):
            raise IndexError(f"instance {number} of {len(self)}")
        at = int(np.searchsorted(self.ends, number, side="right"))
        return self.files[at], number - (int(self.ends[at - 1]) if at else 0)

    def read(self, number: int, documents: bool) -> Instance:
        return self.cutter.cut(*self._place(number), documents)

    def where(self, number: int) -> str:
        return self.cutter.where(*self._place(number))

    def selection(self) -> str:
        return hash_of(self.ends)


class ListedInstances:
    """Instances in the order of an index that `tools.mix` wrote, [N] of (dataset int16, sample int64), memory-mapped.

    Sample k of a dataset of n instances is its instance k mod n: a second epoch of it reads the same again.
    """

    def __init__(self, files: Sequence[TokenFile], cutter: Cutter, index: NDArray[np.void]) -> None:
        self.files, self.cutter, self.index = files, cutter, index
        self.counts = [file.tokens // cutter.sequence_length for file in files]
        for file, count in zip(files, self.counts, strict=True):
            if not count:
                raise DataError(f"{file.path}: {file.tokens} tokens, not one instance; leave it out of the mix")

    def __len__(self) -> int:
        return len(self.index)

    def _place(self, number: int) -> tuple[TokenFile, int]:
        dataset, sample = (int(value) for value in self.index[number])
        return self.files[dataset], sample % self.counts[dataset]

    def read(self, number: int, documents: bool) -> Instance:
        return self.cutter.cut(*self._place(number), documents)

    def where(self, number: int) -> str:
        return self.cutter.where(*self._place(number))

    def selection(self) -> str:
        return hash_of(self.index)
