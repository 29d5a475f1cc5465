"""Training runs of the tiny model on two ranks, with what has to be equal after a resume written down as they go."""

from __future__ import annotations

import hashlib
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_hybrid import pretrain
from megatron_hybrid.tools.plot_run import read_series

VOCAB = 500
STEPS = 6


def arguments(data: Path, run: Path, *more: str) -> list[str]:
    """Six steps of two samples, one for each of two data-parallel ranks; a checkpoint after the third."""
    return [
        *("--preset", "olmo-hybrid-tiny", "--tokenizer-type", "NullTokenizer", "--vocab-size", str(VOCAB - 1)),
        *("--data-path", str(data), "--split", "100,0,0", "--data-cache-path", str(run / "cache")),
        *("--hybrid-layer-pattern", "G*", "--num-layers", "2", "--seq-length", "32", "--num-workers", "0"),
        *("--max-position-embeddings", "32", "--hidden-size", "96", "--kv-channels", "16"),
        *("--train-iters", str(STEPS), "--lr-warmup-iters", "1", "--eval-iters", "0"),
        *("--micro-batch-size", "1", "--global-batch-size", "2", "--tensorboard-dir", str(run / "tensorboard")),
        *("--use-distributed-optimizer", "--save-interval", "3"),
        *("--tensorboard-log-interval", "1", "--save", str(run / "checkpoints")),
        *more,
    ]


def loading(run: Path) -> list[str]:
    return ["--load", str(run / "checkpoints")]


def train(rank: int, run: Path, flags: list[str], before_step: Callable[[int, int], None] | None = None) -> int:
    """A run's exit status. `before_step(rank, iteration)` is called before each step, iterations from 1.

    `samples_RANK` in the run's folder gets the samples read in each step, `rng_RANK` the random state before it.
    """
    from megatron.core.datasets.gpt_dataset import GPTDataset
    from megatron.training import training

    os.setpgid(0, 0)  # so that a kill takes the async worker along
    run.mkdir(exist_ok=True, parents=True)
    step, get_item = training.train_step, GPTDataset.__getitem__
    samples = open(run / f"samples_{rank}", "a", buffering=1)  # noqa: SIM115 open until the process ends
    states = open(run / f"rng_{rank}", "a", buffering=1)  # noqa: SIM115

    def watched_item(self: Any, index: int) -> Any:
        samples.write(f"{index}\n")
        return get_item(self, index)

    def watched_step(*args: Any, iteration: int, **kwargs: Any) -> Any:
        samples.write(f"step {iteration + 1}\n")
        states.write(f"{iteration + 1} {_rng_hash()}\n")
        _draw()
        if before_step:
            before_step(rank, iteration + 1)
        return step(*args, iteration=iteration, **kwargs)

    GPTDataset.__getitem__, training.train_step = watched_item, watched_step
    try:
        pretrain.main(flags)
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def _draw() -> None:
    """From every generator: without dropout nothing else does, and a state that was not restored would be the same."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    torch.rand(1), random.random(), np.random.random()
    with get_cuda_rng_tracker().fork():
        torch.rand(1)


def _rng_hash() -> str:
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    digest = hashlib.sha256(torch.get_rng_state().numpy().tobytes())
    digest.update(repr((random.getstate(), np.random.get_state()[1].tobytes())).encode())
    for name, state in sorted(get_cuda_rng_tracker().get_states().items()):
        digest.update(name.encode() + state.numpy().tobytes())
    return digest.hexdigest()


def kill_all_at(iteration: int, after: Path | None = None) -> Callable[[int, int], None]:
    """SIGKILL to every rank before a step, and after the async save into the folder `after` is committed."""

    def before_step(rank: int, at: int) -> None:
        if at != iteration:
            return
        if after is not None:
            from megatron.training.async_utils import maybe_finalize_async_save

            maybe_finalize_async_save(blocking=True)  # the look after each step does not wait for a loaded machine
            assert (after / "COMPLETE").exists()
            torch.distributed.barrier()
        os.killpg(0, signal.SIGKILL)

    return before_step


def latest(path: Path) -> dict[int, list[str]]:
    """{step: lines}, of the last time that each step was done."""
    found: dict[int, list[str]] = {}
    for line in path.read_text().splitlines():
        if line.startswith("step "):
            current = found[int(line.removeprefix("step "))] = []
        elif path.name.startswith("rng"):
            found[int(line.split()[0])] = line.split()[1:]
        else:
            current.append(line)
    return found


def weights_and_moments(run: Path, iteration: int) -> dict[str, torch.Tensor]:
    from megatron_hybrid.tools.dcp_reader import TorchDistCheckpoint

    checkpoint = TorchDistCheckpoint(run / "checkpoints" / f"iter_{iteration:07d}")
    return {name: checkpoint.read(name) for name in checkpoint.tensors}


def assert_same(straight: Path, run: Path) -> None:
    """Every step's loss, gradient norm, samples and random state, and the last weights and moments, bit by bit."""
    expected, found = (read_series(folder / "tensorboard") for folder in (straight, run))
    for tag in ("lm loss", "grad-norm"):
        assert list(found[tag].steps) == list(range(1, STEPS + 1))
        np.testing.assert_array_equal(found[tag].values, expected[tag].values, err_msg=tag)
    for rank in (0, 1):
        for name in (f"samples_{rank}", f"rng_{rank}"):
            assert latest(run / name) == latest(straight / name), name
    ours, theirs = weights_and_moments(run, STEPS), weights_and_moments(straight, STEPS)
    assert set(ours) == set(theirs) and len(ours) > 20
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name
