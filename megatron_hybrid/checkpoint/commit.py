"""Two-phase commit of one checkpoint folder: after a crash at any moment it is whole, or known not to be.

    data files ──▶ hashes_RANK.json ──▶ manifest.json ──▶ COMPLETE ──▶ latest_checkpointed_iteration.txt
    (each rank)     (each rank)          (rank 0, and the rest too: each step is on disk before the next begins)

A folder without COMPLETE is no checkpoint, whatever else is in it. Removing one goes the other way round: COMPLETE
goes first. Hashes are xxh3-128: against damage, not against somebody who wants to deceive.

    python -m megatron_hybrid.checkpoint.commit FOLDER...    # adopt a checkpoint that something else saved
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import xxhash

from megatron_hybrid.tools.atomic_file import atomic_open, fsync_folder
from megatron_hybrid.tools.cli import Parser, ToolError, run_cli
from megatron_hybrid.tools.dcp_reader import TRACKER_FILE, require_complete

MANIFEST = "manifest.json"
COMPLETE = "COMPLETE"
REJECTED = "REJECTED"
FORMAT = 1
_BLOCK_BYTES = 8 << 20


def hash_file(path: Path) -> dict[str, Any]:
    """{"bytes": size, "xxh3": hash} of a file, read once."""
    digest, size = xxhash.xxh3_128(), 0
    buffer = bytearray(_BLOCK_BYTES)
    view = memoryview(buffer)
    with open(path, "rb", buffering=0) as handle:
        while count := handle.readinto(view):
            digest.update(view[:count])
            size += count
    return {"bytes": size, "xxh3": digest.hexdigest()}


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """A JSON file that appears whole, on disk, or not at all."""
    with atomic_open(path) as handle:
        handle.write((json.dumps(content, indent=1) + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; ToolError, naming the file, if it is anything else."""
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ToolError(f"{path}: missing") from None
    except ValueError:
        raise ToolError(f"{path}: not JSON, or cut short") from None
    if not isinstance(content, dict):
        raise ToolError(f"{path}: not a JSON object")
    return content


def start(folder: Path) -> None:
    """Before anything is saved into `folder`: make it empty, since what a killed save left must not be mixed in.

    Raises:
        ToolError: the folder is a complete checkpoint, which is never overwritten.
    """
    if (folder / COMPLETE).exists():
        raise ToolError(
            f"{folder}: is a complete checkpoint already; it is not overwritten, give another --save folder"
        )
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    fsync_folder(folder.parent)


def hash_own_files(folder: Path, rank: int) -> None:
    """Second step, on every rank: hash what this rank wrote, `__RANK_*.distcp`, and leave the list in the folder."""
    own = {path.name: hash_file(path) for path in sorted(folder.glob(f"__{rank}_*"))}
    write_json(folder / f"hashes_{rank:05d}.json", own)


def finish(folder: Path, iteration: int, description: Mapping[str, Any]) -> dict[str, Any]:
    """Third and fourth step, on one rank after all have done the second: the manifest, then COMPLETE.

    Args:
        description: what the manifest says beside the files (software, layout, data); plain JSON.

    Returns:
        The manifest.

    Raises:
        ToolError: a data file that no rank has hashed.
    """
    lists = sorted(folder.glob("hashes_*.json"))
    files = {name: entry for path in lists for name, entry in read_json(path).items()}
    for path in sorted(folder.iterdir()):
        if path.is_file() and path not in lists and path.name not in files:
            if path.suffix == ".distcp":
                raise ToolError(f"{path}: no rank has hashed it; the save is not complete")
            _to_disk(path)
            files[path.name] = hash_file(path)
    manifest = {"format": FORMAT, "iteration": iteration, **description, "files": files}
    for path in lists:
        path.unlink()
    write_json(folder / MANIFEST, manifest)
    write_json(folder / COMPLETE, {"iteration": iteration, "manifest_xxh3": hash_file(folder / MANIFEST)["xxh3"]})
    return manifest


def _to_disk(path: Path) -> None:
    """Megatron flushes its tensors' files itself, its small files not."""
    with open(path, "rb") as handle:
        os.fsync(handle.fileno())


@contextlib.contextmanager
def open_pointer(path: Path) -> Iterator[IO[str]]:
    """Last step: what is written replaces the pointer file at once, or not at all.

    Raises:
        ToolError: it would point to an iteration that is not complete.
    """
    import io

    text = io.StringIO()
    yield text
    name = text.getvalue().strip()
    folder = path.with_name(name if name == "release" else f"iter_{int(name):07d}")
    if not (folder / COMPLETE).is_file():
        raise ToolError(f"{path}: not set to {name}: {folder} has no {COMPLETE}")
    with atomic_open(path) as handle:
        handle.write(name.encode())


def point_to(root: Path, iteration: int) -> None:
    """Set the pointer of `root` to a complete iteration."""
    with open_pointer(root / TRACKER_FILE) as handle:
        handle.write(str(iteration))


def retract(folder: Path) -> None:
    """First step of removing a checkpoint: from here on it is none."""
    (folder / COMPLETE).unlink(missing_ok=True)
    fsync_folder(folder)


def reject(folder: Path, reason: str) -> None:
    """Keep a damaged checkpoint for whoever wants to look at it, and no longer as a checkpoint."""
    write_json(folder / REJECTED, {"reason": reason})
    retract(folder)


def adopt(
    folder: Path, description: Mapping[str, Any] | None = None, hashes: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Commit a torch_dist folder that something else saved: hash what is there and take it for right.

    Args:
        description: as in `finish`, where it is known.
        hashes: `hash_file` of each `.distcp` by name, from whoever wrote it; None to read them all.

    Raises:
        ToolError: it is no finished torch_dist save, or is complete already.
    """
    require_complete(folder)
    if (folder / COMPLETE).exists():
        raise ToolError(f"{folder}: is committed already")
    (folder / REJECTED).unlink(missing_ok=True)
    digits = folder.name.removeprefix("iter_")
    if folder.name != "release" and not (digits.isascii() and digits.isdigit()):
        raise ToolError(f"{folder}: name is neither iter_NNNNNNN nor release; Megatron would not find it")
    for path in sorted(folder.glob("*.distcp")):
        _to_disk(path)
    if hashes is None:
        hashes = {path.name: hash_file(path) for path in sorted(folder.glob("*.distcp"))}
    write_json(folder / "hashes_00000.json", hashes)
    return finish(folder, 0 if folder.name == "release" else int(digits), {**(description or {}), "adopted": True})


def main() -> None:
    parser = Parser(
        prog="python -m megatron_hybrid.checkpoint.commit",
        description="Hash and mark complete checkpoints that something else than this project saved, so that "
        "megatron_hybrid.pretrain loads them.",
    )
    parser.add_argument("folder", nargs="+", type=Path, help="iter_NNNNNNN folders")
    for folder in parser.parse_args().folder:
        manifest = adopt(folder)
        size = sum(entry["bytes"] for entry in manifest["files"].values())
        print(f"{folder}: complete, {len(manifest['files'])} files, {size / 1e9:.3f} GB")


if __name__ == "__main__":
    run_cli(main)
