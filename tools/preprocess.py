"""Turns text into Megatron datasets: JSONL or Parquet in, .bin/.idx and a manifest out, every line accounted for.

    python -m megatron_hybrid.tools.preprocess --input corpus.jsonl.zst --output-prefix data/corpus \\
        --tokenizer-model tokenizer.model --append-eod

makes one dataset. A mix of many sources goes into a folder, planned first, by as many workers as there are cores:

    python -m megatron_hybrid.tools.preprocess plan --input web=/data/web/ --input code='/data/code/*.jsonl.gz' \\
        --output-dir tokens --tokenizer-model tokenizer.json --append-eod
    python -m megatron_hybrid.tools.preprocess run --output-dir tokens --workers 32

The same command run again after a crash does only what is not recorded, and ends with the same bytes.
"""

import argparse
import math
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_hybrid.tools.cli import Parser, ToolError, run_cli

if TYPE_CHECKING:
    from megatron_hybrid.tools.corpus.plan import Plan
    from megatron_hybrid.tools.corpus.worker import Settings

COMMANDS = ("run", "plan", "work", "finish", "status", "slurm")
GIB = 1 << 30
MIN_AUTO_SHARD_BYTES, MAX_AUTO_SHARD_BYTES, AUTO_SHARDS = GIB // 4, 2 * GIB, 512


def parse_bytes(text: str) -> int:
    """A number of bytes, with an optional suffix K, M, G or T (powers of 1,024)."""
    units = {"K": 1 << 10, "M": 1 << 20, "G": GIB, "T": 1 << 40}
    number, unit = (text[:-1], units[text[-1].upper()]) if text[-1:].upper() in units else (text, 1)
    try:
        value = int(float(number) * unit)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write 500M, 2G or a number of bytes") from None
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} must be above 0")
    return value


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number from 1 on")
    return int(text)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number of seconds from 0 on")
    return value


def _max_rejected(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"{text!r} must be a share below 1 or a number of lines")
    return value


def check_output_prefix(prefix: str, overwrite: bool) -> None:
    """Raises ToolError if `prefix` is a folder, or taken by another dataset or by the index of one."""
    from megatron_hybrid.tools.indexed_dataset import bin_path, idx_path

    index_cache = Path(prefix, "cache")  # where Megatron keeps it, unless told --data-cache-path
    if index_cache.is_dir():
        raise ToolError(
            f"--output-prefix {prefix}: {index_cache} is Megatron's index of earlier data of this name, which it "
            "would use for the new data too; remove that folder or choose another prefix"
        )
    if Path(prefix).is_dir() or prefix.endswith("/"):
        raise ToolError(f"--output-prefix {prefix}: a folder; add a name, such as {prefix.rstrip('/')}/corpus")
    existing = [path for path in (bin_path(prefix), idx_path(prefix), Path(f"{prefix}.json")) if path.exists()]
    if existing and not overwrite:
        raise ToolError(f"--output-prefix {prefix}: {existing[0]} exists; choose another prefix or pass --overwrite")


def work_folder(args: argparse.Namespace) -> Path:
    """The folder of plan, ledger and unfinished shards."""
    return Path(f"{args.output_prefix}.work") if args.output_prefix else Path(args.output_dir, "work")


def build_plan(args: argparse.Namespace) -> "Plan":
    """The plan of the inputs given; nothing is written."""
    from megatron_hybrid.tools.corpus.inputs import find_inputs
    from megatron_hybrid.tools.corpus.plan import Options, make_plan
    from megatron_hybrid.tools.corpus.tokenizer_file import load_tokenizer_file

    if not args.tokenizer_model:
        raise ToolError("--tokenizer-model: needed to plan; give a tokenizer.json, tokenizer.model or .tiktoken file")
    tokenizer = load_tokenizer_file(args.tokenizer_model, args.eod_token, args.eod_id, args.tiktoken_pattern)
    if args.append_eod and tokenizer.eod_id < 0:
        raise ToolError(
            f"--append-eod: {args.tokenizer_model} has no eos piece to use as the end-of-document token; name it with "
            "--eod-token or --eod-id, drop --append-eod, or train the tokenizer with one"
        )
    if args.text_key in args.metadata_keys or len(set(args.metadata_keys)) < len(args.metadata_keys):
        raise ToolError(f"--metadata-keys {' '.join(args.metadata_keys)}: each key once, and not --text-key")
    files, ignored = find_inputs(args.input)
    if ignored:
        print(f"{ignored:,} files in the folders given have no suffix of text data and are left out", file=sys.stderr)
    shard_bytes = args.shard_bytes
    if shard_bytes is None:
        stored = sum(file.stored_bytes for file in files)
        shard_bytes = min(max(stored // AUTO_SHARDS, MIN_AUTO_SHARD_BYTES), MAX_AUTO_SHARD_BYTES)
    options = Options(
        args.text_key,
        args.append_eod,
        args.special_tokens,
        tuple(args.metadata_keys),
        args.salvage_truncated,
        shard_bytes,
    )
    return make_plan(files, tokenizer, options)


def make_or_load_plan(args: argparse.Namespace) -> "Plan":
    """The plan of the inputs given, saved; or the saved one where there are no inputs or it is the same."""
    from megatron_hybrid.tools.corpus.plan import PLAN_NAME, explain_difference, load_plan, save_plan

    folder = work_folder(args)
    if not args.input:
        return load_plan(folder)
    plan = build_plan(args)
    if (folder / PLAN_NAME).exists():
        saved = load_plan(folder)
        if saved.fingerprint != plan.fingerprint:
            raise ToolError(
                f"{folder}: holds a run that was planned otherwise: {explain_difference(saved, plan)}; finish that run "
                "with its own flags, or remove the folder, or choose another output"
            )
        return saved
    save_plan(plan, folder)
    return plan


def settings_of(args: argparse.Namespace) -> "Settings":
    """The settings of workers that the flags choose."""
    from megatron_hybrid.tools.corpus.worker import Settings

    return Settings(args.on_error, args.backend, args.stall_seconds)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Plans, works and finishes; returns the manifest. Raises ToolError for any fault."""
    from megatron_hybrid.tools.corpus.finish import is_finished, manifest_path
    from megatron_hybrid.tools.corpus.plan import PLAN_NAME
    from megatron_hybrid.tools.corpus.pool import DRAINED_STATUS, Drained, run_plan

    folder = work_folder(args)
    output = Path(args.output_prefix or args.output_dir)
    path = manifest_path(output, bool(args.output_prefix))
    resuming = (folder / PLAN_NAME).exists()
    if args.output_prefix and not resuming:
        if args.input and path.exists() and not args.overwrite:
            made = is_finished(path, build_plan(args).fingerprint)
            if made is not None:  # the same run was finished before
                _remove_work(folder, True)
                return made
        check_output_prefix(args.output_prefix, args.overwrite)
    plan = make_or_load_plan(args)
    done = is_finished(path, plan.fingerprint)
    if done is not None and resuming:
        _remove_work(folder, bool(args.output_prefix))
        return done
    try:
        run_plan(folder, settings_of(args), args.workers, f"local-{os.getpid()}", args.engine)
        return finish_run(args)
    except ToolError:
        _drop_empty_work(folder, args)
        raise
    except Drained as stopped:
        print(f"{stopped}; the same command goes on from here", file=sys.stderr)
        sys.exit(DRAINED_STATUS)


def _remove_work(folder: Path, one_prefix: bool) -> None:
    import shutil

    from megatron_hybrid.tools.corpus.worker import SHARD_FOLDER

    shutil.rmtree(folder if one_prefix else folder / SHARD_FOLDER, ignore_errors=True)


def _drop_empty_work(folder: Path, args: argparse.Namespace) -> None:
    """After a fault of a small run that recorded nothing, leaves nothing behind."""
    import shutil

    from megatron_hybrid.tools.corpus.ledger import LEASE_FOLDER, LEDGER_FOLDER, Leases

    ledger = folder / LEDGER_FOLDER
    busy = (folder / LEASE_FOLDER).is_dir() and Leases(folder).holders("")
    if args.output_prefix and not busy and not (ledger.is_dir() and any(ledger.iterdir())):
        shutil.rmtree(folder, ignore_errors=True)


def finish_run(args: argparse.Namespace) -> dict[str, Any]:
    """Checks the accounts and writes the datasets of a run whose shards are all recorded."""
    from megatron_hybrid.tools.corpus.finish import finish
    from megatron_hybrid.tools.corpus.ledger import Leases, Ledger, enter_run
    from megatron_hybrid.tools.corpus.plan import load_plan

    folder = work_folder(args)
    plan = load_plan(folder)
    leases = Leases(folder)
    lease = enter_run(leases, f"local-{os.getpid()}")
    try:
        state = Ledger(folder, plan.fingerprint).read()
        output = Path(args.output_prefix or args.output_dir)
        return finish(
            plan, state, folder, output, bool(args.output_prefix), args.max_rejected, args.prefix_bytes
        )  # fmt: skip
    finally:
        if leases.folder.is_dir():
            leases.give_back(lease)


def work(args: argparse.Namespace) -> None:
    """Joins the workers of a run that may be spread over many machines; exits 75 if told to stop early."""
    from megatron_hybrid.tools.corpus.pool import DRAINED_STATUS, Drained, run_plan

    try:
        run_plan(work_folder(args), settings_of(args), args.workers, args.run_id, args.engine)
    except Drained as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(DRAINED_STATUS)


def status(args: argparse.Namespace) -> str:
    """What the ledger says, as text."""
    from megatron_hybrid.tools.corpus.ledger import Ledger
    from megatron_hybrid.tools.corpus.plan import load_plan

    plan = load_plan(work_folder(args))
    state = Ledger(work_folder(args), plan.fingerprint).read()
    lines = [f"plan {plan.fingerprint}: {len(plan.files):,} files, {len(plan.shards):,} shards"]
    for source in plan.sources:
        own = [shard for shard in plan.shards if shard.source == source]
        done = [state.done[shard.index] for shard in own if shard.index in state.done]
        tokens, seconds = sum(one["tokens"] for one in done), sum(one["seconds"] for one in done)
        lines.append(
            f"{source}: {len(done):,}/{len(own):,} shards, {sum(one['documents'] for one in done):,} documents, "
            f"{tokens:,} tokens, {sum(one['text_bytes'] for one in done) / 1e6 / seconds if seconds else 0:,.1f} "
            "MB/s per worker"
        )
    lines += [f"shard {index} failed: {error}" for index, error in sorted(state.failed.items())]
    lines += [f"{encoder} was stopped: {difference}" for encoder, difference in state.stopped.items()]
    return "\n".join(lines)


def summary(args: argparse.Namespace, content: dict[str, Any], seconds: float) -> str:
    """The line printed at the end: the conservation law, tokens and speed."""
    text_bytes = sum(total["text_bytes"] for total in content["sources"].values())
    special = sum(total["special_literals"] for total in content["sources"].values())
    rejected = ", ".join(f"{reason} {count:,}" for reason, count in content["rejected"].items())
    kept = "kept as control tokens" if content["options"]["special_tokens"] == "keep" else "taken as text"
    return (
        f"{args.output_prefix or args.output_dir}: {content['lines']:,} lines = {content['documents']:,} documents + "
        f"{sum(content['rejected'].values()):,} rejected{f' ({rejected})' if rejected else ''}; "
        f"{content['tokens']:,} tokens ({content['datasets'][0]['dtype']}) in {len(content['datasets']):,} "
        f"dataset{'s' if len(content['datasets']) > 1 else ''}, {text_bytes / 1e6:,.1f} MB of text, "
        f"{text_bytes / max(content['tokens'], 1):.2f} bytes/token, {text_bytes / 1e6 / seconds:,.1f} MB/s"
        f"{f'; {special:,} special-token strings in the text, {kept}' if special else ''}"
    )


def _add_plan_flags(result: argparse.ArgumentParser) -> None:
    """What fixes the tokens."""
    result.add_argument(
        "--input", nargs="+", action="extend", default=[], metavar="[NAME=]PATH",
        help="files, folders, globs or URLs of JSONL (plain, .gz, .zst) or Parquet; NAME is the source they count for",
    )  # fmt: skip
    result.add_argument(
        "--tokenizer-model", type=Path, metavar="FILE", help="tokenizer.json, tokenizer.model or .tiktoken"
    )
    result.add_argument("--text-key", default="text", metavar="KEY", help="key that holds the text (default: text)")
    result.add_argument("--append-eod", action="store_true", help="end each document with the end-of-document token")
    result.add_argument("--eod-token", metavar="TOKEN", help="that token (default: eos of the tokenizer's own files)")
    result.add_argument("--eod-id", type=int, metavar="ID", help="the same, by id, for .tiktoken files")
    result.add_argument("--tiktoken-pattern", metavar="NAME", help="split pattern of a .tiktoken file: gpt2 or cl100k")
    result.add_argument(
        "--special-tokens", choices=("text", "keep"), default="text",
        help="strings such as <|endoftext|> inside a document are plain text, or control tokens (default: text)",
    )  # fmt: skip
    result.add_argument(
        "--metadata-keys", nargs="+", default=[], metavar="KEY", help="keep these keys beside the tokens"
    )
    result.add_argument(
        "--salvage-truncated", action="store_true",
        help="keep the whole lines before the damage of a truncated file (default: such a file is an error)",
    )  # fmt: skip
    result.add_argument(
        "--shard-bytes", type=parse_bytes, metavar="SIZE",
        help="uncompressed bytes of a work shard (default: 256M for small inputs to 2G)",
    )  # fmt: skip


def _add_work_flags(result: argparse.ArgumentParser) -> None:
    """What changes how the work is done, and no byte of the output."""
    result.add_argument("--workers", type=_count, default=1, metavar="N", help="processes, one core each (default: 1)")
    result.add_argument(
        "--on-error", choices=("fail", "skip", "quarantine"), default="fail",
        help="a line that is no document ends the run, is left out and listed, or is also kept in the list of rejects "
        "(default: fail); a truncated file is always an error",
    )  # fmt: skip
    result.add_argument(
        "--backend", choices=("auto", "reference", "fastokens", "gigatoken"), default="auto",
        help="encoder; fast ones are compared with the reference all along (default: auto, fastokens where it can)",
    )  # fmt: skip
    result.add_argument(
        "--stall-seconds", type=_seconds, default=600.0, metavar="S",
        help="a worker that reports nothing for so long is ended and its shard redone (default: 600; 0: never)",
    )  # fmt: skip


def _add_finish_flags(result: argparse.ArgumentParser) -> None:
    result.add_argument(
        "--max-rejected", type=_max_rejected, default=0.01, metavar="X",
        help="rejected lines a source may have: a share below 1 or a number (default: 0.01)",
    )  # fmt: skip
    result.add_argument(
        "--prefix-bytes", type=parse_bytes, default=32 * GIB, metavar="SIZE",
        help="size of the .bin files of --output-dir (default: 32G; more if there would be over 300)",
    )  # fmt: skip
    result.add_argument(
        "--upload-to", metavar="URL", help="copy the finished datasets to this folder of object storage too (s3://...)"
    )


def parser(command: str = "run") -> argparse.ArgumentParser:
    """The command line of one of COMMANDS."""
    result = Parser(
        prog=f"python -m megatron_hybrid.tools.preprocess{'' if command == 'run' else ' ' + command}",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"Commands: {', '.join(COMMANDS)} (run where none is given); each has its own --help.",
    )
    output = result.add_mutually_exclusive_group(required=True)
    output.add_argument("--output-prefix", metavar="P", help="one dataset: its path without suffix, as in --data-path")
    output.add_argument("--output-dir", metavar="D", help="folder of datasets whose names change with their content")
    if command in ("run", "plan"):
        _add_plan_flags(result)
    if command in ("run", "plan", "work", "slurm"):
        _add_work_flags(result)
    if command in ("run", "finish", "slurm"):
        _add_finish_flags(result)
    if command in ("run", "work"):
        result.add_argument(
            "--engine", choices=("local", "ray"), default="local",
            help="workers are processes here, or actors of the Ray cluster in RAY_ADDRESS (extra ray; default: local)",
        )  # fmt: skip
    if command == "run":
        result.add_argument("--overwrite", action="store_true", help="replace a dataset of the same prefix")
    if command == "work":
        result.add_argument("--run-id", default="shared", metavar="ID", help="processes of one id work together")
    if command == "slurm":
        result.add_argument("--tasks", type=_count, required=True, metavar="W", help="tasks of the array, one per node")
        result.add_argument("--time", required=True, metavar="HH:MM:SS", help="time limit of a task")
        result.add_argument("--partition", metavar="NAME", help="where the jobs run (default: the cluster's)")
        result.add_argument("--account", metavar="NAME", help="what they are charged to")
        result.add_argument(
            "--drain-seconds", type=_count, default=300, metavar="S",
            help="warning before the time limit; longer than a shard takes (default: 300)",
        )  # fmt: skip
    if command == "plan":
        result.add_argument(
            "--calibrate-seconds", type=float, default=30.0, metavar="S",
            help="time spent measuring this machine (default: 30; 0: none, and no prediction)",
        )  # fmt: skip
    return result


def main() -> None:
    """Command-line entry point."""
    words = sys.argv[1:]
    command = words.pop(0) if words and words[0] in COMMANDS else "run"
    args = parser(command).parse_args(words)
    started = time.perf_counter()
    if getattr(args, "upload_to", None):
        from megatron_hybrid.tools.corpus.upload import check_target

        check_target(args.upload_to)
    if command == "plan":
        from megatron_hybrid.tools.corpus.calibrate import describe_plan

        plan = make_or_load_plan(args)
        print(describe_plan(plan, work_folder(args), settings_of(args), args.workers, args.calibrate_seconds))
    elif command == "work":
        work(args)
    elif command == "slurm":
        from megatron_hybrid.tools.corpus.slurm import render

        print(render(work_folder(args), Path(args.output_prefix or args.output_dir), args))
    elif command == "status":
        print(status(args))
    else:
        content = finish_run(args) if command == "finish" else run(args)
        print(summary(args, content, time.perf_counter() - started))
        if args.upload_to:
            from megatron_hybrid.tools.corpus.upload import upload

            copied = upload(
                content, Path(args.output_prefix or args.output_dir), bool(args.output_prefix), args.upload_to
            )
            print(f"{args.upload_to}: {copied / 1e6:,.1f} MB copied and read back")


if __name__ == "__main__":
    run_cli(main)
