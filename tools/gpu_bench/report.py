"""Events of the visits to a table: JSON for programs, markdown for people."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_hybrid.tools.gpu_bench.cases import Case, visits


def read_events(events: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in events.read_text().splitlines()] if events.exists() else []


def rows(cases: Sequence[Case], events: list[dict[str, Any]], peak_tflops: float) -> list[dict[str, Any]]:
    """One row per case with what its visits measured; a case without a visit is left out."""
    plan = visits(cases)
    ended: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for event in events:
        if event["event"] == "end":
            case = plan[event["visit"]][0]
            ended.setdefault((case.group, case.name), []).append(event)
    found = []
    for case in cases:
        if done := ended.get((case.group, case.name)):
            found.append(_row(case, done, peak_tflops))
    return found


def _row(case: Case, done: list[dict[str, Any]], peak_tflops: float) -> dict[str, Any]:
    note = next((event["note"] for event in done if "note" in event), case.note)
    row: dict[str, Any] = {"group": case.group, "name": case.name, "note": note}
    row["errors"] = [event["error"] for event in done if "error" in event]
    row["seconds"] = sum(event.get("seconds", 0.0) for event in done)
    for name in ("profile", "decode"):
        if part := next((event[name] for event in done if name in event), None):
            row[name] = part
    timed = [event for event in done if event.get("ms")]
    peaks = [event["peak_bytes"] for event in done if event.get("peak_bytes")]
    if peaks:
        row["peak_gib"] = max(peaks) / 2**30
    if timed:
        times = sorted(ms for event in timed for ms in event["ms"])
        halves = sorted(ms for event in timed for ms in event["backward_ms"])
        median = statistics.median(times)
        tokens, flops = timed[0]["tokens"], timed[0]["flops"]
        row |= {
            "ms": median,
            "ms_min": times[0],
            "ms_max": times[-1],
            "backward_ms": statistics.median(halves),
            "rounds_ms": [statistics.median(event["ms"]) for event in timed],
            "steps": len(times),
            "tokens_per_s": tokens / median * 1e3,
            "tflops": flops / median / 1e9,
            "mfu_percent": 100 * flops / median / 1e9 / peak_tflops,
            "losses": timed[0]["losses"],
        }
    return row


def markdown(found: Sequence[dict[str, Any]], title: str) -> str:
    """One table per group."""
    lines = [title, ""]
    for group in dict.fromkeys(row["group"] for row in found):
        members = [row for row in found if row["group"] == group]
        lines += [f"### {group}", ""]
        timed = next((row for row in members if "ms" in row), None)
        if group == "decode":
            lines += _decode_lines(members)
        elif group == "profile":
            lines += _profile_lines(members)
        else:
            lines += [
                "| | ms per step (min to max) | forward + backward ms | tokens/s | MFU % | peak GiB | "
                "tokens/s, the first over this |",
                "|---|---|---|---|---|---|---|",
            ]
            lines += [_line(row, timed) for row in members]
        lines.append("")
    return "\n".join(lines)


def _line(row: dict[str, Any], first: dict[str, Any] | None) -> str:
    peak = f"{row['peak_gib']:.1f}" if "peak_gib" in row else ""
    name = row["name"] + (f" ({row['note']})" if row["note"] else "")
    if "ms" not in row:
        return f"| {name} | {'; '.join(dict.fromkeys(row['errors']))} | | | | {peak} | |"
    failed = f"; also: {row['errors'][0]}" if row["errors"] else ""
    ratio = row["ms"] / first["ms"] if first else float("nan")
    return (
        f"| {name} | {row['ms']:.1f} ({row['ms_min']:.1f} to {row['ms_max']:.1f}, {row['steps']} steps){failed} | "
        f"{row['backward_ms']:.1f} | {row['tokens_per_s']:,.0f} | {row['mfu_percent']:.1f} | {peak} | {ratio:.3f} |"
    )


def _decode_lines(members: Sequence[dict[str, Any]]) -> list[str]:
    lines = ["| context | model | ms per token (min to max) | tokens/s | state MB |", "|---|---|---|---|---|"]
    for row in members:
        if "decode" not in row:
            lines.append(f"| {row['name']} | | {'; '.join(row['errors'])} | | |")
        for model, part in row.get("decode", {}).items():
            times = sorted(part["ms"])
            median = statistics.median(times)
            lines.append(
                f"| {row['name']} | {model} | {median:.3f} ({times[0]:.3f} to {times[-1]:.3f}) | {1e3 / median:,.0f} | "
                f"{part['state_bytes'] / 1e6:,.1f} |"
            )
    return lines


def _profile_lines(members: Sequence[dict[str, Any]]) -> list[str]:
    lines: list[str] = []
    for row in members:
        if "profile" not in row:
            lines.append(f"{row['name']}: {'; '.join(row['errors'])}")
            continue
        profile = row["profile"]
        lines += [
            f"{row['name']}: {profile['wall_ms']:.1f} ms of which kernels run {profile['busy_ms']:.1f} ms, "
            f"{profile['launches']} launches",
            "",
            "| what | ms |",
            "|---|---|",
            *(f"| {name} | {ms:.1f} |" for name, ms in profile["categories"].items()),
            "",
        ]
    return lines
