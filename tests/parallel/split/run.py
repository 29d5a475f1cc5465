"""A plan from its processes to its table."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megatron_hybrid import compat
from tests.parallel.split import driver, judge
from tests.parallel.split.cells import ONE, Cell, Job, Outcome, Plan
from tests.parallel.split.judge import Judge, Row

#: Where the table goes: this file in markdown, the same name with .json for every number.
TABLE = "MEGATRON_HYBRID_SPLIT_TABLE"
#: Seconds after which what has not run is left out, and fails.
BUDGET = "MEGATRON_HYBRID_SPLIT_BUDGET_S"


def run(plan: Plan, folder: Path, budget_s: float = 540.0) -> list[Row]:
    """All cells of a plan, and beside them one process in fp32 on the CPU; the table is printed and written."""
    exact = replace(plan, device="cpu", processes=1, jobs=(Job(ONE, ("fp32",), (0,)),), cell_limit_s=budget_s)
    began, judging = time.monotonic(), Judge()

    def take(cell: Cell, outcome: Outcome) -> None:
        judging.take(cell, outcome)
        word = outcome.error.strip().splitlines()[-1] if outcome.error.strip() else "done"
        print(f"{time.monotonic() - began:6.1f} s  {cell.layout}, {cell.recipe}: {word}", flush=True)
        if outcome.error:
            print(outcome.error, flush=True)

    drivers = [driver.Driver(each, folder / name) for name, each in (("exact", exact), ("split", plan))]
    driver.run(drivers, float(os.environ.get(BUDGET, budget_s)), take)
    rows = judging.rows()
    _report(rows, plan, time.monotonic() - began)
    return rows


def _report(rows: Sequence[Row], plan: Plan, seconds: float) -> None:
    lines = judge.table(list(rows))
    print("\n".join(["", *lines]), flush=True)
    if file := os.environ.get(TABLE):
        about = {"software": compat.software(), "processes": plan.processes, "seconds": seconds, "model": plan.model}
        Path(file).write_text("\n".join(lines) + "\n")
        Path(file).with_suffix(".json").write_text(json.dumps({**about, "rows": judge.as_data(list(rows))}, indent=1))
