"""The plan of a run: which bytes of which files make which work shard. It fixes the output, byte for byte.

A plan depends on the inputs (path, size, stamp), the tokenizer and the options that change tokens, and on
nothing else: not on workers, hosts, speed or the order of files on disk.
"""

import hashlib
import itertools
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_hybrid.tools.atomic_file import atomic_open
from megatron_hybrid.tools.cli import ToolError
from megatron_hybrid.tools.corpus.frames import find_cuts
from megatron_hybrid.tools.corpus.inputs import InputFile
from megatron_hybrid.tools.corpus.streams import (
    GZIP_MAGIC,
    ZSTD_MAGIC,
    decompression_errors,
    is_compressed_name,
    open_input,
    read_at,
    read_chunks,
)
from megatron_hybrid.tools.corpus.tokenizer_file import TokenizerFile

PLAN_VERSION = 2  # raised whenever the same inputs would make other bytes
PLAN_NAME = "plan.json"
MIN_SHARD_BYTES = 1 << 10
SAMPLED_FILES = 4  # files of a source opened to estimate how far it inflates
SAMPLED_BYTES = 512 << 10  # stored bytes read of each
PARQUET_INFLATION = 3.0  # where the footer is not read; it is for files larger than a shard


@dataclass(frozen=True)
class Options:
    """What changes the tokens, beside inputs and tokenizer."""

    text_key: str = "text"
    append_eod: bool = False
    special_tokens: str = "text"
    metadata_keys: tuple[str, ...] = ()
    salvage_truncated: bool = False
    shard_bytes: int = 2 << 30


@dataclass(frozen=True)
class Segment:
    """Part of one file. Plain JSONL: the lines that start in bytes [start, end). Parquet: row groups
    [start, end). Compressed files: the frames that start in stored bytes [start, end). `end` None: to the end."""

    file: int
    start: int = 0
    end: int | None = None


@dataclass(frozen=True)
class WorkShard:
    """The unit of work: segments of one source, in order. `estimated_bytes` are of uncompressed input."""

    index: int
    source: str
    segments: tuple[Segment, ...]
    estimated_bytes: int

    @property
    def name(self) -> str:
        return f"s{self.index:06d}"


@dataclass(frozen=True)
class Plan:
    """Everything a worker needs to know. `fingerprint` names it: equal fingerprints, equal bytes."""

    files: tuple[InputFile, ...]
    shards: tuple[WorkShard, ...]
    options: Options
    tokenizer: dict[str, Any]
    fingerprint: str

    @property
    def sources(self) -> list[str]:
        """Source names, in the order of the files."""
        return list(dict.fromkeys(file.source for file in self.files))


def make_plan(files: list[InputFile], tokenizer: TokenizerFile, options: Options) -> Plan:
    """Cuts the files into work shards of about `options.shard_bytes`, never mixing sources."""
    if options.shard_bytes < MIN_SHARD_BYTES:
        raise ToolError(f"--shard-bytes {options.shard_bytes}: at least {MIN_SHARD_BYTES}")
    inflation = {source: _inflation(files, source) for source in dict.fromkeys(file.source for file in files)}
    shards: list[WorkShard] = []
    for source, ratio in inflation.items():
        pending: list[Segment] = []
        size = 0
        for number, file in enumerate(files):
            if file.source != source:
                continue
            for segment, estimate in _segments(number, file, ratio, options.shard_bytes):
                if pending and size + estimate > options.shard_bytes:
                    shards.append(WorkShard(len(shards), source, tuple(pending), size))
                    pending, size = [], 0
                pending.append(segment)
                size += estimate
        if pending:
            shards.append(WorkShard(len(shards), source, tuple(pending), size))
    plan = Plan(tuple(files), tuple(shards), options, tokenizer.record(), "")
    return Plan(plan.files, plan.shards, plan.options, plan.tokenizer, _fingerprint(plan))


def _fingerprint(plan: Plan) -> str:
    """A hash of all that determines the output; the path of the tokenizer does not."""
    content = _content(plan)
    content["tokenizer"] = {key: value for key, value in plan.tokenizer.items() if key != "path"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def _content(plan: Plan) -> dict[str, Any]:
    return {
        "version": PLAN_VERSION,
        "options": asdict(plan.options),
        "tokenizer": plan.tokenizer,
        "files": [[file.source, file.path, file.stored_bytes, file.stamp] for file in plan.files],
        "shards": [
            [shard.source, shard.estimated_bytes, [[part.file, part.start, part.end] for part in shard.segments]]
            for shard in plan.shards
        ],
    }


def _inflation(files: list[InputFile], source: str) -> float:
    """Uncompressed bytes per stored byte of the compressed files of a source, from the start of a few."""
    packed = [file for file in files if file.source == source and is_compressed_name(file.path)]
    step = max(1, len(packed) // SAMPLED_FILES)
    stored = plain = 0
    faults: tuple[type[Exception], ...] = (ToolError, *decompression_errors())
    for file in packed[::step][:SAMPLED_FILES]:
        counted = [0]
        seen = 0

        def count(size: int, counted: list[int] = counted) -> None:
            counted[0] += size

        try:
            with open_input(file.path) as handle:
                for chunk in read_chunks(file.path, handle, on_bytes=count):
                    seen += len(chunk)
                    if counted[0] > SAMPLED_BYTES:
                        break
        except faults:
            continue  # the worker reports it, with its place
        stored, plain = stored + counted[0], plain + seen
    return max(1.0, plain / stored) if stored else 1.0


def _segments(number: int, file: InputFile, ratio: float, shard_bytes: int) -> Iterator[tuple[Segment, int]]:
    """(segment, estimated uncompressed bytes) of one file: cut only where it is larger than a shard."""
    if file.is_parquet:
        yield from _row_groups(number, file, shard_bytes)
    elif is_compressed_name(file.path):
        parts = -(-int(file.stored_bytes * ratio) // shard_bytes)
        cuts = [0, *find_cuts(file.path, file.stored_bytes, parts), file.stored_bytes]
        for start, end in itertools.pairwise(cuts):
            yield Segment(number, start, None if end == file.stored_bytes else end), int((end - start) * ratio)
    elif file.stored_bytes <= shard_bytes or _is_compressed(file.path):
        yield Segment(number), file.stored_bytes
    else:
        parts = -(-file.stored_bytes // shard_bytes)
        cuts = [file.stored_bytes * part // parts for part in range(parts + 1)]
        for start, end in itertools.pairwise(cuts):
            yield Segment(number, start, None if end == file.stored_bytes else end), end - start


def _is_compressed(path: str) -> bool:
    """Whether a file without such a suffix is compressed all the same."""
    magic = read_at(path, 0, 4)
    return magic.startswith(GZIP_MAGIC) or magic == ZSTD_MAGIC


def _row_groups(number: int, file: InputFile, shard_bytes: int) -> Iterator[tuple[Segment, int]]:
    from megatron_hybrid.tools.corpus.parquet import row_group_bytes

    if file.stored_bytes * PARQUET_INFLATION <= shard_bytes:
        yield Segment(number), int(file.stored_bytes * PARQUET_INFLATION)
        return
    try:
        sizes = row_group_bytes(file.path)
    except ToolError:
        yield Segment(number), file.stored_bytes  # the worker reports what is wrong with it
        return
    start, size = 0, 0
    for group, group_bytes in enumerate(sizes):
        if group > start and size + group_bytes > shard_bytes:
            yield Segment(number, start, group), size
            start, size = group, 0
        size += group_bytes
    yield Segment(number, start, len(sizes)), size


def save_plan(plan: Plan, folder: Path) -> None:
    """Writes plan.json into `folder`."""
    with atomic_open(folder / PLAN_NAME) as handle:
        handle.write(json.dumps({"fingerprint": plan.fingerprint, **_content(plan)}).encode() + b"\n")


def load_plan(folder: Path) -> Plan:
    """The plan of `folder`; raises ToolError if there is none, or one of another version or damaged."""
    path = folder / PLAN_NAME
    try:
        data = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ToolError(
            f"{folder}: no {PLAN_NAME}; make one with python -m megatron_hybrid.tools.preprocess plan"
        ) from None
    except ValueError:
        raise ToolError(f"{path}: not JSON; remove the folder and plan again") from None
    if data.get("version") != PLAN_VERSION:
        raise ToolError(
            f"{path}: version {data.get('version')}, but this program makes and reads version {PLAN_VERSION}; finish "
            "the run with the program that planned it, or plan again in another folder"
        )
    options = data["options"] | {"metadata_keys": tuple(data["options"]["metadata_keys"])}
    plan = Plan(
        tuple(InputFile(*entry) for entry in data["files"]),
        tuple(
            WorkShard(index, source, tuple(Segment(*part) for part in parts), estimate)
            for index, (source, estimate, parts) in enumerate(data["shards"])
        ),
        Options(**options),
        data["tokenizer"],
        data["fingerprint"],
    )
    if _fingerprint(plan) != plan.fingerprint:
        raise ToolError(f"{path}: edited or damaged, its fingerprint does not match; remove the folder and plan again")
    return plan


def explain_difference(old: Plan, new: Plan) -> str:
    """What makes two plans differ, for the message that refuses to continue one with the other."""
    for name, before, after in (
        ("tokenizer", old.tokenizer["sha256"], new.tokenizer["sha256"]),
        *((key, value, asdict(new.options)[key]) for key, value in asdict(old.options).items()),
        ("end-of-document id", old.tokenizer["eod_id"], new.tokenizer["eod_id"]),
        ("number of input files", len(old.files), len(new.files)),
    ):
        if before != after:
            return f"{name} was {before!r}, now {after!r}"
    for before_file, after_file in zip(old.files, new.files, strict=True):
        if before_file != after_file:
            return f"{after_file.path} differs from {before_file.path} as it was planned (size, time or source)"
    return "the shards were cut differently"
