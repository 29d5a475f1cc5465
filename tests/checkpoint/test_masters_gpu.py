"""On a GPU: Transformer Engine's Adam with --use-precision-aware-optimizer saves true masters and continues from them.

python -m pytest -m gpu tests/checkpoint/test_masters_gpu.py
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_hybrid.checkpoint import masters
from megatron_hybrid.tools.dcp_reader import TorchDistCheckpoint
from megatron_hybrid.tools.gpu_bench.cases import FP8, LEAN, words
from megatron_hybrid.tools.plot_run import read_series

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(
        importlib.util.find_spec("transformer_engine") is None, reason="Transformer Engine is not installed here"
    ),
]

STEPS, SAVED = 6, 3
RUN = words(
    "--preset olmo-hybrid-tiny --gdn-backend reference --mock-data --tokenizer-type NullTokenizer --vocab-size 1000 "
    f"--bf16 --no-log-health --use-distributed-optimizer --train-iters {STEPS} --lr-warmup-iters 1 --eval-iters 0 "
    f"--save-interval {SAVED} --tensorboard-log-interval 1"
)
#: In which Transformer Engine's Adam holds the masters.
ITS_OWN = {"bf16": (), "delayed": FP8["delayed"]}


def train(run: Path, *flags: str) -> dict[int, float]:
    """{step: loss} of a run that is to end well; it continues what is in its folder."""
    return ended(run, started(run, *flags))


def started(run: Path, *flags: str) -> subprocess.Popen[str]:
    own = ("--save", run / "checkpoints", "--tensorboard-dir", run / "tensorboard", "--data-cache-path", run / "cache")
    load = ("--load", run / "checkpoints") if (run / "checkpoints").exists() else ()
    command = [sys.executable, "-m", "megatron_hybrid.pretrain", *RUN, *map(str, own), *map(str, load), *flags]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def ended(run: Path, process: subprocess.Popen[str]) -> dict[int, float]:
    _, errors = process.communicate(timeout=400)
    assert process.returncode == 0, errors[-3000:]
    losses = read_series(run / "tensorboard")["lm loss"]
    return dict(zip(map(int, losses.steps), map(float, losses.values), strict=True))


def tensors(run: Path, iteration: int) -> dict[str, torch.Tensor]:
    checkpoint = TorchDistCheckpoint(run / "checkpoints" / f"iter_{iteration:07d}")
    assert masters.fault(checkpoint) is None
    return {name: checkpoint.read(name) for name in checkpoint.tensors}


def half_way(straight: Path, run: Path) -> Path:
    """A run that ended where the straight one saved first."""
    folder = run / "checkpoints"
    folder.mkdir(parents=True)
    shutil.copytree(straight / "checkpoints" / f"iter_{SAVED:07d}", folder / f"iter_{SAVED:07d}")
    shutil.copyfile(straight / "checkpoints" / "megatron_hybrid.json", folder / "megatron_hybrid.json")
    (folder / "latest_checkpointed_iteration.txt").write_text(str(SAVED))
    return run


@pytest.mark.parametrize("recipe", ITS_OWN)
def test_masters_are_saved_whole_and_continued_from(recipe: str, tmp_path: Path) -> None:
    straight, flags = tmp_path / "straight", (*LEAN, *ITS_OWN[recipe])
    expected = train(straight, *flags)
    for iteration in (SAVED, STEPS):
        saved = tensors(straight, iteration)
        weights = [name for name in saved if masters.MASTER + name in saved]
        assert len(weights) > 50
        for name in weights:
            assert torch.equal(saved[masters.MASTER + name].to(saved[name].dtype), saved[name]), name
        fine = [n for n in weights if not torch.equal(saved[masters.MASTER + n], saved[n].float())]
        assert fine, "no master has more bits than its weight: rounded ones were saved"
        assert {saved[name].dtype for name in weights} == {torch.bfloat16, torch.float32}

    others = ((), FP8["tensorwise"], (*FP8["tensorwise"], *LEAN))
    runs = [half_way(straight, tmp_path / f"continued {i}") for i in range(1 + len(others))]
    processes = [started(run, *with_flags) for run, with_flags in zip(runs, (flags, *others), strict=True)]
    try:
        resumed, *otherwise = [ended(run, process) for run, process in zip(runs, processes, strict=True)]
    finally:
        for process in processes:
            process.kill()  # those beside one that failed
    later = range(SAVED + 1, STEPS + 1)
    assert [resumed[i] for i in later] == [expected[i] for i in later]
    found, wanted = tensors(runs[0], STEPS), tensors(straight, STEPS)
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name
    for losses in otherwise:
        np.testing.assert_allclose([losses[i] for i in later], [expected[i] for i in later], rtol=0.02)
