"""Finds the input files: named files, folders, globs and URLs, in an order that does not depend on the disk."""

import glob
import os
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import PurePosixPath

from megatron_hybrid.tools.cli import ToolError
from megatron_hybrid.tools.corpus.streams import is_remote, remote_filesystem, stored_size

COMPRESSIONS = ("", ".gz", ".zst")
KNOWN_SUFFIXES = tuple(
    f"{kind}{compression}" for kind in (".jsonl", ".json", ".ndjson") for compression in COMPRESSIONS
)
SUFFIXES = (*KNOWN_SUFFIXES, ".parquet")
NAMED = re.compile(r"([A-Za-z0-9][A-Za-z0-9_.-]*)=(.+)", re.DOTALL)
STAT_THREADS = 8  # network file systems answer many at once


@dataclass(frozen=True)
class InputFile:
    """One file: the source it counts for, its size in stored bytes and a stamp that changes with its content."""

    source: str
    path: str
    stored_bytes: int
    stamp: str

    @property
    def is_parquet(self) -> bool:
        return self.path.endswith(".parquet")


def source_name(path: str) -> str:
    """The name of the source `path` stands for: its file name without suffixes, or its last fixed folder."""
    parts = PurePosixPath(path.partition("://")[2] or path).parts
    fixed = [part for part in parts if not glob.has_magic(part)]
    name = fixed[-1] if fixed else "input"
    if len(fixed) == len(parts):
        for suffix in SUFFIXES:
            name = name.removesuffix(suffix)
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip("-.") or "input"


def split_name(argument: str) -> tuple[str, str]:
    """(source name, path) of an --input argument, PATH or NAME=PATH."""
    named = NAMED.fullmatch(argument)
    if named and not os.path.exists(argument):
        return named[1], named[2]
    return source_name(argument), argument


def find_inputs(arguments: Iterable[str]) -> tuple[list[InputFile], int]:
    """(the files of all --input arguments, how many other files their folders hold).

    Arguments keep their order; the files of a folder or glob are sorted by path. Raises ToolError,
    naming the argument, for one that matches nothing and for a file found twice.
    """
    found: list[tuple[str, str]] = []
    ignored = 0
    origin: dict[str, str] = {}
    for argument in arguments:
        name, path = split_name(argument)
        paths, skipped = _expand(path)
        ignored += skipped
        for one in paths:
            key = one if is_remote(one) else os.path.realpath(one)
            if key in origin:
                where = "given twice" if origin[key] == argument else f"also found by --input {origin[key]}"
                raise ToolError(f"--input {one}: {where}; repeat data by its weight at training time instead")
            origin[key] = argument
            found.append((name, one))
    with ThreadPoolExecutor(STAT_THREADS) as pool:
        sizes = list(pool.map(_size, (path for _, path in found)))
    return [InputFile(name, path, *size) for (name, path), size in zip(found, sizes, strict=True)], ignored


def _size(path: str) -> tuple[int, str]:
    try:
        return stored_size(path)
    except OSError as error:
        raise ToolError(f"--input {path}: cannot be read ({error})") from None


def _expand(path: str) -> tuple[list[str], int]:
    if is_remote(path):
        return _expand_remote(path)
    if os.path.isdir(path):
        every = list(_walk(path))
        paths = sorted(one for one in every if one.endswith(SUFFIXES))
        if not paths:
            raise ToolError(f"--input {path}: a folder without {', '.join(SUFFIXES)} files")
        return paths, len(every) - len(paths)
    if os.path.exists(path):
        if not os.path.isfile(path):
            raise ToolError(f"--input {path}: not a file")
        return [path], 0
    if glob.has_magic(path):
        paths = sorted(one for one in glob.glob(path, recursive=True) if os.path.isfile(one))
        if not paths:
            raise ToolError(f"--input {path}: matches no file")
        return paths, 0
    raise ToolError(f"--input {path}: no such file")


def _walk(folder: str) -> Iterator[str]:
    """Every file below `folder` but hidden ones; Dolma's attributes/ are not documents."""
    for where, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if not name.startswith("."):
                yield os.path.join(where, name)


def _expand_remote(url: str) -> tuple[list[str], int]:
    filesystem, inner = remote_filesystem(url)
    scheme = url.partition("://")[0]
    try:
        if glob.has_magic(inner):
            every = sorted(filesystem.glob(inner))
        elif filesystem.isdir(inner):
            every = sorted(filesystem.find(inner))
        elif filesystem.exists(inner):
            return [url], 0
        else:
            every = []
    except Exception as error:  # each driver has its own exceptions
        raise ToolError(f"--input {url}: cannot be listed ({error})") from error
    paths = [f"{scheme}://{one}" for one in every if one.endswith(SUFFIXES)]
    if not paths:
        raise ToolError(f"--input {url}: nothing there that ends in {', '.join(SUFFIXES)}")
    return paths, len(every) - len(paths)
