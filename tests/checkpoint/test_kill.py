"""Kill -9 at every file operation of a save: the next start has the newest complete checkpoint and nothing less.

Ranks are forked processes that save real state through the hooked Megatron and kill themselves, by SIGKILL, at the
n-th operation on a file of the checkpoint folder (an audit hook counts them), until a save survives them all.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_hybrid.checkpoint import commit, discovery, megatron_hooks, start
from megatron_hybrid.checkpoint.start import Wish
from tests.parallel.ranks import run_ranks

_FORK = multiprocessing.get_context("fork")


def _kill_at(count: int, folder: Path) -> None:
    """From now on: SIGKILL to this process just before its `count`-th operation on a file below `folder`."""
    seen = 0

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal seen
        if event in {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree"}:
            path = args[0] if isinstance(args[0], str | os.PathLike) else ""
            if str(path).startswith(str(folder)):
                seen += 1
                if seen == count:
                    os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def _save(root: Path, iteration: int) -> None:
    """As Megatron's `save_checkpoint` does: rank 0's folder, data by `dist_checkpointing.save`, then the pointer."""
    from megatron.core.dist_checkpointing import ShardedTensor
    from megatron.training import checkpointing

    rank, ranks = dist.get_rank(), dist.get_world_size()
    tensor = torch.full((4,), float(iteration))
    state = {"w": ShardedTensor.from_rank_offsets("w", tensor, (0, rank, ranks)), "iteration": iteration}
    folder = root / f"iter_{iteration:07d}"
    if rank == 0:
        folder.mkdir(exist_ok=True, parents=True)
    checkpointing.dist_checkpointing.save(state, str(folder), async_strategy="mcore")
    if rank == 0:
        with checkpointing.maybe_msc.open(checkpointing.get_checkpoint_tracker_filename(str(root)), "w") as handle:
            handle.write(str(iteration))


def _saver(root: Path, kill_at: int) -> None:
    os.environ.update(RANK="0")
    os.setsid()
    dist.init_process_group("gloo", init_method=f"file://{root}.rendezvous{kill_at}", rank=0, world_size=1)
    megatron_hooks.install(megatron_hooks.Checkpoints(dict, lambda line: None))
    _save(root, 10 + kill_at)
    _kill_at(kill_at, root)
    _save(root, 500 + kill_at)
    os._exit(0)


def test_killed_at_every_step_of_a_save(tmp_path: Path) -> None:
    killed = 0
    for kill_at in range(1, 200):
        root = tmp_path / f"run{kill_at}"
        root.mkdir()
        process = _FORK.Process(target=_saver, args=(root, kill_at))
        process.start()
        process.join(60)
        before, new = 10 + kill_at, 500 + kill_at
        decided = start.decide(Wish(load=root, save=root))
        assert decided.chosen is not None
        folder = root / f"iter_{new:07d}"
        whole = (folder / commit.COMPLETE).exists()
        assert decided.chosen.iteration == (new if whole else before), kill_at
        assert discovery.damaged_files(decided.chosen.folder) == []
        pointer = (root / "latest_checkpointed_iteration.txt").read_text()
        assert pointer in ({str(before), str(new)} if whole else {str(before)}), kill_at
        if process.exitcode == 0:
            assert whole and pointer == str(new)
            break
        assert process.exitcode == -signal.SIGKILL
        killed += 1
        if not whole and folder.exists():
            assert any("iter" in line and "no COMPLETE" in line for line in decided.lines), decided.lines
    assert killed >= 10, killed


def _traced(rank: int, root: Path, log: Path) -> None:
    """A save, with what goes to the disk and what is renamed, in that order and by whatever process, in `log`."""
    fsync, replace = os.fsync, os.replace
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def tracing_fsync(handle: int) -> None:
        fsync(handle)
        os.write(descriptor, f"disk {os.readlink(f'/proc/self/fd/{handle}')}\n".encode())

    def tracing_replace(source: Any, target: Any) -> None:
        replace(source, target)
        os.write(descriptor, f"renamed {source} {target}\n".encode())

    os.fsync, os.replace = tracing_fsync, tracing_replace
    megatron_hooks.install(megatron_hooks.Checkpoints(dict, lambda line: None))
    _save(root, 10)


def test_all_is_on_disk_before_complete_and_complete_before_the_pointer(tmp_path: Path) -> None:
    root, log = tmp_path / "run", tmp_path / "log"
    root.mkdir()
    run_ranks(_traced, 2, root, log)
    lines = [line.split() for line in log.read_text().splitlines()]
    folder = root / "iter_0000010"
    when = {words[2]: (at, words[1]) for at, words in enumerate(lines) if words[0] == "renamed"}

    def on_disk(path: object, before: int) -> bool:
        return ["disk", str(path)] in lines[:before]

    complete, source = when[str(folder / commit.COMPLETE)]
    names = commit.read_json(folder / commit.MANIFEST)["files"]
    assert sum(name.endswith(".distcp") for name in names) == 2
    for name in names:
        at, written = when.get(str(folder / name), (complete, folder / name))
        assert on_disk(folder / name, complete) or on_disk(written, at), name
    manifest, written = when[str(folder / commit.MANIFEST)]
    pointer, pointed = when[str(root / "latest_checkpointed_iteration.txt")]
    assert on_disk(written, manifest) and manifest < complete and on_disk(source, complete)
    assert ["disk", str(folder)] in lines[manifest:complete] and ["disk", str(folder)] in lines[complete:pointer]
    assert on_disk(pointed, pointer) and ["disk", str(root)] in lines[pointer:]


def test_what_is_being_removed_is_no_checkpoint_any_more(tmp_path: Path) -> None:
    _committed(tmp_path, 10, 20)
    left: list[list[int]] = []

    def removing(save_path: str, iteration: int) -> None:
        left.append([candidate.iteration for candidate in discovery.survey(Path(save_path)).complete])

    megatron_hooks.delete(removing, str(tmp_path), 10)
    assert left == [[20]]


def _agree(rank: int, root: Path, other_view: Path | None) -> Any:
    view = other_view if rank and other_view else root
    wish = Wish(load=view, save=view)
    try:
        agreed = start.agree(start.decide(wish), True, lambda line: None)
    except discovery.Unloadable as refused:
        return str(refused)
    return agreed.chosen.iteration if agreed.chosen else None


def _committed(root: Path, *iterations: int) -> None:
    from tests.checkpoint.folders import save

    for iteration in iterations:
        save(root, iteration)


def test_a_flipped_byte_is_passed_over_on_every_rank_and_marked(tmp_path: Path) -> None:
    _committed(tmp_path, 10, 20)
    damaged = tmp_path / "iter_0000020" / "__1_0.distcp"
    content = bytearray(damaged.read_bytes())
    content[4321] ^= 4
    damaged.write_bytes(content)
    assert run_ranks(_agree, 2, tmp_path, None) == [10, 10]
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "10"
    (skipped,) = discovery.survey(tmp_path).skipped
    assert "rejected earlier" in skipped[1] and str(damaged) in skipped[1]
    (tmp_path / "iter_0000010" / ".metadata").write_text("[]")
    refused = run_ranks(_agree, 2, tmp_path, None)
    assert refused[0] == refused[1] and ".metadata: hash" in refused[0] and "no other checkpoint" in refused[0]


def test_ranks_that_see_different_checkpoints_stop(tmp_path: Path) -> None:
    _committed(tmp_path / "one", 10, 20)
    _committed(tmp_path / "two", 10)
    refused = run_ranks(_agree, 2, tmp_path / "one", tmp_path / "two")
    assert all("ranks see different checkpoints (['10', '20'])" in message for message in refused)


def test_another_megatron_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert megatron_hooks.unexpected() == []
    from megatron.training import checkpointing

    monkeypatch.setattr(checkpointing, "read_metadata", lambda tracker: (0, False))
    with pytest.raises(RuntimeError, match=r"checkpointing\.read_metadata: not the code of megatron-core 0\.19\.2"):
        megatron_hooks.install(megatron_hooks.Checkpoints(dict, print))
