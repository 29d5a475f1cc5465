"""Env files of runs small enough for two cores, and the folder they live in."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from megatron_hybrid.tools.indexed_dataset import IndexedDatasetWriter

ROOT = Path(__file__).resolve().parent.parent.parent
SUBMIT = ROOT / "examples" / "slurm" / "submit.sh"
VOCAB = 500

#: Two layers, 32 tokens; other sizes than the preset's.
TINY = (
    f"--tokenizer-type NullTokenizer --vocab-size {VOCAB - 1} --split 100,0,0 --hybrid-layer-pattern G* --num-layers 2 "
    "--seq-length 32 --max-position-embeddings 32 --hidden-size 96 --kv-channels 16 --num-workers 0 --eval-iters 0 "
    "--micro-batch-size 1 --global-batch-size 2 --lr-warmup-iters 1 --use-distributed-optimizer"
)


def make_site(folder: Path, **settings: str) -> Path:
    """A site file for CPU runs, and a dataset DATA_ROOT/text; folder must be empty."""
    for name in ("runs", "tokens"):
        (folder / name).mkdir(parents=True)
    generator = np.random.default_rng(0)
    with IndexedDatasetWriter(folder / "tokens" / "text", VOCAB) as writer:
        for _ in range(40):
            writer.add_document(generator.integers(0, VOCAB - 1, size=100))
        writer.commit()
    lines = [
        f"RUNS={folder}/runs",
        f"DATA_ROOT={folder}/tokens",
        f"PYTHON={sys.executable} LOGIN_PYTHON={sys.executable}",
    ]
    lines += ["EXCLUSIVE=no", "OMP_THREADS=1", "MIN_SHM_GIB=0", "TIME=00:10:00", "SIGNAL_SECONDS=60", "GPUS_PER_NODE=0"]
    return write_env(folder / "site.env", lines, settings)


def write_env(path: Path, lines: list[str], settings: Mapping[str, str]) -> Path:
    path.write_text("\n".join([*lines, *(f"{name}={value}" for name, value in settings.items())]) + "\n")
    return path


def training(folder: Path, name: str, iterations: int, interval: int, flags: str = "", **settings: str) -> Path:
    """An env file of a training run on CPU."""
    lines = [f"NAME={name}", f"RUN=$RUNS/{name}", "GPU=none", "RANKS_PER_NODE=1", 'DATA=("$DATA_ROOT/text")']
    lines += [f"FLAGS=({TINY} --train-iters {iterations} --save-interval {interval} {flags})"]
    if "ARRAY" not in settings:
        lines += ["PRESET=olmo-hybrid-tiny"]
    return write_env(folder / f"{name}.env", lines, settings)


def submit(*words: object, environment: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(SUBMIT), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
