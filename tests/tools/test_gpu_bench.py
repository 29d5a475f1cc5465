"""The tools that measure on a GPU, tried on CPU: memory between cases, and what an acceptance calls passed."""

from __future__ import annotations

import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core import parallel_state

from megatron_hybrid.tools.bench_kernels import errors
from megatron_hybrid.tools.fp8_acceptance import verdict
from megatron_hybrid.tools.gpu_bench import harness, peer
from megatron_hybrid.tools.gpu_bench.cases import tiny
from tests.parallel.ranks import run_ranks


def _run(tool: str, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", f"megatron_hybrid.tools.{tool}", *flags], capture_output=True, text=True
    )


def test_a_case_leaves_no_model_behind(tmp_path: Path) -> None:
    """Two models of 230 MB (weights, gradients, moments) in one process; and a case that fails is a row."""
    cases = ("--case=ours", "--case=unknown flag", "--group=8k")
    ended = _run("bench_training", "--tiny", "--output", str(tmp_path), *cases)
    assert ended.returncode == 0, ended.stderr
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert sum(event["event"] == "about" for event in events) == 1  # one process
    visits = [event for event in events if event["event"] == "end"]
    assert [("error" in visit) for visit in visits] == [False, True] * 2
    assert max(visit["left_bytes"] for visit in visits) < 2**20
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [bool(row.get("tokens_per_s")) for row in rows] == [True, False]


def _builds_an_optimizer(rank: int) -> bool:
    parallel_state.initialize_model_parallel()
    args = harness.parse("olmo-hybrid-tiny", tiny()[0].flags)
    args.padded_vocab_size = 256
    trained = harness.Trained(args, harness.read_tokens(None, 200, 1024))
    return trained.optimizer.config.store_param_remainders


def test_the_optimizer_is_the_trainers() -> None:
    """By the plugin's rules (hooks.optimizer_builder); Megatron's own would keep masters as remainders."""
    assert run_ranks(_builds_an_optimizer, 1) == [False]


@pytest.mark.parametrize("case", errors.CASES, ids=lambda case: case.what)
def test_errors_are_those_of_the_backend(case: errors.Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference in bf16's place rounds its results alone; one gradient off by a tenth is seen, in its head too."""
    sizes = (2, 16, 32)
    found = errors.one_seed(case, sizes, ("reference",), 0, "cpu")["reference"]
    assert set(found) == {"o", "q", "k", "v", "a", "b", "A_log", "dt_bias"}
    assert max(max(pair) for pair in found.values()) < 0.01
    plain = errors.gradients

    def off(forward: Any, leaves: Any, dy: torch.Tensor) -> Any:
        results = plain(forward, leaves, dy)
        if leaves["v"].dtype == torch.bfloat16:
            results["v"][:, :, 1] *= 1.1
        return results

    monkeypatch.setattr(errors, "gradients", off)
    error, worst = errors.one_seed(case, sizes, ("reference",), 0, "cpu")["reference"]["v"]
    assert 2 * found["v"][0] < error < 0.09 < worst < 0.11  # the other head is right


class _Double(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (2 * x).sum()


def _peers(rank: int) -> None:
    args = harness.parse("olmo-hybrid-tiny", tiny()[0].flags)
    args.padded_vocab_size = 256
    tokens = harness.read_tokens(None, 200, 1024)
    model = peer.huggingface(args, tokens)
    assert np.isfinite(model.step()["loss"]) and "convolution of PyTorch" in model.note()
    args.padded_vocab_size = 128
    with pytest.raises(ValueError, match="parameters, ours has"):
        peer.Peer(args, tokens, model.model, model.loss, model.what)
    args.padded_vocab_size = 256
    part, leaf = _Double(), torch.ones(2, requires_grad=True)
    compiled = peer.Peer(args, tokens, model.model, lambda *_: part(leaf), "it", compiled=True)
    compiled.step()
    with pytest.raises(RuntimeError, match="compiled nothing"):
        compiled.note()
    torch._dynamo.config.disable = False  # cpu_backend switches it off
    part.compile(backend="eager", dynamic=False)
    compiled.step()
    assert compiled.note() == "1 graphs of torch.compile; it"
    with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
        for rows in range(2, 20):
            part(torch.ones(rows))


def test_peers_name_the_missing_package_and_must_be_the_same_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "olmo_core", None)
    monkeypatch.setitem(sys.modules, "olmo_core.nn.attention", None)
    with pytest.raises(ImportError, match=r"no package olmo_core\S*: pip install ai2-olmo-core"):
        peer.olmo_core_model(Namespace(), "meta")
    run_ranks(_peers, 1)  # Megatron's arguments become its process's


@pytest.mark.parametrize("tool", ["bench_training", "fp8_acceptance"])
def test_help_and_bad_names(tool: str, tmp_path: Path) -> None:
    assert "--output" in _run(tool, "--help").stdout
    flags = {
        "bench_training": ["--case", "nothing"],
        "fp8_acceptance": ["--variant", "nothing", "--data-path", "x", "--tokenizer-model", "x"],
    }[tool]
    ended = _run(tool, *flags, "--output", str(tmp_path / "new"))
    assert ended.returncode and f"{flags[0]} 'nothing': unknown; legal: " in ended.stderr
    if tool == "fp8_acceptance":
        ended = _run(tool, *flags[2:], "--output", str(tmp_path / "new"))
        assert ended.returncode == 1 and "error: x: no such file; " in ended.stderr


def test_the_list_needs_no_folder_and_a_question_must_be_one(tmp_path: Path) -> None:
    assert "--preset olmo-hybrid-7b" in _run("bench_training", "--list").stdout
    assert "error: --output: missing" in _run("bench_training").stderr
    question = tmp_path / "question.json"
    question.write_text('{"preset": "olmo-hybrid-tiny"}')
    ended = _run("gpu_bench.gradients", str(question), "x")
    assert ended.returncode == 1 and "has no 'flags'; tools.fp8_acceptance writes such" in ended.stderr
    for tool in ("gradients", "rounding"):
        ended = _run(f"gpu_bench.{tool}", str(tmp_path / "none"), "x")
        assert ended.returncode == 1 and ended.stderr.startswith("error: ") and ended.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({}, "passed"),
        ({"final_20": 3.02}, "final loss"),
        ({"final_20": float("nan")}, "final loss"),
        ({"skipped": [120, 150, 160]}, "skipped steps that bf16 found ordinary: 160"),
        ({"resumed_equal": 19}, "resumption: 19 of 20 losses equal"),
        ({"resumed_equal": 0, "resumed_steps": 0}, "resumption: 0 of 20 losses equal"),
        ({"errors": ["run was ended"]}, "run was ended"),
    ],
)
def test_what_acceptance_calls_passed(row: dict[str, Any], said: str) -> None:
    series = {step: 1 + 0.1 * (step % 2) for step in range(200)}
    whole = {"errors": [], "final_20": 3.0, "skipped": [], "resumed_equal": 20, "resumed_steps": 20}
    whole |= {"losses": series, "norms": series | {120: float("inf"), 150: 1.3}}
    assert verdict({**whole, **row}, whole, 20) == said


def test_rounding_alone_changes_every_gradient_a_little(tmp_path: Path) -> None:
    np.random.default_rng(0).integers(0, 255, 4096, dtype=np.uint16).tofile(tmp_path / "tokens.bin")
    flags = "--seq-length 128 --micro-batch-size 1 --global-batch-size 1 --train-iters 1 --lr 1e-3 --lr-warmup-iters 0"
    question = {
        "preset": "olmo-hybrid-tiny",
        "flags": flags.split(),
        "tokenizer": ["--tokenizer-type", "NullTokenizer", "--vocab-size", "255"],
        "tokens": str(tmp_path / "tokens.bin"),
        "variants": {},
    }
    (tmp_path / "question.json").write_text(json.dumps(question))
    ended = _run("gpu_bench.rounding", str(tmp_path / "question.json"), str(tmp_path / "answer.json"))
    assert ended.returncode == 0, ended.stderr
    cosines = json.loads((tmp_path / "answer.json").read_text())["cosines"]["rounded"]
    assert len(cosines) > 40 and all(0.5 < cosine < 1 - 1e-6 for cosine in cosines.values()), cosines
