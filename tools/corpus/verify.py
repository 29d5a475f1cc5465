"""Whether a dataset is whole: header, index, ids, document ends, and the checksums of its manifest."""

import json
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from megatron_hybrid.tools.indexed_dataset import DatasetError, IndexedDatasetReader, bin_path, idx_path

BLOCK_TOKENS = 1 << 18  # checked at a time: 1 MB of int32 stays in the cache of a core


@dataclass(frozen=True)
class Expectations:
    """What the ids must be: below `vocab_size`, `eod_id` at the end of every document; None: not known."""

    vocab_size: int | None = None
    eod_id: int | None = None
    idx_xxh3: str | None = None
    parts: tuple[tuple[int, int, str], ...] = ()  # offset and size in bytes, and hash, of pieces of the .bin


@dataclass(frozen=True)
class Report:
    """What a whole dataset holds, and what was checked."""

    documents: int
    tokens: int
    min_id: int
    max_id: int
    checked: tuple[str, ...]


def find_manifest_entry(prefix: str) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """(manifest, entry of the dataset) from PREFIX.json or manifest.json beside it, if one speaks of `prefix`."""
    name = Path(prefix).name
    for path in (Path(f"{prefix}.json"), Path(prefix).with_name("manifest.json")):
        try:
            content = json.loads(path.read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            continue
        except ValueError:
            raise DatasetError(f"{path}: not JSON, or cut short; restore the manifest or remove it") from None
        for entry in content.get("datasets", []) if isinstance(content, dict) else []:
            if entry["prefix"] == name:
                return content, entry
    return None


def expectations_of(prefix: str, given: Expectations) -> Expectations:
    """`given`, completed by the manifest of `prefix` where there is one."""
    found = find_manifest_entry(prefix)
    if found is None:
        return given
    content, entry = found
    tokenizer = content["tokenizer"]
    eod_id = tokenizer["eod_id"] if content["options"]["append_eod"] else None
    return Expectations(
        given.vocab_size if given.vocab_size is not None else tokenizer["vocab_size"],
        given.eod_id if given.eod_id is not None else eod_id,
        entry["idx"]["xxh3"],
        tuple((part["offset"], part["bytes"], part["xxh3"]) for part in entry["bin"]["parts"]),
    )


def verify_dataset(prefix: str, expected: Expectations) -> Report:
    """Reads all of a dataset; raises DatasetError, in one line that names the file, for the first fault."""
    reader = IndexedDatasetReader(prefix)
    checked = ["header", "index", "size of .bin"]
    if expected.idx_xxh3 is not None:
        checked.append("hash of .idx")
        if _hash_file(idx_path(prefix)) != expected.idx_xxh3:
            raise DatasetError(f"{idx_path(prefix)}: its hash is not that of the manifest; copy or build it again")
    if expected.parts:
        checked.append("hashes of .bin")
        size = sum(part[1] for part in expected.parts)
        found = reader.tokens.nbytes
        if size != found:
            raise DatasetError(
                f"{bin_path(prefix)}: {found} bytes where the manifest says {size}; copy or build it again"
            )
    low, high = _check_tokens(prefix, reader, expected)
    if expected.vocab_size is not None:
        checked.append(f"ids below {expected.vocab_size}")
    if expected.eod_id is not None:
        checked.append(f"end-of-document id {expected.eod_id}")
        _check_ends(prefix, reader, expected.eod_id)
    return Report(reader.summary.documents, reader.summary.tokens, low, high, tuple(checked))


def _hash_file(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with open(path, "rb") as handle:
        while data := handle.read(1 << 20):
            digest.update(data)
    return digest.hexdigest()


def _check_tokens(prefix: str, reader: IndexedDatasetReader, expected: Expectations) -> tuple[int, int]:
    """(smallest, largest id); checks the range of ids and the hashes in one pass over the file."""
    tokens = reader.tokens
    itemsize = tokens.dtype.itemsize
    parts = expected.parts or ((0, tokens.nbytes, ""),)
    low, high = np.iinfo(tokens.dtype).max, np.iinfo(tokens.dtype).min
    limit = expected.vocab_size if expected.vocab_size is not None else np.iinfo(tokens.dtype).max + 1
    with open(bin_path(prefix), "rb", buffering=0) as handle:  # reading is faster than page faults of a map
        buffer = bytearray(BLOCK_TOKENS * itemsize)
        view = memoryview(buffer)
        for offset, size, recorded in parts:
            digest = xxhash.xxh3_128()
            done = 0
            while done < size:
                count = handle.readinto(view[: min(len(buffer), size - done)]) or 0
                if count == 0 or count % itemsize:
                    raise DatasetError(
                        f"{bin_path(prefix)}: ended after {offset + done + count} bytes while it was read"
                    )
                block = np.frombuffer(buffer, tokens.dtype, count // itemsize)
                block_low, block_high = int(block.min()), int(block.max())
                if block_low < 0 or block_high >= limit:
                    at = int(np.argmax((block < 0) | (block >= limit)))
                    first = (offset + done) // itemsize + at
                    document = int(np.searchsorted(reader.pointers, first * itemsize, side="right")) - 1
                    raise DatasetError(
                        f"{bin_path(prefix)}: id {block[at]} at token {first} (document {document}), outside the "
                        f"vocabulary of {limit}; the file is damaged or belongs to another tokenizer"
                    )
                low, high = min(low, block_low), max(high, block_high)
                if recorded:
                    digest.update(view[:count])
                done += count
            if recorded and digest.hexdigest() != recorded:
                raise DatasetError(
                    f"{bin_path(prefix)}: bytes {offset} to {offset + size} do not have the hash of the manifest; copy "
                    "or build it again"
                )
    return low, high


def _check_ends(prefix: str, reader: IndexedDatasetReader, eod_id: int) -> None:
    """Raises DatasetError for the first document that does not end with `eod_id`."""
    itemsize = reader.tokens.dtype.itemsize
    boundaries = reader.document_indices
    step = 1 << 20
    for start in range(1, boundaries.size, step):
        last = boundaries[start : start + step] - 1  # the last sequence of each document
        ends = reader.pointers[last] // itemsize + reader.lengths[last] - 1
        wrong = (reader.lengths[last] == 0) | (reader.tokens[np.maximum(ends, 0)] != eod_id)
        if wrong.any():
            document = start - 1 + int(np.argmax(wrong))
            raise DatasetError(
                f"{bin_path(prefix)}: document {document} does not end with the end-of-document id {eod_id}; it was "
                "built without, or the file is damaged"
            )


def first_different_document(one: str, other: str) -> str | None:
    """None if two datasets hold the same documents (their dtypes may differ), else what differs first."""
    left, right = IndexedDatasetReader(one), IndexedDatasetReader(other)
    common = min(len(left), len(right))
    different = np.flatnonzero(left.lengths[:common] != right.lengths[:common])
    limit = int(different[0]) if different.size else common
    bounds = [*range(0, limit, 1 << 14), limit]
    for start, end in pairwise(bounds):
        first = int(left.pointers[start]) // left.tokens.dtype.itemsize
        last = int(left.pointers[end - 1]) // left.tokens.dtype.itemsize + int(left.lengths[end - 1])
        unequal = left.tokens[first:last] != right.tokens[first:last]
        if unequal.any():
            token = first + int(np.argmax(unequal))
            document = int(np.searchsorted(left.pointers, token * left.tokens.dtype.itemsize, side="right")) - 1
            at = token - int(left.pointers[document]) // left.tokens.dtype.itemsize
            return (
                f"document {document} differs at its token {at}: {left.tokens[token]} in {one}, "
                f"{right.tokens[token]} in {other}"
            )
    if different.size:
        return f"document {limit} has {left.lengths[limit]} tokens in {one}, {right.lengths[limit]} in {other}"
    if len(left) != len(right):
        return f"{one} has {len(left):,} documents, {other} {len(right):,}; the first {common:,} are the same"
    return None
