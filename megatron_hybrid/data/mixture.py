"""Ai2's two formats of a data mix: a list of `label,path` lines, and a YAML of sources with ratios.

The arithmetic is OLMo-core's (`source_mixture.py`), floating point included, so that the same files give the same
instances.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_hybrid.data.token_files import DataError

KEYS = {"source_name", "target_ratio", "paths", "max_source_fraction", "max_repetition_ratio"}


@dataclass(frozen=True)
class Source:
    """One source of a mixture. max_source_fraction and max_repetition_ratio cap what may be taken of it."""

    name: str
    ratio: float
    paths: tuple[str, ...]
    max_source_fraction: float = 1.0
    max_repetition_ratio: float = 1.0


@dataclass
class _Take:
    """Tokens to take of one file; a file read twice has two."""

    file: int
    tokens: int
    available: int


def read_list(path: Path, tokenizer: str) -> list[tuple[str, str]]:
    """(label, path) of a list in order; {TOKENIZER} in a path becomes `tokenizer`. Raises DataError with the line."""
    found = []
    for number, line in enumerate(_text(path).splitlines(), 1):
        line = line.strip()
        if line and not line.startswith("#"):
            label, comma, file = line.partition(",")
            if not comma or not file.strip():
                raise DataError(f"{path}: line {number} is {line!r}, not label,path")
            found.append((label.strip(), file.strip().replace("{TOKENIZER}", tokenizer)))
    if not found:
        raise DataError(f"{path}: no label,path lines")
    return found


def read_sources(path: Path) -> tuple[list[Source], int | None]:
    """The sources of a mixture YAML, and its `requested_tokens` if it names any. Raises DataError."""
    import yaml  # type: ignore[import-untyped]

    try:
        content = yaml.safe_load(_text(path))
    except yaml.YAMLError as error:
        raise DataError(f"{path}: not YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(content, dict) or not isinstance(content.get("sources"), list) or not content["sources"]:
        raise DataError(
            f"{path}: needs a list `sources` of source_name, target_ratio and paths; plans of tools.mix are given as "
            "the STAGE.instances.npy that it writes"
        )
    sources = [_source(path, entry) for entry in content["sources"]]
    ratios = float(np.sum([source.ratio for source in sources]))
    if not np.allclose(ratios, 1.0):
        raise DataError(f"{path}: target_ratio adds up to {ratios:.6f}, must be 1")
    requested = content.get("requested_tokens")
    return sources, None if requested is None else int(requested)


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--instance-data {path}: {getattr(error, 'strerror', None) or 'not a text file'}") from None


def _source(path: Path, entry: Any) -> Source:
    if not isinstance(entry, dict) or set(entry) - KEYS or {"source_name", "target_ratio", "paths"} - set(entry):
        raise DataError(
            f"{path}: source {entry!s:.80} must have source_name, target_ratio and paths, and of others only "
            "max_source_fraction, max_repetition_ratio"
        )
    name, paths = str(entry["source_name"]), entry["paths"]
    if not isinstance(paths, list) or not paths or not all(isinstance(one, str) for one in paths):
        raise DataError(f"{path}, {name}: paths must be a list of paths or globs")
    numbers = {}
    for key, least, most in (
        ("target_ratio", 0, 1),
        ("max_source_fraction", 0, 1),
        ("max_repetition_ratio", 1, math.inf),
    ):
        value = entry.get(key, 1.0)
        if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most or value == 0:
            raise DataError(f"{path}, {name}: {key} {value!r} must be a number {'from 1 on' if least else '> 0, <= 1'}")
        numbers[key] = float(value)
    return Source(
        name, numbers["target_ratio"], tuple(paths), numbers["max_source_fraction"], numbers["max_repetition_ratio"]
    )


def plan(
    sources: Sequence[Source],
    tokens: Sequence[Sequence[int]],
    requested_tokens: int,
    sequence_length: int,
    batch: int,
) -> list[tuple[int, int, int]]:
    """How many instances to take of each file: (source, file in it, instances), in order, repeats apart.

    Of each file its first tokens are taken. The instances add up to a whole number of batches, the first that holds
    `requested_tokens`: what rounding leaves over goes one by one to the files with the largest remainders.

    Args:
        tokens: of each source's files.
        batch: global batch size in instances.

    Raises:
        DataError: a source holds less than its share, or all together less than the batches; says by how much.
    """
    takes: list[list[_Take]] = []
    for source, available in zip(sources, tokens, strict=True):
        needed = int(requested_tokens * source.ratio)
        most = int((sum(available) * source.max_source_fraction) * source.max_repetition_ratio)
        if needed > most:
            raise DataError(
                f"source {source.name}: {needed:,} tokens are asked for, {most:,} may be taken ({sum(available):,} "
                f"with max_source_fraction {source.max_source_fraction:g}, max_repetition_ratio "
                f"{source.max_repetition_ratio:g}), {needed - most:,} short: ask for less or raise "
                "max_repetition_ratio"
            )
        takes.append(_takes(available, needed))
    every = [take for own in takes for take in own]
    wanted = math.ceil(requested_tokens / (batch * sequence_length)) * batch
    counts = _round(every, wanted, sequence_length)
    if sum(counts) < wanted:
        raise DataError(
            f"the mixture gives {sum(counts):,} instances of {sequence_length} tokens, {wanted:,} fill the batches of "
            f"{requested_tokens:,} tokens: ask for less, or add data"
        )
    owners = [number for number, own in enumerate(takes) for _ in own]
    return [(owner, take.file, count) for owner, take, count in zip(owners, every, counts, strict=True)]


def _takes(available: Sequence[int], needed: int) -> list[_Take]:
    """The same part of every file; more than all of them is the whole list again, and a part of it."""
    remaining = needed / sum(available)
    parts = [remaining]
    if remaining > 1:
        parts = []
        while remaining > 0:
            parts.append(min(1.0, remaining))
            remaining -= parts[-1]
    return [_Take(file, math.ceil(own * part), own) for part in parts for file, own in enumerate(available)]


def _round(takes: Sequence[_Take], wanted: int, sequence_length: int) -> list[int]:
    """Whole instances of each, no more than its file holds."""
    most = [take.available // sequence_length for take in takes]
    counts = [min(take.tokens // sequence_length, cap) for take, cap in zip(takes, most, strict=True)]
    open_ = [i for i in range(len(takes)) if counts[i] < most[i]]
    remainders = [takes[i].tokens % sequence_length / sequence_length if counts[i] < most[i] else 0.0
                  for i in range(len(takes))]  # fmt: skip
    missing = wanted - sum(counts)
    if missing > 0 and open_:
        each = missing // len(open_)
        for i in open_:
            counts[i] += min(each, most[i] - counts[i])
        missing = wanted - sum(counts)
        candidates = sorted(((remainders[i], i) for i in open_ if counts[i] < most[i]), reverse=True)
        for _, i in candidates[:missing]:
            counts[i] += 1
    return counts
