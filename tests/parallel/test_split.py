"""The comparison of `test_split_gpu.py` where there is no GPU: over gloo, with the reference kernels, tiny, and FP8's
rounding emulated. What it proves of the GPU's is the path; layouts have their own tests."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.parallel.split.cells import CPU_MODEL, LAYOUTS, Job, Layout, Plan, schedule
from tests.parallel.split.judge import Row
from tests.parallel.split.run import TABLE, run

TP, PP, DP = (next(layout for layout in LAYOUTS if layout.name.startswith(name)) for name in ("TP 2", "PP 2", "DP 2"))
REMEDY = "head norm gradient stays on its rank"
MISSING = replace(TP, name="TP 2, without a remedy")
REFUSED = Layout("CP 2 over five heads", cp=2, flags=("--linear-num-key-heads", "5"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Row]:
    folder = tmp_path_factory.mktemp("split")
    jobs = schedule(2, ("bf16", "rounded"), (TP, PP, DP))
    jobs += (
        Job(REFUSED, ("bf16",), (0, 1)),
        Job(MISSING, ("bf16", "rounded"), (0, 1), REMEDY),
    )
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv(TABLE, str(folder / "table.md"))
        found = run(Plan("cpu", CPU_MODEL, 2, jobs, steps=2), folder / "run")
    assert (folder / "table.md").read_text().count("\n") == 2 + len(found)
    return {(row.layout, row.recipe): row for row in found}


def test_split_as_one_process(rows: dict[tuple[str, str], Row]) -> None:
    for layout in (TP, PP, DP):
        for recipe in ("bf16", "rounded"):
            assert rows[layout.name, recipe].verdict == "same", rows[layout.name, recipe]
    assert rows[TP.name, "rounded"].distance > 5 * rows[TP.name, "bf16"].distance


def test_a_gradient_that_is_not_summed_over_ranks_is_named(rows: dict[tuple[str, str], Row]) -> None:
    for recipe in ("bf16", "rounded"):
        row = rows[MISSING.name, recipe]
        assert "out_norm" in row.worst_tensor and f"gradient of {row.worst_tensor}" in row.verdict


def test_a_cell_that_fails_does_not_take_others_with_it(rows: dict[tuple[str, str], Row]) -> None:
    assert rows[REFUSED.name, "bf16"].error
    assert rows[MISSING.name, "bf16"].loss == pytest.approx(rows[TP.name, "bf16"].loss, rel=1e-3)
