"""Renders the jobs of a run on many nodes: an array whose tasks pull shards, and a job that verifies and merges."""

import argparse
import shlex
import sys
from pathlib import Path

from megatron_hybrid.tools.atomic_file import atomic_open
from megatron_hybrid.tools.cli import ToolError
from megatron_hybrid.tools.corpus.plan import load_plan
from megatron_hybrid.tools.corpus.pool import DRAINED_STATUS

ARRAY = """#!/usr/bin/env bash
# Tokenizes plan {fingerprint}: {shards} shards. Each task pulls the shards that no other has.
{directives}
#SBATCH --job-name=preprocess
#SBATCH --array=0-{last_task}
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task={workers}
#SBATCH --time={time}
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@{drain_seconds}
#SBATCH --output={folder}/slurm/%A_%a.log
set -uo pipefail
run_id="slurm-$SLURM_ARRAY_JOB_ID"
{command} --run-id "$run_id" &
worker=$!
trap 'kill -USR1 "$worker" 2>/dev/null' USR1 TERM # the shards at work are finished, no more are taken
while :; do # a trap ends `wait`, not the worker
    wait "$worker"
    status=$?
    kill -0 "$worker" 2>/dev/null || break
done
case $status in
{drained} | 138 | 143) # drained, or the signal came before the program could take it
    echo "drained; queued again (restart ${{SLURM_RESTART_COUNT:-0}})"
    scontrol requeue "${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID"
    exit 0
    ;;
esac
exit "$status"
"""

FINISH = """#!/usr/bin/env bash
# Checks the accounts of plan {fingerprint}, writes its datasets and verifies them.
{directives}
#SBATCH --job-name=preprocess-finish
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=1
#SBATCH --time={time}
#SBATCH --output={folder}/slurm/finish_%j.log
set -euo pipefail
{command}
{verify}
"""

SUBMIT = """#!/usr/bin/env bash
# Submits the array, and the job that finishes once every task has ended well.
set -euo pipefail
cd "$(dirname "$0")"
array=$(sbatch --parsable array.sbatch)
finish=$(sbatch --parsable --dependency="afterok:${array%%;*}" --kill-on-invalid-dep=yes finish.sbatch)
echo "array ${array%%;*}, then ${finish%%;*}"
"""


def render(folder: Path, output: Path, args: argparse.Namespace) -> str:
    """Writes array.sbatch, finish.sbatch and submit.sh into the folder of the run; returns what to do with them.

    Raises ToolError for a path that Slurm's directives cannot hold.
    """
    plan = load_plan(folder)
    folder = folder.resolve()
    if any(character.isspace() or character == "%" for character in str(folder)):
        raise ToolError(f"--output-dir {folder}: white space and % cannot stand in the #SBATCH lines; choose another")
    flag = "--output-prefix" if args.output_prefix else "--output-dir"
    where = [flag, str(output.resolve())]
    tool = [sys.executable, "-m", "megatron_hybrid.tools.preprocess"]
    work = [
        *tool,
        "work",
        *where,
        "--workers",
        str(args.workers),
        "--on-error",
        args.on_error,
        "--backend",
        args.backend,
        "--stall-seconds",
        str(args.stall_seconds),
    ]
    finish = [*tool, "finish", *where]
    finish += ["--max-rejected", str(args.max_rejected), "--prefix-bytes", str(args.prefix_bytes)]
    finish += ["--upload-to", args.upload_to] if args.upload_to else []
    verify = [sys.executable, "-m", "megatron_hybrid.tools.inspect_data", "verify", str(output.resolve())]
    directives = "\n".join(
        f"#SBATCH --{name}={value}" for name in ("partition", "account") if (value := getattr(args, name))
    )
    values = {
        "fingerprint": plan.fingerprint,
        "shards": len(plan.shards),
        "directives": directives or "#",
        "last_task": min(args.tasks, len(plan.shards)) - 1,
        "workers": args.workers,
        "time": args.time,
        "drain_seconds": args.drain_seconds,
        "folder": folder,
        "drained": DRAINED_STATUS,
        "verify": shlex.join(verify),
    }
    scripts = {
        "array.sbatch": ARRAY.format(command=shlex.join(work), **values),
        "finish.sbatch": FINISH.format(command=shlex.join(finish), **values),
        "submit.sh": SUBMIT,
    }
    for name, text in scripts.items():
        with atomic_open(folder / "slurm" / name) as handle:
            handle.write(text.encode())
    return (
        f"written: {', '.join(str(folder / 'slurm' / name) for name in scripts)}\nstart: bash {folder}/slurm/submit.sh"
    )
