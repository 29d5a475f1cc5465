"""The folder a conversion makes: written under another name, renamed when it is complete, never half there."""

from __future__ import annotations

import argparse
import errno
import importlib.metadata
import json
import os
import platform
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_hybrid import __version__
from megatron_hybrid.tools.atomic_file import fsync_folder
from megatron_hybrid.tools.cli import ToolError

RECORD_FILE = "conversion.json"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
SIZE_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@contextmanager
def new_folder(output: Path, needed_bytes: int, force: bool, sources: Sequence[Path]) -> Iterator[Path]:
    """Yields the folder to write into, beside `output`; it gets `output`'s name when the block succeeds.

    Args:
        output: absolute path of the folder to make.
        needed_bytes: what the disk must have free.
        force: replace an earlier conversion there.
        sources: what is read, which must not be replaced or written into.

    Raises:
        ToolError: something is in the way, or the disk is too small. If the block raises, nothing is left that was
            not there before.
    """
    check_apart(output, sources)
    with _faults_of(output):
        check_output(output, force)
        working = make_working_folder(output, needed_bytes)
        try:
            # First of all, so that a folder left by a killed run is known to be ours.
            write_json(working / RECORD_FILE, {"status": "incomplete"})
            yield working
            publish(working, output)
        except BaseException:
            shutil.rmtree(working, ignore_errors=True)
            raise


@contextmanager
def _faults_of(output: Path) -> Iterator[None]:
    """Makes an OSError of the output's disk a ToolError that names the flag; that of a source stays as it is."""
    try:
        yield
    except OSError as error:
        place = Path(os.fsdecode(error.filename)) if error.filename else None
        ours = (output, beside(output, ".tmp"), beside(output, ".replaced"))
        if place and not any(path == place or path in place.parents or place in path.parents for path in ours):
            raise
        if not place and error.errno not in _FULL:  # a failed write names no file
            raise
        where = f" at {place}" if place else ""
        raise ToolError(
            f"--output {output}: {error.strerror}{where}; give a folder on a disk that can be written to and has room"
        ) from None


def check_apart(output: Path, sources: Sequence[Path]) -> None:
    """Raises ToolError when `output` holds a source or lies in one."""
    target = output.resolve()
    for source in (source.resolve() for source in sources):
        if target == source or target in source.parents:
            raise ToolError(f"--output {output}: a source is in it, {source}; give another folder")
        if source in target.parents:
            raise ToolError(f"--output {output}: it lies in a source, {source}; give another folder")


def check_output(output: Path, force: bool) -> None:
    """Raises ToolError when something is in the way of `output` or of the names used while it is written."""
    if output.is_symlink():
        raise ToolError(f"--output {output}: it is a symbolic link; give the folder itself")
    for path in (output, *output.parents):
        if path.exists() and not path.is_dir():
            raise ToolError(f"--output {output}: {'it' if path == output else path} is a file; give a folder")
    if output.is_dir() and any(output.iterdir()):
        if not force:
            raise ToolError(f"--output {output}: it is not empty; give another folder, or --force to replace it")
        if not is_model_folder(output):
            raise ToolError(
                f"--output {output}: --force replaces earlier conversions only, and it holds no config.json or "
                f"{RECORD_FILE}; remove it yourself or give another folder"
            )
        if trained := iterations_of_a_run(output):
            raise ToolError(
                f"--output {output}: a training run has saved {trained[0]} in it since it was converted; "
                "--force does not remove that; give another folder"
            )
    for leftover in (beside(output, ".tmp"), beside(output, ".replaced")):
        if leftover.exists() and not (leftover.is_dir() and is_model_folder(leftover)):
            raise ToolError(f"{leftover}: it is in the way and is not from an earlier conversion; move it")


def iterations_of_a_run(output: Path) -> list[str]:
    """Iteration folders in a converted checkpoint that the conversion has not made."""
    try:
        made = json.loads((output / RECORD_FILE).read_text()).get("folder")
    except (OSError, ValueError, AttributeError):
        made = None
    return sorted(path.name for path in output.glob("iter_*") if path.name != made)


def make_working_folder(output: Path, needed_bytes: int) -> Path:
    """Makes the empty folder `output`.tmp on a disk with `needed_bytes` free; one that was left over is removed."""
    working = beside(output, ".tmp")
    if working.exists():
        shutil.rmtree(working)
    output.parent.mkdir(parents=True, exist_ok=True)
    free_bytes = shutil.disk_usage(output.parent).free
    if free_bytes < needed_bytes:
        raise ToolError(
            f"--output {output}: {needed_bytes / 1e9:.1f} GB are needed, {free_bytes / 1e9:.1f} GB are free there"
        )
    working.mkdir()
    return working


def beside(output: Path, suffix: str) -> Path:
    """The folder next to `output` whose name has `suffix` after it."""
    return output.with_name(output.name + suffix)


def is_model_folder(folder: Path) -> bool:
    """Whether a folder holds a model or an unfinished conversion, or is empty, and so may be replaced."""
    return (folder / "config.json").is_file() or (folder / RECORD_FILE).is_file() or not any(folder.iterdir())


def publish(working: Path, output: Path) -> None:
    """Gives the finished folder its name. An earlier one is moved aside first, and back if that fails."""
    replaced = beside(output, ".replaced")
    if output.exists():
        if replaced.exists():
            shutil.rmtree(replaced)
        output.rename(replaced)
    try:
        working.rename(output)
    except OSError:
        if replaced.exists():
            replaced.rename(output)
        raise
    if replaced.exists():
        shutil.rmtree(replaced)
    fsync_folder(output.parent)


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Writes readable JSON with a final newline."""
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path, what_to_do: str) -> dict[str, Any]:
    """The object in a JSON file; ToolError, which ends with `what_to_do`, if it is missing or holds something else."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ToolError(f"{path}: missing; {what_to_do}") from None
    except ValueError as error:
        raise ToolError(f"{path}: not JSON ({error}); {what_to_do}") from None
    if not isinstance(values, dict):
        raise ToolError(f"{path}: a JSON object was expected, but it holds a {type(values).__name__}; {what_to_do}")
    return values


def record(direction: str, source: Path, **more: Any) -> dict[str, Any]:
    """The content of conversion.json. It holds no time, so a repeated conversion gives the same folder."""
    packages = ("torch", "safetensors", "transformers", "tokenizers", "sentencepiece")
    versions = {
        "megatron_hybrid": __version__,
        "python": platform.python_version(),
        **{package: importlib.metadata.version(package) for package in packages},
    }
    common = {"status": "complete", "format": 1, "direction": direction, "source": str(source.resolve())}
    return {**common, "versions": versions, **more}


def memory_line() -> str:
    """The most host memory this process has held, in words."""
    import resource

    return f"peak host memory: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9:.2f} GB"


def parse_size(text: str) -> int:
    """Bytes in a size such as 5GB (10^9), 512MiB (2^20) or 1000000; for argparse."""
    found = re.fullmatch(r"(\d+)\s*([A-Za-z]*)", text.strip())
    if found is None or found[2].upper() not in SIZE_UNITS or int(found[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; legal: a number above 0 with KB, MB, GB, KiB, MiB, GiB")
    return int(found[1]) * SIZE_UNITS[found[2].upper()]
