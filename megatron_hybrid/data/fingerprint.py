"""What data and order a run reads, in a file of its checkpoint folder: it is not continued on other data unnoticed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from megatron_hybrid.data.instances import Instances
from megatron_hybrid.data.order import SampleOrder
from megatron_hybrid.data.token_files import DataError
from megatron_hybrid.tools.atomic_file import atomic_open
from megatron_hybrid.tools.corpus.fingerprint import fingerprint

FILE_NAME = "megatron_hybrid_data.json"
FORMAT = 1

#: What the sample at a position of the first epoch depends on, and what of it is trained on; with what sets it.
BINDING = {
    "sequence_length": "--seq-length",
    "instances": "--instance-data",
    "packing": "--instance-packing",
    "group_files": "--instance-group-files",
    "shuffle": "--instance-shuffle",
    "seed": "--seed, --data-seed",
    "data": "the files of --instance-data",
    "selection": "what --instance-data takes of its files: the index, or the mixture's counts",
    "label_mask": "--instance-label-mask",
    "masks": "the files of --instance-label-mask",
    "repetition_filter": "--repetition-filter",
    "document_masking": "--document-masking",
}


@dataclass(frozen=True)
class Reading:
    """How instances are read, beside which and in which order: flags of the run."""

    sequence_length: int
    packing: str
    group_files: int
    label_mask: str
    repetition_filter: bool
    document_masking: bool


def describe(instances: Instances, order: SampleOrder, reading: Reading) -> dict[str, Any]:
    """What the order of samples follows from. `data` is a hash over the fingerprints of the files, in their order."""
    digest, seen = xxhash.xxh3_128(), {}
    masks = xxhash.xxh3_128()
    for file in instances.files:
        if file not in seen:
            seen[file] = fingerprint(file.path, file.dtype)[0]
            masks.update(fingerprint(file.mask, "|u1")[0].encode() if file.mask else b";")
        digest.update(f"{seen[file]},{file.tokens};".encode())
    return {
        "format": FORMAT,
        "sequence_length": reading.sequence_length,
        "instances": len(instances),
        "packing": reading.packing,
        "group_files": reading.group_files if reading.packing == "best_fit" else None,
        "shuffle": order.shuffle,
        "seed": order.seed,
        "data": digest.hexdigest(),
        "selection": instances.selection(),
        "label_mask": reading.label_mask or None,
        "masks": masks.hexdigest() if reading.label_mask else None,
        "repetition_filter": reading.repetition_filter,
        "document_masking": reading.document_masking,
        "global_batch_size": order.batch,
        "files": len(instances.files),
        "tokens": sum(file.tokens for file in seen),
    }


def differences(folder: Path, description: dict[str, Any], reached: int, say: Callable[[str], None]) -> list[str]:
    """What `folder` records otherwise, as 'key (flag): there, here'; empty where it records nothing.

    Args:
        reached: position of the run, in samples: the size of a batch matters once an epoch has dropped its tail.
        say: for what cannot be compared, since an earlier version wrote the record.

    Raises:
        DataError: the record cannot be read.
    """
    path = folder / FILE_NAME
    try:
        there = json.loads(path.read_bytes())
        if there["format"] != FORMAT:
            return [f"format: {there['format']} there, {FORMAT} here"]
        unknown = [key for key in (*BINDING, "global_batch_size") if key not in there]
        found = [
            f"{key} ({flag}): {there[key]} there, {description[key]} here"
            for key, flag in BINDING.items()
            if key in there and there[key] != description[key]
        ]
        if "global_batch_size" in there:
            found += _other_epochs(there, description, reached)
    except FileNotFoundError:
        say(f"{folder}: has checkpoints and no {FILE_NAME}: whether their data are those of this start is not known")
        return []
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{path}: not a record of data; remove it if you know that the data is the same") from None
    if unknown:
        say(f"{path}: written by an earlier version, without {', '.join(unknown)}: not compared with this start's")
    return found


def _other_epochs(there: dict[str, Any], here: dict[str, Any], reached: int) -> list[str]:
    """Each epoch drops what fills no batch: with another tail than before, the next epoch begins elsewhere."""
    batches = there["global_batch_size"], here["global_batch_size"]
    epochs = [there["instances"] // batch * batch for batch in batches]
    if epochs[0] == epochs[1] or reached <= min(epochs):
        return []
    return [
        f"global_batch_size (--global-batch-size): {batches[0]} there, {batches[1]} here, which makes the epochs of "
        f"{epochs[0]:,} samples, the first of which is over, {epochs[1]:,} long"
    ]


def record(folder: Path, description: dict[str, Any]) -> None:
    """Write the record into a checkpoint folder."""
    with atomic_open(folder / FILE_NAME) as handle:
        handle.write(json.dumps(description, indent=1).encode() + b"\n")
