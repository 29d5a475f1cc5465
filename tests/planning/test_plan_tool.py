"""`tools.plan` as typed: refusals in one line, verdicts, the search; without torch or numpy."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_hybrid.planning import hardware
from megatron_hybrid.planning.job import Job
from megatron_hybrid.tools import plan

ROOT = Path(__file__).resolve().parents[2]
H100 = ["--gpu", "H100", "--gpus", "512", "--preset", "olmo-hybrid-7b"]


def _run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    status = 0
    try:
        plan.main(words)
    except SystemExit as stop:
        status = int(stop.code or 0)
    said = capsys.readouterr()
    return status, said.out, said.err


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("--tensor-model-parallel-size 3", "--gpus 512: must be a multiple of --tensor-model-parallel-size 3"),
        ("--tensor-model-parallel-size 32", "--tensor-model-parallel-size 32: must be at least 1 and at most"),
        ("--global-batch-size 500", "--global-batch-size 500: must be a multiple of 512 data-parallel ranks"),
        ("--micro-batch-size 2", "nearest legal: 1024, or --micro-batch-size 1"),
        ("--context-parallel-size 2 --seq-length 8190", "--context-parallel-size 2: --seq-length 8190 must be"),
        (
            "--pipeline-model-parallel-size 4 --pipeline-layout auto:2 --tensor-model-parallel-size 4 "
            "--sequence-parallel --micro-batch-size 2 --global-batch-size 576",
            "must be a multiple of --pipeline-model-parallel-size 4; nearest legal: 512",
        ),
        ("--vocab-size 100278 --padded-vocab-size 100000", "--padded-vocab-size 100000: smaller than --vocab-size"),
        ("--fp8-format e4m3 --fp8-recipe mxfp8", "--fp8-recipe mxfp8: not on H100; nearest legal: blockwise"),
        ("--fp4-format e2m1", "--fp4-format e2m1: not on H100; nearest legal: blockwise"),
        (
            "--tensor-model-parallel-size 4 --fp8-format hybrid --fp8-recipe tensorwise --fp8-param-gather",
            "--fp8-param-gather: not supported where tensor parallelism pads, as --tensor-model-parallel-size 4 does",
        ),
        ("--fp8-format hybrid --ffn-hidden-size 11000", "the MLP (--ffn-hidden-size, columns of linear_fc2) has 11000"),
        ("", "--gpu H100: 81."),
        (
            "--without bf16",
            "--gdn-backend auto: on a GPU it takes bf16 or fp16; add --bf16, or take --gdn-backend reference",
        ),
        ("--micro-batch-size x", "--micro-batch-size x: must be a whole number"),
        ("--micro-batch-sise 4", "--micro-batch-sise: no such flag; nearest: --micro-batch-size"),
        (
            "--fp8-format hybrid --fp8-recipe custom",
            "--fp8-recipe custom: legal: tensorwise, delayed, mxfp8, blockwise\n",
        ),
        ("--fp8-format e5m2", "--fp8-format e5m2: legal: e4m3, hybrid"),
        ("--lr", "--lr: takes one value"),
        ("--lr 1e-4 1e-5", "--lr 1e-4 1e-5: takes one value"),
        ("--bf16 true", "--bf16 true: takes no value"),
        ("x", "x: a value without a flag before it"),
    ],
)
def test_check_refuses(given: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = _run(capsys, "check", *H100, "--", *given.split())
    assert (status, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1 and said in err


@pytest.mark.parametrize(
    ("gpu", "flags", "warned"),
    [
        ("H100", "--preset olmo-hybrid-7b --tensor-model-parallel-size 2 --sequence-parallel", ""),
        ("B200", "--preset olmo-hybrid-7b", "no checked kernels for K/V 96/192 on B200 (sm_100)"),
        ("H200", "--preset olmo-hybrid-tiny --bf16", "no checked kernels for K/V 24/48 on H200 (sm_90)"),
        ("B200", "--preset olmo-hybrid-7b --gdn-backend reference", ""),
        ("B200", "--preset olmo3-7b", ""),
    ],
)
def test_check_warns_where_no_kernels_are_checked(
    gpu: str, flags: str, warned: str, capsys: pytest.CaptureFixture[str]
) -> None:
    gpus = "2" if "tiny" in flags else "512"
    status, out, _ = _run(capsys, "check", "--gpu", gpu, "--gpus", gpus, "--", *flags.split())
    first, _, rest = out.strip().partition("\n")
    assert status == 0 and first.startswith("fits: ") and "\n" not in rest
    assert rest.startswith("warning: ") and warned in rest if warned else not rest


def test_check_prints_what_the_guide_says(capsys: pytest.CaptureFixture[str]) -> None:
    block = (ROOT / "docs" / "planning.md").read_text().split("tools.plan check ")[1].split("Exit status")[0]
    command, said = block.split("\n\n")[:2]
    assert _run(capsys, "check", *command.replace("\\", "").split())[1].split() == said.split()


def test_checked_kernels_are_those_of_the_table() -> None:
    from megatron_hybrid.kernels.configs import TABLE

    named = {
        (f"sm_{major}{minor}", hardware.CHECKED_TRITON, *dims) for (major, minor), *dims in hardware.CHECKED_KERNELS
    }
    assert named == set(TABLE)


def test_search_says_when_nothing_divides(capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = _run(capsys, "search", "--gpu", "B200", "--gpus", "7", "--preset", "olmo-hybrid-7b")
    assert status == 2 and "--gpus 7: no layout divides them so that --global-batch-size 512 divides too" in err


def test_check_and_search_need_no_torch_and_no_numpy() -> None:
    """Run by the Python that the virtual environment was made of, which has neither."""
    command = [sys._base_executable, "-s", "-m", "megatron_hybrid.tools.plan"]
    flags = ["--tensor-model-parallel-size", "2", "--sequence-parallel"]

    def run(*words: str) -> str:
        done = subprocess.run(
            [*command, *words], cwd=ROOT, env={"PATH": os.environ["PATH"]}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "fits: TP 2, PP 1, CP 1, DP 256 on 512 H100" in run("check", *H100, "--", *flags)
    found = run("search", *H100)
    assert "days for 6T tokens" in found and "times are predictions" in found


def test_what_the_remedy_names_fits(capsys: pytest.CaptureFixture[str]) -> None:
    err = _run(capsys, "check", *H100)[2]
    remedy = err.rpartition("; fits with ")[2].split()
    assert _run(capsys, "check", *H100, "--", *remedy)[0] == 0


def test_with_delayed_scaling_no_norm_is_recomputed(capsys: pytest.CaptureFixture[str]) -> None:
    """Megatron refuses it; it would otherwise be the first remedy, and the first of what the search tries."""
    delayed = ["--fp8-format", "hybrid", "--fp8-recipe", "delayed", "--micro-batch-size", "1"]
    remedy = _run(capsys, "check", *H100, "--", *delayed)[2].rpartition("; fits with ")[2].split()
    assert remedy and "layernorm" not in remedy
    assert _run(capsys, "check", *H100, "--", *delayed, *remedy)[0] == 0
    out = _run(capsys, "search", *H100, *delayed, "--top", "50")[1]
    assert "--fp8-recipe delayed" in out and "layernorm" not in out
    assert out.count("--fp8-recipe delayed") == out.count("--fp8-amax-history-len 1024 --fp8-amax-compute-algo max")


def test_what_the_search_prints_passes_the_check(capsys: pytest.CaptureFixture[str]) -> None:
    out = _run(capsys, "search", *H100)[1]
    pasted = [line.partition("flags")[2].split() for line in out.splitlines() if line.startswith("  flags")]
    assert len(pasted) == 2
    for flags in pasted:
        assert _run(capsys, "check", *H100, "--", *flags)[0] == 0


def test_measured_times_replace_the_estimates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    costs = tmp_path / "costs.json"
    costs.write_text(json.dumps({"G": 100.0, "*": 100.0, "embedding": 0.0, "output": 0.0}))
    out = _run(capsys, "search", *H100, "--costs", str(costs), "--top", "1")[1]
    # 8,192 tokens in 3.2 s of layers; what else a step does is some per cent.
    fastest = next(line for line in out.splitlines() if "tokens/s/GPU, MFU" in line)
    assert 2200 < float(fastest.split()[0].replace(",", "")) < 8192 / 3.2
    assert "measured layer times" in out
    status, _, err = _run(capsys, "search", *H100, "--costs", str(tmp_path / "none.json"))
    assert status == 2 and "none.json: No such file or directory; name a JSON file" in err


def test_the_search_refuses_what_it_chooses(capsys: pytest.CaptureFixture[str]) -> None:
    assert "`plan search` chooses it" in _run(capsys, "search", *H100, "--tensor-model-parallel-size", "2")[2]


def test_full_recompute_keeps_one_tensor_a_layer() -> None:
    from megatron_hybrid.flags import compose
    from megatron_hybrid.planning import activations

    words = ["--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1"]
    job = Job.from_flags(compose("olmo-hybrid-7b", words), 512)
    assert activations.kept(job, "G") == {"layer input": 8192 * 3840 * 2}
