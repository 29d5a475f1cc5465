"""Runs that are killed, asked to stop, or read damaged data: what the next start does."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoint.runs import STEPS, arguments, assert_same, kill_all_at, loading, train
from tests.parallel.ranks import run_ranks

ASYNC = ["--async-save", "--use-persistent-ckpt-worker", "--async-strategy", "mcore"]


@pytest.mark.parametrize("flags", [[], ASYNC], ids=["sync", "async"])
def test_killed_and_resumed_is_the_run_that_was_not_killed(
    flags: list[str], straight: Path, data: Path, tmp_path: Path
) -> None:
    written = tmp_path / "checkpoints" / "iter_0000003" if flags else None
    with pytest.raises(AssertionError, match=r"exit codes \[-9, -9\]"):
        run_ranks(train, 2, tmp_path, arguments(data, tmp_path, *flags), kill_all_at(5, written))
    assert not list((tmp_path / "checkpoints").glob("*_*CLEAN")) + list((tmp_path / "checkpoints").glob("TRAIN*"))
    assert run_ranks(train, 2, tmp_path, arguments(data, tmp_path, *flags, *loading(tmp_path))) == [0, 0]
    assert_same(straight, tmp_path)


def _ask(how: str, run: Path) -> Any:
    def before_step(rank: int, iteration: int) -> None:
        if iteration == 2 and rank == 1:
            if how == "stop file":
                (run / "checkpoints" / "STOP").touch()
            else:
                os.kill(os.getpid(), getattr(signal, how))

    return before_step


@pytest.mark.parametrize("how", ["SIGTERM", "SIGUSR1", "stop file"])
def test_asked_to_stop_all_ranks_stop_after_one_step(
    how: str, straight: Path, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "checkpoints"
    assert run_ranks(train, 2, tmp_path, arguments(data, tmp_path), _ask(how, tmp_path)) == [0, 0]
    said = json.loads((folder / "STOPPED_CLEAN").read_text())
    reached = said["iteration"]
    assert reached == 2 or (how == "stop file" and reached == 3)  # rank 0 may have looked before rank 1 made the file
    assert how.removeprefix("SIG") in said["reason"] and said["seconds_from_request"] > 0
    assert (folder / f"iter_{reached:07d}" / "COMPLETE").exists() and not (folder / "STOP").exists()
    assert f"STOPPED_CLEAN iteration={reached}" in capfd.readouterr().err
    if how == "SIGTERM":
        assert run_ranks(train, 2, tmp_path, arguments(data, tmp_path, *loading(tmp_path))) == [0, 0]
        assert sorted(path.name for path in folder.glob("[ST]*_*")) == ["TRAINING_COMPLETE"]
        assert_same(straight, tmp_path)


def _poison(rank: int, iteration: int) -> None:
    """From step 2 on, a gradient that is not finite."""
    if iteration == 2:
        import gc

        from megatron.core.models.hybrid.hybrid_model import HybridModel

        (model,) = (thing for thing in gc.get_objects() if isinstance(thing, HybridModel))
        with torch.no_grad():
            next(model.parameters()).fill_(float("nan"))


def test_gradients_that_stay_nan_stop_the_run_and_name_the_samples(
    data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    flags = ["--no-check-for-nan-in-loss-and-grad", "--max-nonfinite-steps", "2", "--save-interval", "100"]
    assert run_ranks(train, 2, tmp_path, arguments(data, tmp_path, *flags), _poison) == [5, 5]
    steps = json.loads((tmp_path / "checkpoints" / "STOPPED_NONFINITE").read_text())["steps"]
    assert [(s["iteration"], s["first_sample"], s["end_sample"]) for s in steps] == [(2, 2, 4), (3, 4, 6)]
    assert "iteration 2: 2 to 3; iteration 3: 4 to 5" in capfd.readouterr().err
    assert not list((tmp_path / "checkpoints").glob("iter_*"))


def test_a_flipped_byte_in_the_data_stops_the_next_start(
    straight: Path, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    flags = arguments(data, tmp_path, "--load", str(straight / "checkpoints"))
    content = Path(f"{data}.bin").read_bytes()
    damaged = bytearray(content)
    damaged[777] ^= 1
    try:
        Path(f"{data}.bin").write_bytes(damaged)
        assert run_ranks(train, 2, tmp_path, flags) == [3, 3]
    finally:
        Path(f"{data}.bin").write_bytes(content)
    error = capfd.readouterr().err
    assert "error: --data-path: not the data of" in error and "text.bin has another content" in error
    assert "--allow-data-change" in error and not list((tmp_path / "checkpoints").glob("iter_*"))


def _with_manifest(straight: Path, run: Path, **changed: Any) -> None:
    """The straight run's checkpoints, whose newest manifest says something else."""
    import shutil

    from megatron_hybrid.checkpoint import commit

    shutil.copytree(straight / "checkpoints", run / "checkpoints")
    folder = run / "checkpoints" / f"iter_{STEPS:07d}"
    manifest = commit.read_json(folder / "manifest.json")
    commit.write_json(folder / "manifest.json", {**manifest, **changed})
    marker = {"iteration": STEPS, "manifest_xxh3": commit.hash_file(folder / "manifest.json")["xxh3"]}
    commit.write_json(folder / "COMPLETE", marker)


def test_another_precision_is_said(
    straight: Path, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A restart that lost its FP8 flags goes on, since a change may be meant, but not without a line."""
    in_fp8 = {"fp8-format": "hybrid", "fp8-recipe": "tensorwise"}
    _with_manifest(straight, tmp_path, precision=in_fp8)
    assert run_ranks(train, 2, tmp_path, arguments(data, tmp_path, *loading(tmp_path))) == [0, 0]
    error = capfd.readouterr().err
    for said in ("fp8-format hybrid then, absent now", "fp8-recipe tensorwise then, absent now"):
        assert f"iter_{STEPS:07d}: {said}" in error
    for name, precision in {"same": {}, "unknown": None}.items():
        _with_manifest(straight, tmp_path / name, precision=precision)
        assert run_ranks(train, 2, tmp_path / name, arguments(data, tmp_path / name, *loading(tmp_path / name))) == [
            0,
            0,
        ]
    assert "precision differs" not in capfd.readouterr().err


def test_other_software_is_said(straight: Path, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    import shutil

    from megatron_hybrid.checkpoint import commit

    shutil.copytree(straight / "checkpoints", tmp_path / "checkpoints")
    folder = tmp_path / "checkpoints" / f"iter_{STEPS:07d}"
    manifest = commit.read_json(folder / "manifest.json")
    assert manifest["software"]["torch"].startswith("2.") and manifest["layout"]["data_parallel_size"] == 2
    assert manifest["kernel_self_test"].startswith("not run")
    manifest["software"]["triton"] = "3.7.1"
    commit.write_json(folder / "manifest.json", manifest)
    marker = {"iteration": STEPS, "manifest_xxh3": commit.hash_file(folder / "manifest.json")["xxh3"]}
    commit.write_json(folder / "COMPLETE", marker)
    assert run_ranks(train, 2, tmp_path, arguments(data, tmp_path, *loading(tmp_path))) == [0, 0]
    assert ": triton 3.7.1 then, 3.6.0 now" in capfd.readouterr().err
