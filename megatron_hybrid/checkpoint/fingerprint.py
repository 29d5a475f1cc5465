"""What a checkpoint says of the software and the data it was made with, and what differs at the next start."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import xxhash

from megatron_hybrid.checkpoint.commit import hash_file
from megatron_hybrid.tools.cli import ToolError
from megatron_hybrid.tools.corpus.verify import find_manifest_entry
from megatron_hybrid.tools.indexed_dataset import bin_path, idx_path, read_summary

_BLOCK_BYTES = 8 << 20

#: {path of a file: {"bytes": size, "xxh3": hash, None where it was not read}}
DataFiles = dict[str, dict[str, Any]]


def differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """One text for each name whose value differs, in order; a name that only one side has counts."""
    return [
        f"{name} {saved.get(name, 'absent')} then, {now.get(name, 'absent')} now"
        for name in sorted(set(saved) | set(now))
        if saved.get(name) != now.get(name)
    ]


def read_data(prefixes: Sequence[str], read_all: bool, share: int = 0, shares: int = 1) -> tuple[DataFiles, list[str]]:
    """Sizes and hashes of the files of `.bin/.idx` datasets, compared with the manifest of `tools.preprocess`.

    Args:
        prefixes: of the datasets.
        read_all: hash every byte; else the index files, and of the others the size only.
        share, shares: every `shares`-th dataset by size, beginning with `share`.

    Returns:
        The files read, and what is wrong, each naming its file.
    """
    by_size = sorted(dict.fromkeys(prefixes), key=lambda prefix: (-_size(bin_path(prefix)), prefix))
    files: DataFiles = {}
    faults: list[str] = []
    for prefix in by_size[share::shares]:
        try:
            read_summary(prefix)
            found = find_manifest_entry(prefix)
            entry = found[1] if found else None
            files[str(idx_path(prefix))] = index = hash_file(idx_path(prefix))
            if entry and entry["idx"]["xxh3"] != index["xxh3"]:
                faults.append(f"{idx_path(prefix)}: its hash is not that of its manifest; copy or build it again")
            parts = [(p["offset"], p["bytes"], p["xxh3"]) for p in entry["bin"]["parts"]] if entry else []
            files[str(bin_path(prefix))] = _read_tokens(bin_path(prefix), parts, read_all, faults)
        except (ToolError, OSError) as error:
            faults.append(str(error))
    return files, faults


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _read_tokens(
    path: Path, parts: Sequence[tuple[int, int, str]], read_all: bool, faults: list[str]
) -> dict[str, Any]:
    """The file's entry; adds a fault for every part that is not what the manifest says."""
    size = path.stat().st_size
    if parts and size != sum(part[1] for part in parts):
        faults.append(f"{path}: {size} bytes where its manifest says {sum(part[1] for part in parts)}")
        return {"bytes": size, "xxh3": None}
    if not read_all:
        return {"bytes": size, "xxh3": None}
    whole = xxhash.xxh3_128()
    buffer = bytearray(_BLOCK_BYTES)
    view = memoryview(buffer)
    with open(path, "rb", buffering=0) as handle:
        for offset, length, recorded in parts or ((0, size, ""),):
            digest, left = xxhash.xxh3_128(), length
            while left and (count := handle.readinto(view[: min(left, _BLOCK_BYTES)])):
                digest.update(view[:count])
                whole.update(view[:count])
                left -= count
            if recorded and digest.hexdigest() != recorded:
                faults.append(
                    f"{path}: bytes {offset} to {offset + length} are not those of its manifest; copy or build it again"
                )
    return {"bytes": size, "xxh3": whole.hexdigest()}


def short_names(*sides: Iterable[str]) -> list[dict[str, str]]:
    """{path: name} of each side: of a path no more of its end than tells it from the others of its side.

    So names are the same where a folder has moved as a whole, and web/text is never taken for code/text. Paths that
    end in one name have names of the same number of parts on all sides.
    """
    groups: dict[str, list[set[str]]] = {}
    for number, paths in enumerate(sides):
        for path in paths:
            groups.setdefault(Path(path).name, [set() for _ in sides])[number].add(path)
    named: list[dict[str, str]] = [{} for _ in sides]
    for own in groups.values():
        parts = 1
        while any(len({_end(path, parts) for path in paths}) < len(paths) for paths in own):
            parts += 1
        for names, paths in zip(named, own, strict=True):
            names.update({path: _end(path, parts) for path in paths})
    return named


def _end(path: str, parts: int) -> str:
    """The last so many parts of a path; of a shorter one all, as it was given."""
    own = Path(path).parts
    return "/".join(own[-parts:]) if parts <= len(own) else path


def changed_data(saved: DataFiles, now: DataFiles) -> list[str]:
    """What differs between the data of a checkpoint and that of this start; a folder may have moved as a whole."""
    names = short_names(saved, now)
    before, after = (
        {own[path]: entry for path, entry in files.items()} for own, files in zip(names, (saved, now), strict=True)
    )
    faults = [f"{name} is not there any more" for name in sorted(set(before) - set(after))]
    faults += [f"{name} is new" for name in sorted(set(after) - set(before))]
    for name in sorted(set(before) & set(after)):
        for key in ("bytes", "xxh3"):
            old, new = before[name][key], after[name][key]
            if old != new and None not in (old, new):
                faults.append(f"{name} has another {'size' if key == 'bytes' else 'content'} ({key} {old} then, {new})")
                break
    return faults
