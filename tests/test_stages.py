"""Presets of the released run's stages and of the ladder, against Ai2's tables; the plan that --dry-run prints."""

from __future__ import annotations

import argparse
from types import SimpleNamespace
from typing import Any

import pytest
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_hybrid import plan, pretrain
from megatron_hybrid.flags import check, compose
from megatron_hybrid.flops import OLMO_VOCABULARY_ROWS, parameters
from megatron_hybrid.ladder import KINDS, SIZES, batch_tokens
from megatron_hybrid.presets import PRESETS
from megatron_hybrid.training.schedule import WsdsScheduler

SECOND = 2.0712352850360292e-4

#: Sequence, tokens a step, peak and last rate, style, warm-up, decay, z-loss, steps, positions, seed.
STAGES = {
    "": (8192, 4194304, 3e-4, 3e-5, "cosine", 2000, 0.1, 1e-5, 1414078, "rope", 34521),
    "-midtrain-1": (8192, 4194304, SECOND, 0, "linear", 0, 0.1, 1e-5, 23842, "rope", 1337),
    "-midtrain-2": (8192, 4194304, SECOND, 0, "linear", 0, 0.1, 1e-5, 23842, "rope", 683),
    "-long-context": (65536, 4194304, SECOND, 0, "linear", 200, 0.1, 1e-5, 23842, "none", 34521),
    "-long-context-yarn": (65536, 4194304, SECOND, 0, "linear", 200, 0.1, 1e-5, 23842, "yarn", 34521),
    "-sft-think": (32768, 2097152, 2.5e-5, 0, "linear", 1392, 0.0, 0.0, 46412, "none", 34521),
    "-sft-instruct": (32768, 2097152, 2.5e-5, 0, "linear", 97, 0.0, 0.0, 3243, "none", 34521),
}


@pytest.mark.parametrize("stage", STAGES)
def test_stage_as_in_the_table(stage: str) -> None:
    preset = PRESETS[f"olmo-hybrid-7b{stage}"]
    batch = int(preset["global-batch-size"]) * int(preset["seq-length"])  # type: ignore[arg-type]
    names = ("lr", "min-lr", "lr-decay-style", "lr-warmup-iters", "weight-decay", "z-loss", "train-iters")
    names += ("position-embedding-type", "seed")
    assert (preset["seq-length"], batch, *(preset[name] for name in names)) == STAGES[stage]
    shared = ("adam-beta1", "adam-beta2", "adam-eps", "clip-grad", "micro-batch-size", "weight-decay-on", "rotary-base")
    assert [preset[name] for name in shared] == [0.9, 0.95, 1e-8, 1.0, 1, "all_but_embedding", 500000]
    assert (
        preset["skip-step"] and preset["no-last-target"] and preset["max-position-embeddings"] == preset["seq-length"]
    )
    check([*compose(f"olmo-hybrid-7b{stage}", []), "--mock-data"])


#: Parameters without the input embedding, from OLMo-core's ladder scripts.
COUNTS = {
    "3to1": [72_889_824, 130_262_928, 254_430_936, 523_022_720, 721_836_672, 947_913_600, 1_481_856_384],
    "1to1": [67_733_952, 120_754_272, 233_072_016, 472_435_968, 663_879_168],
    "7to1": [75_467_760, 133_432_480, 261_550_576, 548_316_096, 750_815_424, 979_529_152],
    "middle": [70_311_888, 127_093_376, 247_311_296, 510_376_032, 707_347_296],
    "gdn": [78_045_696, 139_771_584, 275_789_856, 573_609_472, 779_794_176],
    "transformer": [57_422_208, 101_736_960, 190_354_176, 371_262_464, 547_964_160, 758_220_288],
}


@pytest.mark.parametrize("kind", KINDS)
def test_ladder_has_ai2s_parameters(kind: str) -> None:
    found = []
    for size, (hidden, *_) in SIZES.items():
        flags = compose(f"ladder-{size}-{kind}", [])
        check([*flags, "--mock-data"])
        found.append(parameters(flags) - OLMO_VOCABULARY_ROWS * hidden)
    assert found[: len(COUNTS[kind])] == COUNTS[kind]


def test_patterns() -> None:
    patterns = [PRESETS[f"ladder-100m-{kind}"]["hybrid-layer-pattern"] for kind in KINDS]
    assert patterns == ["GGG*" * 3, "G*" * 6, "GGGGGGG*GGG*", "GGGG***GGGG*", "G" * 12, "*" * 12]


#: Rates, batches in tokens and beta2 of the 3:1 hybrids.
LADDER = {
    "60m": (2.68e-3, 252123, 0.99),
    "100m": (2.21e-3, 371291, 0.99),
    "190m": (1.77e-3, 580159, 0.95),
    "370m": (1.39e-3, 937953, 0.95),
    "600m": (1.25e-3, 1162680, 0.95),
    "760m": (1.14e-3, 1394269, 0.95),
    "1b": (9.82e-4, 1878040, 0.95),
}


@pytest.mark.parametrize("size", LADDER)
def test_ladder_as_in_the_table(size: str) -> None:
    preset: Any = PRESETS[f"ladder-{size}-3to1"]
    n = parameters(compose(f"ladder-{size}-3to1", [])) - OLMO_VOCABULARY_ROWS * preset["hidden-size"]
    rate, target, beta2 = LADDER[size]
    assert preset["lr"] == pytest.approx(rate, rel=3e-3) and batch_tokens(n) == target and preset["adam-beta2"] == beta2
    batch = preset["global-batch-size"] * 8192
    assert abs(batch - target) <= 4 * 8192
    ends = [int(end) * batch / (20 * n) for end in preset["wsds-periods"].split(",")]
    assert ends == pytest.approx([0.5, 1, 2, 4, 8], rel=1e-3)
    assert preset["lr-warmup-iters"] * batch == pytest.approx(n, rel=1e-2)


@pytest.mark.parametrize("preset", ["olmo-hybrid-7b", "olmo-hybrid-7b-long-context", "ladder-60m-gdn"])
def test_the_plans_rates_are_the_schedulers(preset: str) -> None:
    v: argparse.Namespace = plan._peek(compose(preset, []))
    kind, more = (OptimizerParamScheduler, {})
    if v.wsds_periods:
        kind, more = WsdsScheduler, {"ends": [int(end) for end in v.wsds_periods.split(",")], "wsd_decay_steps": 1}
    group: dict[str, Any] = {}
    scheduler = kind(
        SimpleNamespace(param_groups=[group]), 0.0, v.lr, v.min_lr, v.lr_warmup_iters, v.train_iters, v.lr_decay_style,
        0.1, 0.1, 1, "constant", use_checkpoint_opt_param_scheduler=False, **more,
    )  # fmt: skip
    last = 0
    for step in (0, 1, v.lr_warmup_iters, v.train_iters // 3, v.train_iters // 2, v.train_iters - 7, v.train_iters):
        scheduler.step(step - last)
        last = step
        assert plan.learning_rate(v, step) == pytest.approx(group["lr"], rel=1e-12, abs=1e-18), step


def test_dry_run_prints_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--dry-run", "--gpus", "16", "--tensor-model-parallel-size", "2", "--weight-decay", "0.2"]
    with pytest.raises(SystemExit) as stop:
        pretrain.prepare(["--preset", "olmo-hybrid-7b", *given])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    for part in (
        "1,414,078 = 5,931,073,011,712 tokens; data seed 34521",
        "cosine: first 0, peak 0.0003 at 2,000, last 3e-05 at 1,414,078",
        "7,430,870,688; without the input embedding 7,045,519,008",
        "weights 6.92, gradients 14.46, optimizer 5.19",
        "--weight-decay: 0.2 instead of 0.1",
    ):
        assert part in printed


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            ["--gpus", "7", "--tensor-model-parallel-size", "2"],
            "--gpus 7: must be a multiple of --tensor-model-parallel-size 2 times",
        ),
        (["--gpus", "3"], "--global-batch-size 512: must be a multiple of 3 data-parallel ranks"),
    ],
)
def test_dry_run_refuses_in_one_line(given: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        pretrain.prepare(["--preset", "olmo-hybrid-7b", "--dry-run", *given])
    assert stop.value.code == 2 and said in capsys.readouterr().err
