"""What the order of training samples of Megatron's GPTDataset follows from, beside the bytes of its files.

Megatron shuffles all epochs that a run needs at once, so more --train-iters can put every sample elsewhere.
"""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from megatron_hybrid.checkpoint.fingerprint import short_names
from megatron_hybrid.tools.indexed_dataset import HEADER, idx_path, read_summary

#: The reader that this is the record of.
DATA_PATH = "--data-path"

#: Keys of the record, and what sets them.
FLAGS = {
    "reader": "--data-path or --instance-data",
    "seed": "--seed",
    "sequence_length": "--seq-length",
    "split": "--split, training's part",
    "weights": "--data-path, datasets and their weights",
    "epochs": "--train-iters, --train-samples: of each dataset its epochs, and whether the last is shuffled apart",
    "phases": "--phase-transition-iterations",
    "document_masking": "--document-masking",
}


def train_blend(args: Namespace) -> tuple[list[str], list[float] | None, tuple[float, float]]:
    """Prefixes of training, their weights, and the part of each dataset that training gets."""
    from megatron.core.datasets.blended_megatron_dataset_config import (
        convert_split_vector_to_split_matrix,
        parse_and_normalize_split,
    )
    from megatron.training.utils import get_blend_and_blend_per_split

    whole, per_split = get_blend_and_blend_per_split(args)
    if per_split:
        prefixes, weights = per_split[0] or ([], None)
        # Megatron takes a single dataset as it is, whatever its weight.
        return list(prefixes), None if len(prefixes) == 1 else weights, (0.0, 1.0)
    prefixes, weights = whole
    parts = convert_split_vector_to_split_matrix(parse_and_normalize_split(args.split))
    return list(prefixes), weights, parts[0] or (0.0, 0.0)


def tokens_in(prefix: str, part: tuple[float, float]) -> int:
    """Tokens of the sequences of a dataset that training gets: Megatron's rounding."""
    sequences = read_summary(prefix).sequences
    first, end = (round(edge * float(sequences)) for edge in part)
    lengths = np.memmap(idx_path(prefix), dtype="<i4", mode="r", offset=HEADER.size, shape=(sequences,))
    return int(np.sum(lengths[first:end], dtype=np.int64))


def tokens_of_training(args: Namespace, share: int, shares: int) -> dict[str, int]:
    """`tokens_in` every `shares`-th dataset of training, beginning with `share`."""
    prefixes, _, part = train_blend(args)
    return {prefix: tokens_in(prefix, part) for prefix in list(dict.fromkeys(prefixes))[share::shares]}


def describe(args: Namespace, tokens: Mapping[str, int]) -> dict[str, Any]:
    """The record of a run on --data-path.

    Args:
        tokens: `tokens_in` each prefix of training.
    """
    from megatron.core.datasets.utils import normalize

    prefixes, weights, part = train_blend(args)
    samples = args.train_samples or (args.train_iters or 0) * args.global_batch_size
    wanted: list[int | None] = [samples]
    if weights is not None:
        weights = normalize(weights)
        surplus = 1 + args.mid_level_dataset_surplus
        wanted = [math.ceil(math.ceil(samples * weight) * surplus) for weight in weights]
    elif len(prefixes) > 1:
        wanted = [None] * len(prefixes)  # one epoch of each, whatever is needed
    return {
        "reader": DATA_PATH,
        "seed": args.seed,
        "sequence_length": args.seq_length,
        "split": [float(edge) for edge in part],
        "prefixes": prefixes,
        "weights": weights and [round(weight, 12) for weight in weights],
        "epochs": None
        if args.phase_transition_iterations
        else [
            list(epochs(count, tokens[prefix], args.seq_length)) for count, prefix in zip(wanted, prefixes, strict=True)
        ],
        "phases": args.phase_transition_iterations,
        "document_masking": args.document_masking,
    }


def epochs(samples: int | None, tokens: int, sequence_length: int) -> tuple[int, bool]:
    """Epochs that Megatron shuffles together for so many samples, and whether the last is shuffled apart from them."""
    if samples is None or not tokens:
        return 1, False
    count = max(1, -(-(samples * sequence_length + 1) // tokens))
    if count == 1:
        return 1, False
    before = ((count - 1) * tokens - 1) // sequence_length
    return count, samples - before < int(0.8 * ((tokens - 1) // sequence_length))


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """Texts 'key (flag): then, now'."""
    if there.get("reader") != here["reader"]:
        return [f"reader ({FLAGS['reader']}): {there.get('reader')} then, {here['reader']} now"]
    before, after = (_with_names(*pair) for pair in _named(there, here))
    return [
        f"{key} ({flag}): {before.get(key)} then, {after.get(key)} now"
        for key, flag in FLAGS.items()
        if before.get(key) != after.get(key)
    ]


def _named(*records: Mapping[str, Any]) -> list[tuple[Mapping[str, Any], list[str]]]:
    """Each record with the names of its datasets: no more of their paths than tells them apart."""
    paths: list[Sequence[str]] = [record.get("prefixes", ()) for record in records]
    names = short_names(*paths)
    return [(record, [own[path] for path in given]) for record, own, given in zip(records, names, paths, strict=True)]


def _with_names(record: Mapping[str, Any], names: list[str]) -> dict[str, Any]:
    weights = record.get("weights")
    return {
        **record,
        "weights": names if weights is None else [list(pair) for pair in zip(names, weights, strict=True)],
    }
