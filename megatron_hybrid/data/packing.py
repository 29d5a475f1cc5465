"""Best-fit-decreasing packing of whole documents into instances, for long context and supervised fine-tuning.

The algorithm of "Fewer Truncations Improve Language Modeling" (arXiv 2404.10830), as OLMo-core packs: documents by
falling length, each into the fullest instance it fits, of those the one that has waited longest. Documents longer
than an instance are truncated; the rest of an instance is padding. Documents of one length keep their order here;
OLMo-core sorts them unstably, so which of them go together depends on the machine there.
"""

from __future__ import annotations

import shutil
import sys
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from megatron_hybrid.data.instances import Instance, hash_of
from megatron_hybrid.data.order import one_at_a_time
from megatron_hybrid.data.token_files import DataError, TokenFile
from megatron_hybrid.tools.atomic_file import temporary_path
from megatron_hybrid.tools.corpus.fingerprint import fingerprint

FORMAT = 1  # of the packed index on disk


def pack_best_fit(lengths: NDArray[np.int64], capacity: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Which documents share an instance.

    Args:
        lengths: [documents], each from 1 to `capacity`.

    Returns:
        (order, bounds): instance i holds documents order[bounds[i]:bounds[i + 1]], in that order.
    """
    by_length = np.argsort(-lengths, kind="stable")
    waiting: list[deque[int]] = [deque() for _ in range(capacity)]  # instances by space left
    spaces = 0  # bit s set: an instance with s tokens left waits
    instance_of = np.empty(lengths.size, dtype=np.int64)
    instances = 0
    for place, length in enumerate(lengths[by_length].tolist()):
        fitting = spaces >> length
        if fitting:
            space = length + (fitting & -fitting).bit_length() - 1
            instance = waiting[space].popleft()
            if not waiting[space]:
                spaces ^= 1 << space
        else:
            instance, space, instances = instances, capacity, instances + 1
        instance_of[place] = instance
        if left := space - length:
            waiting[left].append(instance)
            spaces |= 1 << left
    order = by_length[np.argsort(instance_of, kind="stable")]
    bounds = np.concatenate([[0], np.cumsum(np.bincount(instance_of, minlength=instances))])
    return order, bounds.astype(np.int64)


@dataclass(frozen=True)
class PackedIndex:
    """Documents in the order of the instances: 16 bytes per document and 8 per instance.

    Attributes:
        bounds: [instances + 1] int64 into the others.
        files: [documents] int32. starts: [documents] int64, first token in the file. lengths: [documents] int32.
    """

    bounds: NDArray[np.int64]
    files: NDArray[np.int32]
    starts: NDArray[np.int64]
    lengths: NDArray[np.int32]

    FIELDS = ("bounds", "files", "starts", "lengths")


def build_index(files: Sequence[TokenFile], sequence_length: int, eod: int, group_files: int = 1) -> PackedIndex:
    """Packs the documents of each `group_files` consecutive files together.

    Raises:
        DataError: a group without a document.
    """
    parts: list[PackedIndex] = []
    for first in range(0, len(files), group_files):
        group = files[first : first + group_files]
        found = [file.documents(eod) for file in group]
        starts = np.concatenate([own for own, _ in found])
        whole = np.concatenate([own for _, own in found])
        if not starts.size:
            raise DataError(
                f"{group[0].path}: no document that ends with the end-of-document id {eod}; use the tokenizer the file "
                "was made with"
            )
        owners = np.repeat(np.arange(first, first + len(group), dtype=np.int32), [own.size for own, _ in found])
        lengths = np.minimum(whole, sequence_length)
        order, bounds = pack_best_fit(lengths, sequence_length)
        parts.append(PackedIndex(bounds, owners[order], starts[order], lengths[order].astype(np.int32)))
    offsets = np.cumsum([0, *(part.files.size for part in parts)])
    ends = [part.bounds[1:] + offset for part, offset in zip(parts, offsets, strict=False)]
    joined = (np.concatenate([getattr(part, name) for part in parts]) for name in PackedIndex.FIELDS[1:])
    return PackedIndex(np.concatenate([np.zeros(1, dtype=np.int64), *ends]), *joined)


def load_index(
    files: Sequence[TokenFile], sequence_length: int, eod: int, group_files: int, cache: Path | None
) -> PackedIndex:
    """The index from `cache`, made there by the first process that asks; without a cache made in memory."""
    if cache is None:
        return build_index(files, sequence_length, eod, group_files)
    digest = xxhash.xxh3_128(repr((FORMAT, sequence_length, eod, group_files)).encode())
    for file in files:
        changed = file.path.stat().st_mtime_ns  # the fingerprint does not see every byte
        digest.update(repr((file.dtype, file.prefix, fingerprint(file.path, file.dtype)[0], changed)).encode())
    folder = cache / f"packed-{digest.hexdigest()}"
    with one_at_a_time(folder):
        if not folder.is_dir():
            print(f"packing {sum(file.tokens for file in files):,} tokens of {len(files)} files", file=sys.stderr)
            index = build_index(files, sequence_length, eod, group_files)
            temporary = temporary_path(folder)
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            for name in PackedIndex.FIELDS:
                np.save(temporary / f"{name}.npy", getattr(index, name))
            temporary.rename(folder)
    return PackedIndex(*(np.load(folder / f"{name}.npy", mmap_mode="r") for name in PackedIndex.FIELDS))


class PackedInstances:
    """Instances of whole documents, padded with `pad`, which is no label."""

    def __init__(
        self, files: Sequence[TokenFile], index: PackedIndex, sequence_length: int, vocab_size: int, pad: int
    ) -> None:
        self.files, self.index = files, index
        self.sequence_length, self.vocab_size, self.pad = sequence_length, vocab_size, pad

    def __len__(self) -> int:
        return len(self.index.bounds) - 1

    def _documents(self, number: int) -> list[tuple[TokenFile, int, int]]:
        if not 0 <= number < len(self):
            raise IndexError(f"instance {number} of {len(self)}")
        rows = range(int(self.index.bounds[number]), int(self.index.bounds[number + 1]))
        index = self.index
        return [(self.files[index.files[row]], int(index.starts[row]), int(index.lengths[row])) for row in rows]

    def read(self, number: int, documents: bool) -> Instance:
        tokens = np.full(self.sequence_length, self.pad, dtype=np.int64)
        mask = np.zeros(self.sequence_length, dtype=np.bool_)
        lengths, at = [], 0
        for file, start, length in self._documents(number):
            tokens[at : at + length] = file.read(start, start + length, self.vocab_size)
            mask[at : at + length] = True if file.label_mask is None else file.label_mask[start : start + length]
            lengths.append(length)
            at += length
        if at < self.sequence_length:
            lengths.append(self.sequence_length - at)
        return Instance(tokens, mask, np.array(lengths) if documents else None)

    def where(self, number: int) -> str:
        own = self._documents(number)
        file, start, length = own[0]
        return f"{len(own)} documents, the longest: {file.path}, tokens {start} to {start + length}"

    def selection(self) -> str:
        """Of the bounds alone, 8 bytes per instance: which documents lie between them follows from the files, the
        sequence length, the end-of-document id and the size of groups."""
        return hash_of(self.index.bounds)
