"""From finished work shards to datasets with a manifest: the accounts are checked, then the names are given."""

import glob
import json
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import xxhash

from megatron_hybrid.tools.atomic_file import atomic_open, temporary_path
from megatron_hybrid.tools.cli import ToolError
from megatron_hybrid.tools.corpus.concatenate import Concatenated, concatenate, join_files, rename_over
from megatron_hybrid.tools.corpus.ledger import LedgerState
from megatron_hybrid.tools.corpus.plan import Plan, WorkShard
from megatron_hybrid.tools.corpus.shard import METADATA_SUFFIX, REJECTS_SUFFIX, stem
from megatron_hybrid.tools.corpus.worker import SHARD_FOLDER

MANIFEST_VERSION = 2
MAX_PREFIXES = 300
NAME_HASH_DIGITS = 16
Records = dict[int, dict[str, Any]]


def source_totals(plan: Plan, records: Records) -> dict[str, dict[str, Any]]:
    """Files, lines, documents, rejected by reason, bytes of text and tokens of every source."""
    totals: dict[str, dict[str, Any]] = {}
    for source in plan.sources:
        own = [records[shard.index] for shard in plan.shards if shard.source == source]
        rejected: Counter[str] = sum((Counter(record["rejected"]) for record in own), Counter())
        totals[source] = {
            "files": sum(1 for file in plan.files if file.source == source),
            "stored_bytes": sum(file.stored_bytes for file in plan.files if file.source == source),
            **{key: sum(record[key] for record in own) for key in ("lines", "documents", "text_bytes", "tokens")},
            "special_literals": sum(record["special_literals"] for record in own),
            "rejected": dict(sorted(rejected.items())),
        }
    return totals


def check_conservation(totals: dict[str, dict[str, Any]]) -> None:
    """Raises ToolError unless lines = documents + rejected in every source."""
    for source, total in totals.items():
        rejected = sum(total["rejected"].values())
        if total["lines"] != total["documents"] + rejected:
            raise ToolError(
                f"source {source}: {total['lines']} lines, but {total['documents']} documents and {rejected} rejected: "
                "a fault of this program; please report it"
            )


def check_threshold(totals: dict[str, dict[str, Any]], max_rejected: float, rejects: str) -> None:
    """Raises ToolError if more lines of a source were rejected than allowed; blank lines do not count.

    `max_rejected` below 1 is a share of the lines of the source, from 1 on a number of lines.
    """
    for source, total in totals.items():
        bad = sum(count for reason, count in total["rejected"].items() if reason != "blank_line")
        allowed = max_rejected * total["lines"] if max_rejected < 1 else max_rejected
        if bad > allowed:
            reasons = ", ".join(f"{reason} {count:,}" for reason, count in total["rejected"].items())
            raise ToolError(
                f"source {source}: {bad:,} of {total['lines']:,} lines rejected ({reasons}), more than --max-rejected "
                f"{max_rejected:g} allows; see {rejects}, then repair the input, or run again with a higher "
                "--max-rejected (what is tokenized stays)"
            )


def check_documents(plan: Plan, totals: dict[str, dict[str, Any]]) -> None:
    """Raises ToolError if there is no document at all: Megatron cannot read an empty dataset."""
    if any(total["documents"] for total in totals.values()):
        return
    rejected: Counter[str] = sum((Counter(total["rejected"]) for total in totals.values()), Counter())
    paths = ", ".join(file.path for file in plan.files[:5])
    raise ToolError(
        f"--input: no documents in {paths}{' and others' if len(plan.files) > 5 else ''} (rejected: "
        f"{dict(rejected) or 'none'}); Megatron cannot read an empty dataset"
    )


def group_shards(plan: Plan, records: Records, prefix_bytes: int) -> list[list[WorkShard]]:
    """Shards of one source, in order, by about `prefix_bytes` of .bin; more where that makes over MAX_PREFIXES."""
    while True:
        groups: list[list[WorkShard]] = []
        size = 0
        for shard in plan.shards:
            if not records[shard.index]["documents"]:
                continue
            own = records[shard.index]["bin"]["bytes"]
            if groups and groups[-1][0].source == shard.source and size + own <= prefix_bytes:
                groups[-1].append(shard)
                size += own
            else:
                groups.append([shard])
                size = own
        if len(groups) <= max(MAX_PREFIXES, len(plan.sources)):
            return groups
        prefix_bytes *= 2


def _part_prefix(folder: Path, shard: WorkShard, records: Records) -> Path:
    return folder / SHARD_FOLDER / stem(shard, records[shard.index]["reference"])


def content_name(source: str, number: int, group: Sequence[WorkShard], records: Records) -> str:
    """A name that changes with the content, so that no index Megatron cached for other content fits it."""
    digest = xxhash.xxh3_128()
    for shard in group:
        digest.update(records[shard.index]["bin"]["xxh3"].encode())
        digest.update(records[shard.index]["idx"]["xxh3"].encode())
    return f"{source}-{number:04d}-{digest.hexdigest()[:NAME_HASH_DIGITS]}"


def build_dataset(folder: Path, group: Sequence[WorkShard], records: Records, output: Path) -> dict[str, Any]:
    """Joins the shards of `group` as the dataset `output`, with its sidecars; returns its manifest entry."""
    parts = [_part_prefix(folder, shard, records) for shard in group]
    written: Concatenated = concatenate(parts, output)
    _join_sidecars(parts, Path(f"{output}{METADATA_SUFFIX}"), METADATA_SUFFIX)
    entries, offset = [], 0
    for shard in group:
        record = records[shard.index]
        entries.append({"offset": offset, **record["bin"], "encoder": record["encoder"]})
        offset += record["bin"]["bytes"]
    return {
        "prefix": output.name,
        "source": group[0].source if len({shard.source for shard in group}) == 1 else None,
        "dtype": written.dtype,
        "documents": written.documents,
        "tokens": written.tokens,
        "bin": {"bytes": written.bin_bytes, "parts": entries},
        "idx": {"bytes": written.idx_bytes, "xxh3": written.idx_xxh3},
    }


def _join_sidecars(parts: Sequence[Path], output: Path, suffix: str) -> None:
    """Joins the files of one kind that the shards `parts` have; without any, an older `output` goes."""
    sidecars = [path for part in parts if (path := Path(f"{part}{suffix}")).exists()]
    output.unlink(missing_ok=True)
    if sidecars:
        temporary = temporary_path(output)
        join_files(sidecars, temporary)
        rename_over(temporary, output)


def is_finished(path: Path, fingerprint: str) -> dict[str, Any] | None:
    """The manifest at `path` if the plan of that fingerprint made it."""
    try:
        content = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    return content if isinstance(content, dict) and content.get("fingerprint") == fingerprint else None


def manifest_path(output: Path, one_prefix: bool) -> Path:
    """Where the manifest of the dataset `output`, or of the folder of datasets, is."""
    return Path(f"{output}.json") if one_prefix else output / "manifest.json"


def manifest(plan: Plan, records: Records, totals: dict[str, dict[str, Any]], datasets: list[Any]) -> dict[str, Any]:
    """What the manifest says; it holds no times and no hosts, so that equal runs make equal bytes."""
    files: dict[int, dict[str, Any]] = {}
    for shard in plan.shards:
        for number, _, _, lines, documents, rejected in records[shard.index]["files"]:
            file = plan.files[number]
            entry = files.setdefault(
                number,
                {
                    "source": file.source,
                    "path": file.path,
                    "stored_bytes": file.stored_bytes,
                    "lines": 0,
                    "documents": 0,
                    "rejected": {},
                },
            )
            entry["lines"] += lines
            entry["documents"] += documents
            entry["rejected"] = dict(sorted((Counter(entry["rejected"]) + Counter(rejected)).items()))
    rejected_total: Counter[str] = sum((Counter(total["rejected"]) for total in totals.values()), Counter())
    options = asdict(plan.options) | {"metadata_keys": list(plan.options.metadata_keys)}
    return {
        "manifest_version": MANIFEST_VERSION,
        "fingerprint": plan.fingerprint,
        "lines": sum(total["lines"] for total in totals.values()),
        "documents": sum(total["documents"] for total in totals.values()),
        "tokens": sum(total["tokens"] for total in totals.values()),
        "rejected": dict(sorted(rejected_total.items())),
        "tokenizer": plan.tokenizer,
        "options": options,
        "sources": totals,
        "datasets": datasets,
        "files": [files[number] for number in sorted(files)],
    }


def finish(
    plan: Plan, state: LedgerState, folder: Path, output: Path, one_prefix: bool, max_rejected: float, prefix_bytes: int
) -> dict[str, Any]:
    """Checks the accounts of a run whose shards are all done, and writes datasets and manifest.

    `output` is the prefix of the one dataset, or the folder of many. Safe to run again at any point.
    """
    if len(state.done) < len(plan.shards):
        missing = [shard.name for shard in plan.shards if shard.index not in state.done]
        why = f"; {missing[0]}: {state.failed[int(missing[0][1:])]}" if int(missing[0][1:]) in state.failed else ""
        raise ToolError(f"{folder}: {len(missing)} of {len(plan.shards)} shards are not done ({missing[0]}...){why}")
    records = state.done
    totals = source_totals(plan, records)
    check_conservation(totals)
    check_threshold(totals, max_rejected, f"{folder / SHARD_FOLDER}/*{REJECTS_SUFFIX}")
    check_documents(plan, totals)
    path = manifest_path(output, one_prefix)
    path.unlink(missing_ok=True)  # of an older run; a manifest says that all is there
    for leftover in output.parent.glob(f"{glob.escape(output.name)}.*.tmp.*") if one_prefix else output.glob("*.tmp.*"):
        leftover.unlink()  # of a killed attempt; no other process finishes this run
    if one_prefix:
        groups = [[shard for shard in plan.shards if records[shard.index]["documents"]]]
        datasets = [build_dataset(folder, groups[0], records, output)]
    else:
        datasets = []
        numbers: Counter[str] = Counter()
        for group in group_shards(plan, records, prefix_bytes):
            source = group[0].source
            name = content_name(source, numbers[source], group, records)
            numbers[source] += 1
            datasets.append(build_dataset(folder, group, records, output / name))
    rejects = Path(f"{output}{REJECTS_SUFFIX}") if one_prefix else output / "rejects.jsonl"
    _join_sidecars([_part_prefix(folder, shard, records) for shard in plan.shards], rejects, REJECTS_SUFFIX)
    _check_totals(datasets, totals)
    content = manifest(plan, records, totals, datasets)
    with atomic_open(path) as handle:
        handle.write(json.dumps(content, indent=1).encode() + b"\n")
    shutil.rmtree(folder if one_prefix else folder / SHARD_FOLDER)
    return content


def _check_totals(datasets: list[dict[str, Any]], totals: dict[str, dict[str, Any]]) -> None:
    for key in ("documents", "tokens"):
        written, counted = sum(entry[key] for entry in datasets), sum(total[key] for total in totals.values())
        if written != counted:
            raise ToolError(f"{written} {key} in the datasets, {counted} in the ledger: a fault of this program")
