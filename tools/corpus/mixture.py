"""Plans what a training run reads of each source: samples, epochs, what is left over, and what cannot be given."""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_hybrid.tools.cli import ToolError
from megatron_hybrid.tools.corpus.finish import MAX_PREFIXES
from megatron_hybrid.tools.indexed_dataset import read_summary

SURPLUS = 0.005  # Megatron's mid_level_dataset_surplus: it builds so many more samples than it needs
MAX_DOCUMENTS = 2**31
RATIO_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Dataset:
    """One prefix: what its manifest, or its index where there is none, says of it."""

    prefix: str
    source: str
    tokens: int
    documents: int
    sequences: int
    dtype: str
    vocab_size: int | None = None


@dataclass
class Part:
    """A source, or one quality bucket of it: `factor` says how often it is read relative to its siblings."""

    name: str
    datasets: list[Dataset]
    factor: float = 1.0

    @property
    def tokens(self) -> int:
        return sum(dataset.tokens for dataset in self.datasets)


@dataclass
class SourcePlan:
    """What a mix file asks of one source in one stage."""

    name: str
    parts: list[Part]
    tokens: int | None = None
    ratio: float | None = None
    max_epochs: float = 1.0


@dataclass
class Stage:
    """One stage of training: so many tokens of so many sources."""

    name: str
    tokens: int | None
    sources: list[SourcePlan]


@dataclass
class Row:
    """The result for one part: samples drawn in this stage, and epochs in it and since the first stage."""

    stage: str
    source: str
    part: str
    samples: int
    tokens: int
    available: int
    epochs: float
    epochs_so_far: float
    left_over: int
    per_prefix: dict[str, int] = field(default_factory=dict)


def load_datasets(paths: Sequence[str]) -> dict[str, list[Dataset]]:
    """Datasets by source, of folders that preprocess made (their manifest) and of bare prefixes (their index)."""
    found: dict[str, list[Dataset]] = {}
    for path in paths:
        folder = Path(path)
        if (folder / "manifest.json").is_file():
            datasets = _from_manifest(folder / "manifest.json", folder)
        elif Path(f"{path}.json").is_file() and "datasets" in (
            content := json.loads(Path(f"{path}.json").read_bytes())
        ):
            datasets = _entries(content, folder.parent, Path(path).name)
        else:
            datasets = [dataset_of_prefix(path, folder.name)]
        for dataset in datasets:
            found.setdefault(dataset.source, []).append(dataset)
    return found


def dataset_of_prefix(prefix: str, source: str) -> Dataset:
    """A dataset without a manifest, from the header of its index."""
    summary = read_summary(prefix)
    return Dataset(prefix, source, summary.tokens, summary.documents, summary.sequences, summary.dtype)


def _from_manifest(path: Path, folder: Path) -> list[Dataset]:
    try:
        return _entries(json.loads(path.read_bytes()), folder, None)
    except (ValueError, KeyError, TypeError):
        raise ToolError(f"{path}: not a manifest of preprocess; finish the run that writes it") from None


def _entries(content: dict[str, Any], folder: Path, name: str | None) -> list[Dataset]:
    vocab_size = content["tokenizer"]["vocab_size"]
    return [
        Dataset(
            str(folder / entry["prefix"]),
            entry["source"] or entry["prefix"],
            entry["tokens"],
            entry["documents"],
            entry["documents"],
            entry["dtype"],
            vocab_size,
        )
        for entry in content["datasets"]
        if name is None or entry["prefix"] == name
    ]


def apportion(total: int, weights: Sequence[float]) -> list[int]:
    """Whole numbers that add up to `total`, each within 1 of its share: the largest remainders are rounded up."""
    whole = sum(weights)
    shares = [total * weight / whole for weight in weights]
    result = [math.floor(share) for share in shares]
    order = sorted(range(len(shares)), key=lambda index: (result[index] - shares[index], index))
    for index in order[: total - sum(result)]:
        result[index] += 1
    return result


def plan_mix(stages: Sequence[Stage], sequence_length: int) -> list[Row]:
    """Samples of every part of every source; raises ToolError, saying by how much, for what the data cannot give.

    Epochs count from the first stage on, so a cap holds for the whole training.
    """
    rows: list[Row] = []
    used: dict[str, int] = {}
    for stage in stages:
        targets = _targets(stage)
        samples = apportion(round(sum(targets)) // sequence_length, targets)
        for source, wanted in zip(stage.sources, samples, strict=True):
            rows += _plan_source(stage, source, wanted, sequence_length, used)
    return rows


def _targets(stage: Stage) -> list[float]:
    """Tokens of each source of a stage: those named, and the shares of what is left."""
    named = sum(source.tokens or 0 for source in stage.sources)
    shared = [source.ratio for source in stage.sources if source.ratio is not None]
    if any((source.tokens is None) == (source.ratio is None) for source in stage.sources):
        wrong = next(source for source in stage.sources if (source.tokens is None) == (source.ratio is None))
        raise ToolError(f"stage {stage.name}, source {wrong.name}: give either tokens or ratio")
    if not shared:
        if stage.tokens is not None and stage.tokens != named:
            raise ToolError(
                f"stage {stage.name}: its sources add up to {named:,} tokens, its total is {stage.tokens:,}: they "
                f"differ by {abs(named - stage.tokens):,}; correct one, or give one source a ratio"
            )
        return [float(source.tokens or 0) for source in stage.sources]
    if stage.tokens is None:
        raise ToolError(f"stage {stage.name}: sources with a ratio need a total; give the stage tokens")
    if abs(sum(shared) - 1) > RATIO_TOLERANCE:
        raise ToolError(
            f"stage {stage.name}: the ratios add up to {sum(shared):.6f}, not 1; they share what the sources with "
            "tokens leave"
        )
    rest = stage.tokens - named
    if rest < 0:
        raise ToolError(
            f"stage {stage.name}: its sources with tokens take {-rest:,} more than its {stage.tokens:,} tokens"
        )
    return [
        float(source.tokens) if source.tokens is not None else rest * (source.ratio or 0) for source in stage.sources
    ]


def _plan_source(
    stage: Stage, source: SourcePlan, samples: int, sequence_length: int, used: dict[str, int]
) -> list[Row]:
    """The rows of one source: its samples shared among buckets by factor times size, then among prefixes by size."""
    rows = []
    weights = [part.factor * part.tokens for part in source.parts]
    if not sum(weights):
        raise ToolError(f"stage {stage.name}, source {source.name}: holds no tokens")
    for part, count in zip(source.parts, apportion(samples, weights), strict=True):
        tokens = count * sequence_length
        total = used.get(part.name, 0) + tokens
        used[part.name] = total
        if total > source.max_epochs * part.tokens:
            raise ToolError(
                f"stage {stage.name}, source {part.name}: {total:,} tokens asked for, "
                f"{total / max(part.tokens, 1):.3f} epochs of its {part.tokens:,}; max_epochs {source.max_epochs:g} "
                f"allows {int(source.max_epochs * part.tokens):,}: "
                f"{math.ceil(total - source.max_epochs * part.tokens):,} too many. "
                "Ask for less, add data, or raise max_epochs"
            )
        shares = apportion(count, [dataset.tokens for dataset in part.datasets])
        rows.append(
            Row(
                stage.name, source.name, part.name, count, tokens, part.tokens,
                tokens / part.tokens, total / part.tokens, max(0, part.tokens - total),
                {dataset.prefix: share for dataset, share in zip(part.datasets, shares, strict=True)},
            )
        )  # fmt: skip
    return rows


def warnings_of(rows: Sequence[Row], datasets: dict[str, Dataset], sequence_length: int) -> list[str]:
    """What Megatron will do with such a mix that its user may not expect."""
    found = []
    by_stage: dict[str, list[Row]] = {}
    for row in rows:
        by_stage.setdefault(row.stage, []).append(row)
    for stage, own in by_stage.items():
        counts = {prefix: count for row in own for prefix, count in row.per_prefix.items() if count}
        if len(counts) > MAX_PREFIXES:
            found.append(
                f"stage {stage}: {len(counts):,} prefixes; building the blend takes time in proportion, keep to "
                f"{MAX_PREFIXES}: join them with inspect_data merge"
            )
        for prefix, count in counts.items():
            tokens = datasets[prefix].tokens
            needed = -(-count * sequence_length // tokens)
            built = -(-(math.ceil(count * (1 + SURPLUS)) * sequence_length + 1) // tokens)
            if built > needed:
                found.append(
                    f"stage {stage}, {prefix}: {count * sequence_length / tokens:.4f} epochs are planned, and with its "
                    f"surplus of {SURPLUS:.1%} Megatron builds an index of {built} epochs, so documents may be read "
                    f"again: plan at most {needed / (1 + SURPLUS):.4f} epochs"
                )
    for dataset in datasets.values():
        if dataset.documents >= MAX_DOCUMENTS:
            found.append(f"{dataset.prefix}: {dataset.documents:,} documents; Megatron's ids end at {MAX_DOCUMENTS:,}")
        if dataset.vocab_size is not None and 65500 <= dataset.vocab_size <= 65536:
            found.append(f"{dataset.prefix}: a vocabulary of {dataset.vocab_size:,} is read two ways by Megatron")
    return found


def blend_of(rows: Sequence[Row]) -> list[str]:
    """Weights and prefixes, as in --data-path: the weights are samples."""
    words = []
    for row in rows:
        for prefix, count in row.per_prefix.items():
            if count:
                words += [str(count), prefix]
    return words


def instance_blocks(
    counts: Sequence[int], block: int = 1 << 22
) -> Iterator[tuple[NDArray[np.int16], NDArray[np.int64]]]:
    """The order of samples of a stage, block by block: (number of the dataset, number of the sample in it).

    Sample k of a dataset with n of the N samples belongs at (k + 1/2) N / n; samples are sorted by that
    place. So in any prefix of training every dataset is within one sample of its share, but for the
    ties of others. Memory is that of a block, whatever N is.
    """
    total = sum(counts)
    start, taken = 0.0, [0] * len(counts)
    while sum(taken) < total:
        end = min(start + block, float(total))
        places, numbers, samples = [], [], []
        for number, count in enumerate(counts):
            last = count if end >= total else min(count, math.ceil(end * count / total - 0.5))
            own = np.arange(taken[number], max(last, taken[number]), dtype=np.int64)
            places.append((own + 0.5) * (total / count) if count else own.astype(np.float64))
            numbers.append(np.full(own.size, number, dtype=np.int16))
            samples.append(own)
            taken[number] += own.size
        order = np.lexsort((np.concatenate(numbers), np.concatenate(places)))
        yield np.concatenate(numbers)[order], np.concatenate(samples)[order]
        start = end
