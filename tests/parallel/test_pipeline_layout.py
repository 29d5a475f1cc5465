"""Pipeline layouts: the balance is the best there is, known for the 7B, and trains to one rank's gradients."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from itertools import combinations_with_replacement, pairwise
from pathlib import Path
from typing import Any

import pytest
from megatron.core.pipeline_parallel.schedules import get_schedule_table

from megatron_hybrid import flops, model, pretrain
from megatron_hybrid.config import HybridConfig
from megatron_hybrid.flags import FlagError, compose
from megatron_hybrid.parallel import pipeline_layout
from megatron_hybrid.parallel.pipeline_layout import Costs, Plan, plan, resolve
from megatron_hybrid.parallel.pipeline_schedule import passes, play
from megatron_hybrid.parallel.pipeline_search import Row, best_cuts
from tests.parallel import tiny
from tests.parallel.compare import TOLERANCE, assert_same, differences, measure, one_rank, split
from tests.parallel.ranks import run_ranks
from tests.parallel.tiny import TWO_PERIODS, Layout

PATTERN_7B = "GGG*" * 8


def _plan_7b(tokens: int, ranks: int, chunks: int = 1) -> Plan:
    sizes = flops.Sizes.from_flags(compose("olmo-hybrid-7b", []))
    return plan(PATTERN_7B, Costs.from_flops(sizes, PATTERN_7B, tokens), ranks, chunks)


# The search


def _all_cuts(row: Row) -> Iterator[list[int]]:
    count = len(row.costs)
    for cuts in combinations_with_replacement(range(count + 1), row.segments - 1):
        layers = [end - begin for begin, end in pairwise((0, *cuts, count))]
        if all(layers[1:-1]):
            yield layers


def _objective(row: Row, layers: list[int]) -> tuple[int, int]:
    """Largest sum of a rank, then sum of squares (one chunk a rank) or largest segment (several)."""
    costs = row.segment_costs(layers)
    return max(row.rank_costs(layers)), sum(c * c for c in costs) if row.rounds == 1 else max(costs)


def _random_row(seed: int, ranks: int, rounds: int) -> Row:
    generator = random.Random(seed)
    kinds = [generator.randint(1, 30) for _ in range(generator.choice([1, 2, 3]))]
    count = generator.randint(max(1, ranks * rounds - 2), 10)
    costs = tuple(generator.choice(kinds) for _ in range(count))
    return Row(costs, generator.choice([0, 3]), generator.choice([0, 7, 40]), ranks, rounds)


@pytest.mark.parametrize(("ranks", "rounds"), [(2, 1), (3, 1), (5, 1), (2, 2), (3, 2), (2, 3), (4, 2)])
def test_no_cut_is_better(ranks: int, rounds: int) -> None:
    for seed in range(30):
        row = _random_row(seed, ranks, rounds)
        cuts = best_cuts(row, tie=0)
        assert sum(cuts.layers) == len(row.costs) and all(cuts.layers[1:-1])
        assert _objective(row, list(cuts.layers)) == min(_objective(row, layers) for layers in _all_cuts(row)), row
        assert (cuts.slowest, cuts.bound) == (max(row.rank_costs(cuts.layers)),) * 2, row


@pytest.mark.parametrize(("ranks", "rounds"), [(2, 2), (3, 2), (2, 3)])
def test_ties_stay_within_a_hundredth(ranks: int, rounds: int) -> None:
    for seed in range(30):
        row = _random_row(seed, ranks, rounds)
        row = Row(tuple(100 * cost + i for i, cost in enumerate(row.costs)), row.first, 100 * row.last, ranks, rounds)
        least = min(max(row.rank_costs(layers)) for layers in _all_cuts(row))
        assert max(row.rank_costs(best_cuts(row).layers)) <= 1.01 * least, row


# The schedule


@pytest.mark.parametrize(("ranks", "chunks", "microbatches"), [(2, 1, 4), (4, 1, 16), (4, 2, 16), (4, 3, 8), (2, 4, 6)])
def test_equal_stages_have_the_textbook_bubble(ranks: int, chunks: int, microbatches: int) -> None:
    played = play([1.0] * (ranks * chunks), ranks, microbatches, chunks=chunks)
    idle_over_busy = played.idle_share / (1 - played.idle_share)
    assert idle_over_busy == pytest.approx((ranks - 1) / (microbatches * chunks))
    assert played.imbalance_share == pytest.approx(0)


def test_order_of_interleaved_passes_is_megatrons() -> None:
    ranks, chunks, microbatches = 4, 3, 8
    order = list(passes(1, ranks, chunks, microbatches))
    forward = [(microbatch, chunk) for back, microbatch, chunk in order if not back]
    assert forward == get_schedule_table(microbatches, chunks, ranks)
    assert order.index((True, 0, chunks - 1)) == (ranks - 1 - 1) * 2 + (chunks - 1) * ranks + 1


def test_a_slow_rank_makes_the_others_wait() -> None:
    """Two ranks, the second twice as slow: 8 · 6 for it, and the first's first pass and last pass around that."""
    played = play([1.0, 2.0], 2, 8)
    assert played.time == 1 + 8 * 6 + 2
    assert played.busy == (24, 48)


# The 7B

#: (tokens, ranks, virtual stages): layers of each segment, slowest rank over the mean.
KNOWN = {
    (8192, 2, 1): ((17, 15), 1.007),
    (8192, 4, 1): ((9, 8, 8, 7), 1.066),
    (8192, 8, 1): ((5, 4, 4, 4, 4, 4, 4, 3), 1.185),
    (8192, 16, 1): ((2, 3, *[2] * 13, 1), 1.421),
    (65536, 2, 1): ((17, 15), 1.006),
    (65536, 4, 1): ((9, 8, 8, 7), 1.053),
    (65536, 8, 1): ((5, 4, 4, 4, 4, 4, 4, 3), 1.149),
    (65536, 16, 1): ((3, 1) * 8, 1.443),
    (65536, 4, 2): ((4, 5, 4, 5, 5, 4, 4, 1), 1.053),
}


@pytest.mark.parametrize("case", KNOWN, ids=lambda case: "T{}-pp{}-vpp{}".format(*case))
def test_layouts_of_the_7b(case: tuple[int, int, int]) -> None:
    layers, imbalance = KNOWN[case]
    started = time.perf_counter()
    planned = _plan_7b(*case)
    assert time.perf_counter() - started < 1.0
    assert tuple(map(len, planned.segments)) == layers
    assert planned.imbalance == pytest.approx(imbalance, abs=1e-3)
    assert planned.pattern.replace("|", "") == PATTERN_7B


def test_long_sequences_give_attention_a_stage_of_its_own() -> None:
    """At 65,536 tokens an attention layer costs as much as two of Gated DeltaNet; 16 stages split every period."""
    assert _plan_7b(8192, 16).segments[:3] == ("GG", "G*G", "GG")
    assert _plan_7b(65536, 16).segments == ("GGG", "*") * 8


def test_planned_7b_beats_equal_layer_counts() -> None:
    sizes = flops.Sizes.from_flags(compose("olmo-hybrid-7b", []))
    output = sum(flops.output_parts(sizes).values())
    layer = {symbol: sum(flops.layer_parts(sizes, symbol, 8192).values()) for symbol in "G*"}
    equal = 6 * layer["G"] + 2 * layer["*"] + output  # the last of four stages
    total = 24 * layer["G"] + 8 * layer["*"] + output
    assert equal * 4 / total == pytest.approx(1.158, abs=1e-3)
    assert _plan_7b(8192, 4).imbalance < 1.07


def test_a_large_output_layer_may_stand_alone() -> None:
    planned = plan("GGG*", Costs(({"g": 1.0},) * 4, {"embedding": 0.0}, {"output": 5.0}, "ms"), 3)
    assert planned.segments == ("GG", "G*", "")


def test_parts_add_up() -> None:
    planned = _plan_7b(8192, 4, 2)
    whole = flops.model_parts(flops.Sizes.from_flags(compose("olmo-hybrid-7b", [])), PATTERN_7B, 8192)
    for name, value in whole.items():
        held = sum(parts.get(name, 0) for parts in planned.parts)
        assert held == pytest.approx(3 * value / 1e9), name
    assert sum(planned.rank_costs) == pytest.approx(sum(planned.segment_costs))


# Command and flag


def _command(*words: str) -> None:
    pipeline_layout.main(["--preset", "olmo-hybrid-7b", *words])


def test_command_prints_table_prediction_and_pattern(capsys: pytest.CaptureFixture[str]) -> None:
    _command("--pipeline-model-parallel-size", "4", "--virtual-stages", "2", "--microbatches", "16")
    said = capsys.readouterr().out
    for part in ("gdn_rule", "attn_core", "mlp", "embedding", "output", "prediction from FLOPs", "16 microbatches"):
        assert part in said
    assert said.splitlines()[-1] == f"--hybrid-layer-pattern '{_plan_7b(8192, 4, 2).pattern}'"


def test_measured_costs_replace_flops(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "costs.json"
    file.write_text(json.dumps({"G": {"mixer": 4, "mlp": 6}, "*": 2, "embedding": 1, "output": 40}))
    _command("--pipeline-model-parallel-size", "2", "--costs", str(file))
    said = capsys.readouterr().out
    assert "ms per microbatch" in said and "mixer" in said and "prediction from measured times" in said
    # 297 ms in all; 14 GDN and 4 attention layers with the embedding are 149 ms, the rest 148
    assert f"--hybrid-layer-pattern '{PATTERN_7B[:18]}|{PATTERN_7B[18:]}'" in said


REFUSED = [
    (["--pipeline-model-parallel-size", "35"], ["--pipeline-model-parallel-size 35", "32 layers", "nearest legal: 34"]),
    (["--pipeline-model-parallel-size", "0"], ["--pipeline-model-parallel-size 0", "nearest legal: 1"]),
    (["--pipeline-model-parallel-size", "two"], ["--pipeline-model-parallel-size", "'two'"]),
    (["--pipeline-model-parallel-size", "4", "--virtual-stages", "9"], ["--virtual-stages 9", "nearest legal: 8"]),
    (["--virtual-stages", "2"], ["--virtual-stages 2", "--pipeline-model-parallel-size 1", "nearest legal: 1"]),
    (
        ["--pipeline-model-parallel-size", "4", "--virtual-stages", "2", "--microbatches", "30"],
        ["--microbatches 30", "multiple of --pipeline-model-parallel-size 4", "nearest legal: 32"],
    ),
    (["--hybrid-layer-pattern", "GG|GG"], ["--hybrid-layer-pattern GG|GG", "give GGGG"]),
    (["--hybrid-layer-pattern", "GM"], ["--hybrid-layer-pattern GM"]),
    (["--seq-length", "0"], ["--seq-length 0"]),
    (["--costs", "nowhere.json"], ["--costs nowhere.json"]),
    (["--preset", "olmo-hybrid-8b"], ["--preset olmo-hybrid-8b", "nearest: olmo-hybrid-7b"]),
]


@pytest.mark.parametrize(("words", "said"), REFUSED, ids=lambda value: "_".join(value)[:60])
def test_command_refuses_in_one_line(words: list[str], said: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        _command(*words)
    assert stop.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ")
    for part in said:
        assert part in lines[0]


@pytest.mark.parametrize(
    ("costs", "said"),
    [
        ({"G": 1, "*": 1, "embedding": 0}, "'output' is missing"),
        ({"G": 0, "*": 1, "embedding": 0, "output": 1}, "more than 0"),
        ({"G": "1", "*": 1, "embedding": 0, "output": 1}, "'1' is no time in ms"),
        ({"G": 1, "*": 1, "embedding": 0, "output": 1, "M": 1}, "'M' is unknown"),
        ([], "is missing"),
    ],
    ids=["missing", "zero", "text", "unknown", "list"],
)
def test_costs_that_cannot_be_used(costs: Any, said: str, tmp_path: Path) -> None:
    file = tmp_path / "costs.json"
    file.write_text(json.dumps(costs))
    with pytest.raises(FlagError, match=said):
        Costs.from_file(file, PATTERN_7B, flops.Sizes.from_flags(compose("olmo-hybrid-7b", [])))


@pytest.mark.parametrize(("layout", "chunks"), [("auto", 1), ("auto:2", 2)])
def test_auto_rewrites_the_pattern(layout: str, chunks: int, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        flags = ["--pipeline-layout", layout, "--pipeline-model-parallel-size", "4", "--print-args"]
        pretrain.prepare(["--preset", "olmo-hybrid-7b", *flags])
    assert stop.value.code == 0
    captured = capsys.readouterr()
    pattern = _plan_7b(8192, 4, chunks).pattern
    printed = captured.out.splitlines()
    assert [line for line in printed if "pattern" in line] == [f"--hybrid-layer-pattern {pattern}"]
    assert not [line for line in printed if "pipeline-layout" in line]
    assert pattern in captured.err and "100,352 rows" in captured.err


def test_auto_on_one_stage_and_pattern_change_nothing() -> None:
    flags = compose("olmo-hybrid-7b", [])
    assert resolve([*flags, "--pipeline-layout", "auto"]) == (flags, None)
    assert resolve([*flags, "--pipeline-layout=pattern"]) == (flags, None)
    assert resolve(flags) == (flags, None)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--pipeline-layout", "even"], r"--pipeline-layout even: nearest legal: auto; legal: pattern, auto, auto:V"),
        (["--pipeline-layout", "auto:"], r"--pipeline-layout auto:: nearest legal: auto"),
        (["--pipeline-layout", "auto:0", "--pipeline-model-parallel-size", "4"], r"auto:0.*nearest legal: 1"),
        (["--pipeline-layout", "auto:2"], r"--pipeline-layout auto:2\) with --pipeline-model-parallel-size 1"),
        (
            ["--pipeline-layout", "auto", "--pipeline-model-parallel-size", "2", "--hybrid-layer-pattern", "G|*"],
            r"--hybrid-layer-pattern G\|\*: --pipeline-layout auto sets the \| itself; give G\*, or leave",
        ),
    ],
    ids=["unknown", "no_number", "no_stage", "virtual_without_pipeline", "pattern_has_stages"],
)
def test_auto_refuses(given: list[str], said: str) -> None:
    with pytest.raises(FlagError, match=said):
        resolve(compose("olmo-hybrid-7b", given))


def test_unplanned_auto_is_not_ignored() -> None:
    """A script that parses the flag but does not plan must not train another layout in silence."""
    with pytest.raises(ValueError, match=r"only megatron_hybrid\.pretrain plans a layout"):
        HybridConfig(pipeline_layout="auto")


# Real ranks


def _layout(pattern: str, **more: Any) -> Layout:
    """Of four microbatches: interleaved stages reach their steady state with these."""
    return Layout(pattern=pattern, microbatches=4, **more)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("weights") / "reference"


@pytest.fixture(scope="module")
def reference(weights: Path) -> dict[str, Any]:
    return run_ranks(one_rank, 1, weights, None, _layout(TWO_PERIODS))[0]


def _planned(ranks: int, chunks: int, output: float) -> str:
    """A layout for tiny layers: attention a little dearer, an output layer worth `output` layers."""
    layers = tuple({"g": 1.0} if symbol == "G" else {"a": 1.3} for symbol in TWO_PERIODS)
    return plan(TWO_PERIODS, Costs(layers, {"embedding": 0.0}, {"output": output}, "ms"), ranks, chunks).pattern


INTERLEAVED = "GG|G*|GGG|*"
RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
LAYOUTS = {
    "uneven": (_layout(_planned(2, 1, 2.0), pp=2), "GGG*G|GG*"),
    "interleaved": (_layout(_planned(2, 2, 1.0), pp=2), INTERLEAVED),
    "four_stages_split_a_period": (_layout(_planned(4, 1, 1.0), pp=4), "GGG|*G|GG|*"),
    "output_layer_alone": (_layout(_planned(3, 1, 6.0), pp=3), "GGG*|GGG*|"),
    "output_layer_alone-recompute": (_layout(_planned(3, 1, 6.0), pp=3, overrides=RECOMPUTE), "GGG*|GGG*|"),
    "interleaved-tp2-distopt": (_layout(INTERLEAVED, tp=2, pp=2, distributed_optimizer=True), INTERLEAVED),
    "embedding_and_output_alone-interleaved": (_layout("|GGG*|GGG*|", pp=2), "|GGG*|GGG*|"),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_planned_layout_trains_as_one_rank(name: str, reference: dict[str, Any], weights: Path) -> None:
    layout, expected = LAYOUTS[name]
    assert layout.pattern == expected
    assert_same(reference, run_ranks(split, layout.ranks, layout, weights))


def test_an_inner_stage_needs_a_layer(reference: dict[str, Any], weights: Path) -> None:
    """Why the planner leaves none empty: Megatron's checkpoint has nothing for a stage without parameters."""
    layout = _layout("GGG*||GGG*", pp=3)
    with pytest.raises(AssertionError, match="KeyError"):
        run_ranks(split, layout.ranks, layout, weights, None, "")


def _interleaved_in_batches(rank: int, folder: Path, checked: bool) -> dict[str, Any]:
    layout = _layout(INTERLEAVED, pp=2, overrides={"overlap_p2p_comm": False, "batch_p2p_comm": True})
    if not checked:
        model._check_interleaving = lambda config, pattern: None
    chunks = tiny.build(layout)
    tiny.load_weights(chunks, folder)
    return measure(layout, chunks)


def test_interleaved_stages_on_two_ranks_need_overlapped_messages(reference: dict[str, Any], weights: Path) -> None:
    with pytest.raises(AssertionError, match=r"overlap_p2p_comm=False with pipeline size 2 and 4 stages"):
        run_ranks(_interleaved_in_batches, 2, weights, True)
    unchecked = run_ranks(_interleaved_in_batches, 2, weights, False)
    assert max(differences(reference, unchecked).values()) > 100 * TOLERANCE
