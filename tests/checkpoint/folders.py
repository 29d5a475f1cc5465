"""Checkpoint folders without tensors, for the rules that only look at files."""

from __future__ import annotations

from pathlib import Path

from megatron_hybrid.checkpoint import commit


def save(root: Path, iteration: int, pointer: bool = True) -> Path:
    """A committed folder of two ranks."""
    folder = root / f"iter_{iteration:07d}"
    commit.start(folder)
    for rank in (0, 1):
        (folder / f"__{rank}_0.distcp").write_bytes(bytes([iteration, rank]) * 5000)
    for name in (".metadata", "metadata.json"):
        (folder / name).write_text("{}")
    for rank in (0, 1):
        commit.hash_own_files(folder, rank)
    commit.finish(folder, iteration, {})
    if pointer:
        commit.point_to(root, iteration)
    return folder
