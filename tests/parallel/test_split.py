"""The comparison of `test_split_gpu.py` where there is no GPU: over gloo, with the reference kernels, tiny, and FP8's
rounding emulated. What it proves of the GPU's is the path; layouts have their own tests."""

from __future__ import annotations

import os
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from megatron.core import parallel_state, tensor_parallel

from megatron_hybrid.layer_specs.olmo_hybrid import build_stack_spec
from megatron_hybrid.model import config_from_args, model_from_args
from megatron_hybrid.tools.gpu_bench import harness
from megatron_hybrid.tools.gpu_bench.cases import words
from tests.parallel import tiny
from tests.parallel.ranks import run_ranks
from tests.parallel.split import model
from tests.parallel.split.cells import (
    CPU_MODEL,
    GPU_MODEL,
    LAYOUTS,
    ONE_RANK_FAILS,
    Cell,
    Job,
    Layout,
    Outcome,
    Plan,
    schedule,
)
from tests.parallel.split.driver import Driver
from tests.parallel.split.driver import run as run_drivers
from tests.parallel.split.judge import Row
from tests.parallel.split.run import TABLE, run

TP, PP, DP = (next(layout for layout in LAYOUTS if layout.name.startswith(name)) for name in ("TP 2", "PP 2", "DP 2"))
REMEDY = "head norm gradient stays on its rank"
MISSING = replace(TP, name="TP 2, without a remedy")
FIVE_HEADS = words("--gdn-cp-comm-type a2a --linear-num-key-heads 5 --linear-num-value-heads 5")
REFUSED = Layout("CP 2 of five heads", cp=2, flags=FIVE_HEADS)


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
        assert row.step_bound == rows[TP.name, recipe].step_bound  # what is wrong in bf16 allows FP8 no more
        assert "out_norm" in row.worst_tensor and f"gradient of {row.worst_tensor}" in row.verdict


def test_a_cell_that_fails_does_not_take_others_with_it(rows: dict[tuple[str, str], Row]) -> None:
    assert "--gdn-cp-comm-type a2a: --context-parallel-size 2 does not divide" in rows[REFUSED.name, "bf16"].error
    assert rows[MISSING.name, "bf16"].loss == pytest.approx(rows[TP.name, "bf16"].loss, rel=1e-3)


def test_processes_that_wait_for_one_that_failed_are_started_again(tmp_path: Path) -> None:
    jobs = (Job(PP, ("bf16",), (0, 1), ONE_RANK_FAILS), Job(replace(PP, name="next"), ("bf16",), (0, 1)))
    found: dict[Cell, Outcome] = {}
    plan = Plan("cpu", CPU_MODEL, 2, jobs, steps=0, grace_s=1.0)
    run_drivers([Driver(plan, tmp_path / "run")], 150.0, found.__setitem__)
    failed, went_on = found[Cell(PP.name, "bf16")], found[Cell("next", "bf16")]
    assert failed.error.startswith("hung\nrank 1: ") and ONE_RANK_FAILS in failed.error
    assert "all_gather_object" in failed.error  # where the other one stood
    assert not went_on.error and len(went_on.found) == 2


def _te_and_local(rank: int, tp: int) -> dict[str, Any]:
    """Weights of the GPU's model under TP, of Transformer Engine's modules and of local ones."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(tp))
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp)
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    layout, found = Layout("", tp=tp), {}
    for name in ("local", "transformer_engine"):
        args = harness.parse("olmo-hybrid-7b", [*GPU_MODEL, *layout.arguments, "--transformer-impl", "local"])
        with patch("torch.cuda.is_available", return_value=True):
            whole = model_from_args(args, config_from_args(args), build_stack_spec(None, name))
        model.fill(whole)
        found[name] = model.parts(whole, dict(whole.named_parameters()))
    return found


@pytest.mark.skipif(not find_spec("transformer_engine"), reason="Transformer Engine is not installed here")
@pytest.mark.parametrize("tp", [2, 4])
def test_every_weight_has_its_place_in_modules_of_transformer_engine(tp: int) -> None:
    ranks = run_ranks(_te_and_local, tp, tp)
    for name in ("local", "transformer_engine"):
        whole = tiny.assemble([rank[name] for rank in ranks])
        assert len(whole) == 3 * 17 + 8 + 3 and all(
            torch.equal(tensor, model.weight(key, tuple(tensor.shape))) for key, tensor in whole.items()
        )
