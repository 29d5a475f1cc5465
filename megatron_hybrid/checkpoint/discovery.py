"""Which checkpoint of a folder to load: the newest complete one, and what was passed over, and why.

The pointer file is never trusted: it may be empty, garbage, point to nothing, or be older than what is complete.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_hybrid.checkpoint import commit
from megatron_hybrid.tools.cli import ToolError
from megatron_hybrid.tools.dcp_reader import TRACKER_FILE

#: The exit status for "there are checkpoints, or should be, and none can be loaded".
EXIT_UNLOADABLE = 3

_FOLDER = re.compile(r"iter_(\d{7,})")


class Unloadable(ToolError):
    """Nothing can be loaded, or what would be loaded is not what was meant; the message is one line."""


@dataclass(frozen=True)
class Candidate:
    """A complete checkpoint. `iteration` is 0 for a folder called `release`."""

    folder: Path
    iteration: int

    @property
    def release(self) -> bool:
        return self.folder.name == "release"


@dataclass(frozen=True)
class Survey:
    """What is in a checkpoint folder: complete checkpoints, newest first, and what was passed over with the reason."""

    root: Path
    complete: tuple[Candidate, ...]
    skipped: tuple[tuple[Path, str], ...]
    pointer: str | None

    @property
    def is_empty(self) -> bool:
        """Whether nothing at all speaks of a checkpoint."""
        return not self.complete and not self.skipped and self.pointer is None


def fault_of(folder: Path) -> str | None:
    """Why a checkpoint folder cannot be loaded, by what can be seen without reading the tensors; None if it can."""
    if not (folder / commit.COMPLETE).exists():
        if (folder / commit.REJECTED).exists():
            return f"rejected earlier: {_reason_in(folder / commit.REJECTED)}"
        if (folder / "metadata.json").exists() and not (folder / commit.MANIFEST).exists():
            return (
                f"no {commit.COMPLETE}: the save was cut short, or something else saved it "
                f"(python -m megatron_hybrid.checkpoint.commit {folder} takes it over)"
            )
        return f"no {commit.COMPLETE}: the save was cut short"
    try:
        marker, manifest = commit.read_json(folder / commit.COMPLETE), commit.read_json(folder / commit.MANIFEST)
        if commit.hash_file(folder / commit.MANIFEST)["xxh3"] != marker.get("manifest_xxh3"):
            return f"{commit.MANIFEST} is not the one that {commit.COMPLETE} speaks of"
        for name, entry in manifest["files"].items():
            path = folder / name
            if Path(name).name != name:
                return f"{commit.MANIFEST} names {name!r}, which is no file of the folder"
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != entry["bytes"]:
                return f"{name} has {path.stat().st_size} bytes, saved were {entry['bytes']}"
    except ToolError as error:
        return str(error)
    except (KeyError, TypeError, AttributeError):
        return f"{commit.MANIFEST} is damaged"
    return None


def _reason_in(path: Path) -> str:
    try:
        return str(commit.read_json(path).get("reason", "no reason given"))
    except ToolError as error:
        return str(error)


def survey(root: Path) -> Survey:
    """Look at every checkpoint in `root`; a root that does not exist is empty.

    Raises:
        Unloadable: `root` is not a folder.
    """
    if root.exists() and not root.is_dir():
        raise Unloadable(f"{root}: not a folder; give a folder of checkpoints")
    found: list[tuple[int, Path]] = []
    for path in root.iterdir() if root.exists() else ():
        if match := _FOLDER.fullmatch(path.name):
            found.append((int(match[1]), path))
        elif path.name == "release":
            found.append((0, path))
    complete, skipped = [], []
    for iteration, folder in sorted(found, reverse=True):
        if fault := fault_of(folder):
            skipped.append((folder, fault))
        else:
            complete.append(Candidate(folder, iteration))
    pointer = root / TRACKER_FILE
    text = pointer.read_text(errors="replace").strip() if pointer.is_file() else None
    return Survey(root, tuple(complete), tuple(skipped), text)


def describe_choice(found: Survey, chosen: Candidate) -> list[str]:
    """Lines for the log: what was passed over on the way to `chosen`, and what is wrong with the pointer."""
    lines = [f"skipped {folder}: {reason}" for folder, reason in found.skipped if _number(folder) > chosen.iteration]
    wanted = "release" if chosen.release else str(chosen.iteration)
    if found.pointer is None:
        lines.append(f"{found.root / TRACKER_FILE}: missing; loading iteration {wanted}, the newest complete one")
    elif found.pointer != wanted and _as_number(found.pointer) != chosen.iteration:
        said = repr(found.pointer[:40]) if found.pointer else "nothing"
        lines.append(
            f"{found.root / TRACKER_FILE}: says {said}; loading iteration {wanted}, the newest complete one "
            "(--ckpt-step N with another --save folder goes back to an older one)"
        )
    return lines


def _number(folder: Path) -> int:
    match = _FOLDER.fullmatch(folder.name)
    return int(match[1]) if match else 0


def _as_number(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdigit() else None


def nothing_usable(flag: str, found: Survey, next_step: str) -> Unloadable:
    """The one-line refusal of a folder without a loadable checkpoint."""
    what = "; ".join(f"{folder.name}: {reason}" for folder, reason in found.skipped[:3])
    if len(found.skipped) > 3:
        what += f"; and {len(found.skipped) - 3} more"
    if not what:
        exists = "no checkpoint in it" if found.root.is_dir() else "no such folder"
        what = exists if found.pointer is None else f"{TRACKER_FILE} says {found.pointer[:40]!r}, but {exists}"
    return Unloadable(f"{flag} {found.root}: nothing to load ({what}); {next_step}")


def pick(found: Survey, iteration: int | None) -> Candidate | None:
    """The newest complete checkpoint, or that of `iteration`; None if there is none.

    Raises:
        Unloadable: `iteration` is given and not complete.
    """
    if iteration is None:
        return found.complete[0] if found.complete else None
    for candidate in found.complete:
        if candidate.iteration == iteration and not candidate.release:
            return candidate
    why = next((reason for folder, reason in found.skipped if _number(folder) == iteration), "no such folder")
    raise Unloadable(f"--ckpt-step {iteration}: {found.root}: {why}; {_complete_list(found.complete)}")


def _complete_list(complete: Sequence[Candidate]) -> str:
    if not complete:
        return "no iteration is complete there"
    return f"complete there: {', '.join(str(candidate.iteration) for candidate in complete[:6])}"


def damaged_files(folder: Path, share: int = 0, shares: int = 1) -> list[str]:
    """Read a checkpoint and compare it with its manifest; every `shares`-th file by size, beginning with `share`.

    Returns:
        What is wrong, each naming its file.
    """
    manifest = commit.read_json(folder / commit.MANIFEST)
    by_size = sorted(manifest["files"].items(), key=lambda item: (-item[1]["bytes"], item[0]))
    faults = []
    for name, entry in by_size[share::shares]:
        try:
            found = commit.hash_file(folder / name)
        except OSError as error:
            faults.append(f"{folder / name}: cannot be read ({error.strerror})")
            continue
        if found != entry:
            faults.append(f"{folder / name}: hash {found['xxh3']}, saved with {entry['xxh3']}; the file is damaged")
    return faults
