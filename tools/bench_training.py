"""Training speed and memory on one GPU, beside Megatron-Core's GDN layer, olmo3, Hugging Face's model and OLMo-core's.

    python -m megatron_hybrid.tools.bench_training --output FOLDER --budget-s 300

Every case is a model from flags (tools/gpu_bench/cases.py), its optimizer and data, stepped as the trainer steps it.
Rounds of a group alternate; medians and ranges are over the steps of all rounds. A case that fails or does not fit is
a row that says so. FOLDER gets events.jsonl after every visit, and from it results.json, table.md and, where there are
profiles, profile.png; worker.log has what Megatron prints. Its needs are those of training, and for some columns
flash-linear-attention, transformers and ai2-olmo-core.
"""

from __future__ import annotations

import argparse
import json
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

from megatron_hybrid.tools.cli import Parser, ToolError, run_cli
from megatron_hybrid.tools.gpu_bench import report
from megatron_hybrid.tools.gpu_bench.cases import CASES, WARM_UP, Case, tiny, visits

#: The case that runs when the budget ends may go on so long.
GRACE_S = 25
#: Dense bf16 of H100 SXM and H200; FP8 rows are given against it too.
PEAK_TFLOPS = 989.0


def chosen(names: list[str], groups: list[str], without: list[str], rounds: int, small: bool) -> list[Case]:
    """Cases by name and group, less those of `without`, in at most so many rounds; all where neither is given.

    Raises:
        ToolError: a name or group that no case has.
    """
    every = tiny() if small else [*CASES, *WARM_UP]
    for flag, wanted, known in (
        ("--case", names, {case.name for case in every}),
        ("--without", without, {case.name for case in every}),
        ("--group", groups, {case.group for case in every}),
    ):
        if unknown := [word for word in wanted if word not in known]:
            raise ToolError(f"{flag} {unknown[0]!r}: unknown; legal: {', '.join(map(repr, sorted(known)))}")
    if not groups:
        every = [case for case in every if case not in WARM_UP]
    return [
        replace(case, rounds=min(case.rounds, rounds))
        for case in every
        if (not names or case.name in names) and (not groups or case.group in groups) and case.name not in without
    ]


def main() -> None:
    parser = Parser(
        prog="python -m megatron_hybrid.tools.bench_training",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, help="folder for the results; must be new or empty")
    parser.add_argument("--budget-s", type=float, default=600, help="begin no case after so many seconds (600)")
    parser.add_argument("--group", action="append", default=[], help="only this group (repeatable)")
    parser.add_argument("--case", action="append", default=[], help="only cases of this name (repeatable)")
    parser.add_argument("--without", action="append", default=[], help="no cases of this name (repeatable)")
    parser.add_argument("--rounds", type=int, default=2, help="visits of a case at most (2)")
    parser.add_argument("--tokens", help="raw uint16 ids, for the cases on real text")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to try this tool itself, on CPU too")
    parser.add_argument("--list", action="store_true", help="print the cases and stop")
    parser.add_argument("--worker", type=int, metavar="VISIT", help=argparse.SUPPRESS)
    parser.add_argument("--deadline", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    cases = chosen(args.case, args.group, args.without, args.rounds, args.tiny)
    if args.list:
        for case in cases:
            print(f"{case.group} / {case.name}: --preset {case.preset} {shlex.join(case.flags)}")
        return
    if args.output is None:
        parser.error("--output: missing; give a folder for the results")
    events = args.output / "events.jsonl"
    if args.worker is not None:
        from megatron_hybrid.tools.gpu_bench.worker import run

        run(cases, args.worker, events, args.deadline, args.tokens)
        return
    if args.output.exists() and any(args.output.iterdir()):
        raise ToolError(f"--output {args.output}: is not empty; name another folder")
    args.output.mkdir(parents=True, exist_ok=True)
    supervise(cases, args, events)


def supervise(cases: list[Case], args: argparse.Namespace, events: Path) -> None:
    """Start workers until every visit has ended, and write the tables as visits end."""
    deadline, plan = time.time() + args.budget_s, visits(cases)
    command = [sys.executable, "-m", "megatron_hybrid.tools.bench_training", "--output", str(args.output)]
    for flag, values in (("--group", args.group), ("--case", args.case), ("--without", args.without)):
        command += [word for value in values for word in (flag, value)]
    command += (
        ["--rounds", str(args.rounds)] + ["--tiny"] * args.tiny + (["--tokens", args.tokens] if args.tokens else [])
    )
    shown = 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    while (first := _ended(events)) < len(plan) and time.time() < deadline + GRACE_S:
        with (args.output / "worker.log").open("a") as log:
            worker = subprocess.Popen(
                [*command, "--worker", str(first), "--deadline", str(deadline)], stdout=log, stderr=log
            )
            started = time.time()
            try:
                while worker.poll() is None:
                    time.sleep(0.5)
                    shown = _show(cases, events, args.output, shown)
                    begun = [event["time"] for event in report.read_events(events) if event["event"] == "begin"]
                    longest = plan[min(_ended(events), len(plan) - 1)][0].longest_s
                    if time.time() > min(max([started, *begun]) + longest, deadline + GRACE_S):
                        worker.kill()
            finally:
                worker.kill()
        if (status := worker.wait()) and _ended(events) < len(plan):
            _write_death(events, status)
        shown = _show(cases, events, args.output, shown)
    _draw(cases, events, args.output)


def _ended(events: Path) -> int:
    return sum(event["event"] == "end" for event in report.read_events(events))


def _write_death(events: Path, status: int) -> None:
    """The visit that the worker died in (or the next one, where it died before any) has failed."""
    entry = {"event": "end", "visit": _ended(events), "error": f"the process ended (status {status}); see worker.log"}
    with events.open("a") as file:
        file.write(json.dumps(entry) + "\n")


def _show(cases: list[Case], events: Path, output: Path, shown: int) -> int:
    """Print lines of visits that ended since the last call, and write the tables anew."""
    ended = [event for event in report.read_events(events) if event["event"] == "end"]
    plan = visits(cases)
    for event in ended[shown:]:
        case = plan[event["visit"]][0]
        times = sorted(event.get("ms", []))
        what = event.get("error") or (f"{times[len(times) // 2]:.1f} ms a step" if times else "done")
        peak = f", {event['peak_bytes'] / 2**30:.1f} GiB" if event.get("peak_bytes") else ""
        print(f"{case.group} / {case.name}: {what}{peak} ({event.get('seconds', 0):.0f} s)", flush=True)
    if len(ended) > shown:
        write_tables(cases, events, output)
    return len(ended)


def write_tables(cases: list[Case], events: Path, output: Path) -> None:
    known = report.read_events(events)
    found = report.rows(cases, known, PEAK_TFLOPS)
    software: dict[str, str] = next((event["software"] for event in known if event["event"] == "about"), {})
    about = {"date": time.strftime("%Y-%m-%d", time.gmtime()), "peak_tflops": PEAK_TFLOPS, "software": software}
    (output / "results.json").write_text(json.dumps({**about, "rows": found}, indent=1))
    kept = {name: value for name, value in software.items() if name in ("device", "torch", "triton")}
    title = f"{about['date']}, {', '.join(f'{name} {value}' for name, value in kept.items())}"
    (output / "table.md").write_text(report.markdown(found, title))


def _draw(cases: list[Case], events: Path, output: Path) -> None:
    found = report.rows(cases, report.read_events(events), PEAK_TFLOPS)
    profiles = {row["name"]: row["profile"] for row in found if "profile" in row}
    if not profiles:
        return
    from megatron_hybrid.tools.gpu_bench.profiling import draw

    try:
        draw(profiles, output / "profile.png")
    except ImportError as error:
        print(f"no chart: {error}; its data are in results.json", file=sys.stderr)


if __name__ == "__main__":
    run_cli(main)
