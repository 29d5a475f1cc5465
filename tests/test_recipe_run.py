"""The recipe in the trainer itself: what the log line and TensorBoard say, resumed schedule and SkipStep window."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_hybrid import pretrain
from megatron_hybrid.presets import PRESETS
from megatron_hybrid.tools.plot_run import read_series
from megatron_hybrid.training.log_line import Wait, peak_tflops
from megatron_hybrid.training.skip_step import SkipStep
from tests.parallel.ranks import run_ranks
from tests.test_pretrain import _arguments, _train, data

__all__ = ["data"]  # the fixture

WSDS = ["--wsds-periods", "3,6", "--lr-decay-style", "WSD", "--lr-wsd-decay-style", "linear", "--lr-wsd-decay-iters"]
WSDS += ["1", "--lr-warmup-iters", "1", "--min-lr", "0"]

#: Must not change a bit.
RECOMPUTE = ["--recompute-granularity", "selective", "--recompute-modules", "gdn_norm_out", "mlp"]

FIELDS = ("lm loss", "z loss", "skipped steps", "tokens/s/GPU", "MFU (%)", "data wait (%)", "ETA (h)", "gdn decay")
FIELDS += ("gdn beta saturated", "gdn state norm", "grad norm gdn", "grad norm attention")


def _field(line: str, name: str) -> float:
    found = re.search(rf" {re.escape(name)}: ([^ ]+) \|", line)
    assert found, f"{name} is not in {line}"
    return float(found.group(1))


def test_the_log_says_it_and_a_resumed_run_says_the_same(
    data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    layout = ["--tensor-model-parallel-size", "2", "--use-distributed-optimizer", "--bf16", "--peak-tflops", "0.5"]
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    run_ranks(_train, 2, _arguments(data, straight, *layout, *WSDS, "--save-interval", "100"))
    printed = capfd.readouterr().out
    assert printed.count("MFU = tokens/s/GPU * ") == 1 and "/ 0.5 TFLOP/s (--peak-tflops, dense bf16)" in printed
    gflop = float(printed.split("MFU = tokens/s/GPU * ")[1].split(" GFLOP")[0])
    lines = [line for line in printed.splitlines() if " iteration " in line and "consumed samples" in line]
    assert len(lines) == 6
    for line in lines:
        values = {name: _field(line, name) for name in FIELDS}
        elapsed = _field(line, "elapsed time per iteration (ms)") / 1000
        speed, iteration = values["tokens/s/GPU"], int(line.split(" iteration ")[1].split("/")[0])
        assert 0.5 < speed / (4 * 64 / elapsed / 2) < 2  # two looks at the clock, on a busy machine
        assert values["ETA (h)"] * 3600 == pytest.approx((6 - iteration) * 4 * 64 / (2 * speed), rel=1e-4)
        assert values["MFU (%)"] == pytest.approx(100 * speed * gflop * 1e9 / 0.5e12, rel=1e-3)
        assert 0 < values["gdn decay"] < 1 and 0 <= values["data wait (%)"] < 100
        # Megatron's fields, untouched
        assert re.search(r" learning rate: \d\.\d{6}E[+-]\d\d \| global batch size: +4 \| lm loss: ", line)
        assert re.search(
            r"loss scale: 1\.0 \| grad norm: .* \| number of skipped iterations: +0 \| number of nan", line
        )
    run_ranks(
        _train,
        2,
        _arguments(data, resumed, *layout, *WSDS, "--save-interval", "100", "--exit-interval", "4", *RECOMPUTE),
    )
    assert "SkipStep: no window" not in capfd.readouterr().out
    run_ranks(_train, 2, _arguments(data, resumed, *layout, *WSDS, "--save-interval", "100"))
    assert "SkipStep: no window" not in capfd.readouterr().out
    expected, found = (read_series(run / "tensorboard") for run in (straight, resumed))
    for tag in ("lm loss", "z loss", "learning-rate", "skipped steps", "gdn decay/layer 3", "grad norm attention"):
        assert list(expected[tag].steps) == list(range(1, 7))
        np.testing.assert_array_equal(found[tag].values, expected[tag].values, err_msg=tag)
    peak = PRESETS["olmo-hybrid-tiny"]["lr"]  # what TensorBoard has at i is the rate of the next step
    assert expected["learning-rate"].values == pytest.approx([peak, peak, 0, peak, peak, 0])


STAGES = [name for name in PRESETS if name.startswith("olmo-hybrid-7b")] + ["ladder-60m-3to1", "ladder-60m-gdn"]


def _parsed(rank: int, names: list[str]) -> dict[str, Any]:
    found = {}
    for name in names:
        more = ["--mock-data", "--tokenizer-type", "NullTokenizer", "--vocab-size", "100277", "--eval-iters", "0"]
        args = pretrain.parse([*pretrain.compose(name, more), *pretrain.compat.backend_flags([])])
        found[name] = (args.position_embedding_type, args.lr, args.min_lr, args.rotary_scaling_factor)
        _forget()
    return found


def _forget() -> None:
    """Megatron parses once a process."""
    from megatron.training import global_vars

    global_vars.unset_global_variables()


def test_megatron_takes_every_stages_flags() -> None:
    for name, (positions, lr, least, factor) in run_ranks(_parsed, 1, STAGES)[0].items():
        assert (positions, lr, least) == tuple(
            PRESETS[name][key] for key in ("position-embedding-type", "lr", "min-lr")
        )
        assert factor == PRESETS[name].get("rotary-scaling-factor", 1.0)


def test_waiting_is_counted_and_nothing_else() -> None:
    import time

    def slow() -> Any:
        for i in range(3):
            time.sleep(0.02)
            yield i

    wait, batches = Wait(), slow()
    for expected in range(3):
        assert next(wait.timed(batches)) == expected
        time.sleep(0.02)
    assert 0.055 < wait.seconds < 0.1


def test_peak_is_the_flag_or_unknown_here() -> None:
    assert peak_tflops(3.0) == (3.0, "--peak-tflops") and peak_tflops(0)[0] == 0


def _counted(rank: int, arguments: list[str]) -> list[float]:
    """Tokens in the denominator of each microbatch."""
    seen: list[float] = []
    observe = SkipStep.observe

    def counting(self: SkipStep, loss_and_tokens: Any) -> None:
        seen.append(float(loss_and_tokens[1]))
        observe(self, loss_and_tokens)

    SkipStep.observe = counting  # type: ignore[method-assign]
    _train(rank, arguments)
    return seen


def test_a_sample_has_one_target_less_than_tokens(data: Path, tmp_path: Path) -> None:
    """Samples of 64 tokens, two in a microbatch; on context-parallel ranks the last position is rank 0's."""
    short = ["--train-iters", "1", "--lr-warmup-iters", "0"]
    assert run_ranks(_counted, 1, _arguments(data, tmp_path / "inner", *short))[0] == [126, 126]
    assert run_ranks(_counted, 1, _arguments(data, tmp_path / "all", *short, "--last-target"))[0] == [128, 128]
    parts = run_ranks(_counted, 2, _arguments(data, tmp_path / "cp", *short, "--context-parallel-size", "2"))
    assert parts == [[62, 62], [64, 64]]
