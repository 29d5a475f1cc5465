"""What data and order a run reads, in a file of its checkpoint folder: it is not continued on other data unnoticed."""

from __future__ import annotations

import json
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

#: What the sample at a position of the first epoch depends on.
BINDING = ("sequence_length", "instances", "packing", "shuffle", "seed", "data")


def describe(instances: Instances, order: SampleOrder, sequence_length: int, packing: str) -> dict[str, Any]:
    """What the order of samples follows from. `data` is a hash over the fingerprints of the files, in their order."""
    digest, seen = xxhash.xxh3_128(), {}
    for file in instances.files:
        if file not in seen:
            seen[file] = fingerprint(file.path, file.dtype)[0]
        digest.update(f"{seen[file]},{file.tokens};".encode())
    return {
        "format": FORMAT,
        "sequence_length": sequence_length,
        "instances": len(instances),
        "packing": packing,
        "shuffle": order.shuffle,
        "seed": order.seed,
        "data": digest.hexdigest(),
        "files": len(instances.files),
        "tokens": sum(file.tokens for file in seen),
    }


def differences(folder: Path, description: dict[str, Any]) -> list[str]:
    """What `folder` records otherwise, as 'key: there, here'; empty where it records nothing.

    Raises:
        DataError: the record cannot be read.
    """
    path = folder / FILE_NAME
    try:
        there = json.loads(path.read_bytes())
        if there["format"] != FORMAT:
            return [f"format: {there['format']} there, {FORMAT} here"]
        return [
            f"{key}: {there[key]} there, {description[key]} here" for key in BINDING if there[key] != description[key]
        ]
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{path}: not a record of data; remove it if you know that the data is the same") from None


def record(folder: Path, description: dict[str, Any]) -> None:
    """Write the record into a checkpoint folder."""
    with atomic_open(folder / FILE_NAME) as handle:
        handle.write(json.dumps(description, indent=1).encode() + b"\n")
