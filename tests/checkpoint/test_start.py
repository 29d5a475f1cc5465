"""What a run starts from: the newest complete checkpoint, a refusal in one line, or random weights if told so."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_hybrid.checkpoint import commit, discovery, start
from megatron_hybrid.checkpoint.discovery import Unloadable
from megatron_hybrid.checkpoint.start import Wish
from tests.checkpoint.folders import save

POINTER = "latest_checkpointed_iteration.txt"


def _chosen(root: Path, **more: object) -> tuple[int, str]:
    decided = start.decide(Wish(load=root, save=root, **more))  # type: ignore[arg-type]
    assert decided.chosen is not None
    return decided.chosen.iteration, "\n".join(decided.lines)


@pytest.mark.parametrize("content", ["", "garbage", "30", "-1", "9999999", "\x00\xff"], ids=repr)
def test_whatever_the_pointer_says_the_newest_complete_one_is_loaded(content: str, tmp_path: Path) -> None:
    save(tmp_path, 10)
    save(tmp_path, 20)
    (tmp_path / "iter_0000030").mkdir()
    (tmp_path / POINTER).write_text(content)
    iteration, said = _chosen(tmp_path)
    assert iteration == 20
    assert "skipped" in said and "iter_0000030: no COMPLETE: the save was cut short" in said
    assert f"{POINTER}: says" in said


def test_without_a_pointer_too(tmp_path: Path) -> None:
    save(tmp_path, 10, pointer=False)
    assert _chosen(tmp_path) == (10, f"{tmp_path / POINTER}: missing; loading iteration 10, the newest complete one")


def test_a_good_pointer_needs_no_words(tmp_path: Path) -> None:
    save(tmp_path, 10)
    assert _chosen(tmp_path) == (10, "")


DAMAGE = {
    "COMPLETE": lambda folder: (folder / "COMPLETE").write_text("{"),
    "no manifest": lambda folder: (folder / "manifest.json").unlink(),
    "another manifest": lambda folder: (folder / "manifest.json").write_text('{"files": {}}'),
    "a file is missing": lambda folder: (folder / "__1_0.distcp").unlink(),
    "a file is short": lambda folder: (folder / "__0_0.distcp").write_bytes(b"x"),
    "retracted": lambda folder: commit.retract(folder),
    "rejected": lambda folder: commit.reject(folder, "a bit fell over"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_one_is_passed_over_with_the_reason(damage: str, tmp_path: Path) -> None:
    save(tmp_path, 10)
    DAMAGE[damage](save(tmp_path, 20))
    iteration, said = _chosen(tmp_path)
    assert iteration == 10
    assert "skipped" in said and "iter_0000020" in said


def test_nothing_usable_is_refused_with_every_reason(tmp_path: Path) -> None:
    commit.retract(save(tmp_path, 10))
    (save(tmp_path, 20) / "__0_0.distcp").unlink()
    with pytest.raises(Unloadable) as refused:
        _chosen(tmp_path)
    message = str(refused.value)
    assert "iter_0000020: __0_0.distcp is missing; iter_0000010: no COMPLETE" in message
    assert "add --fresh" in message and "\n" not in message


@pytest.mark.parametrize("exists", [True, False])
def test_loading_an_empty_folder_is_refused(exists: bool, tmp_path: Path) -> None:
    folder = tmp_path / "empty"
    if exists:
        folder.mkdir()
    with pytest.raises(Unloadable, match=r"--load .*empty: nothing to load \(no .*\); a first start: leave out --load"):
        _chosen(folder)
    assert start.decide(Wish(save=folder)).chosen is None


def test_a_pointer_to_nothing_is_refused(tmp_path: Path) -> None:
    (tmp_path / POINTER).write_text("100")
    with pytest.raises(Unloadable, match=r"says '100', but no checkpoint in it"):
        _chosen(tmp_path)


def test_saving_beside_checkpoints_without_loading_them_is_refused(tmp_path: Path) -> None:
    commit.retract(save(tmp_path, 10))
    with pytest.raises(Unloadable, match=r"none of them complete.* and --load is not given"):
        start.decide(Wish(save=tmp_path))
    save(tmp_path, 20)
    with pytest.raises(Unloadable, match=r"complete up to iteration 20.*--load .* to continue, or --fresh"):
        start.decide(Wish(save=tmp_path))


def test_fresh_moves_aside_and_removes_nothing(tmp_path: Path) -> None:
    save(tmp_path, 10)
    commit.retract(save(tmp_path, 20))
    decided = start.decide(Wish(load=tmp_path, save=tmp_path, fresh=True))
    assert decided.chosen is None and decided.set_aside is not None
    start.move_aside(decided, print)
    assert discovery.survey(tmp_path).is_empty
    assert [c.iteration for c in discovery.survey(decided.set_aside).complete] == [10]
    assert (decided.set_aside / "iter_0000020").is_dir()
    assert start.flags_for(decided, ["--save", "x", "--load", "x", "--lr", "1"]) == ["--save", "x", "--lr", "1"]


def test_fresh_in_a_restarted_job_continues(tmp_path: Path) -> None:
    wish = start.wish_of(["--save", str(tmp_path), "--fresh"], {"SLURM_RESTART_COUNT": "1"})
    assert start.decide(wish).chosen is None  # killed before it saved
    save(tmp_path, 10)
    decided = start.decide(wish)
    assert decided.chosen is not None and decided.chosen.iteration == 10 and decided.set_aside is None
    assert start.flags_for(decided, ["--save", str(tmp_path), "--fresh"])[-4:] == [
        *("--load", str(tmp_path), "--ckpt-step", "10")
    ]


def test_going_back_needs_another_folder_to_save_to(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    save(one, 10)
    save(one, 20)
    with pytest.raises(Unloadable, match=r"--ckpt-step 10: .*newer checkpoints \(up to iteration 20\).*another --save"):
        _chosen(one, step=10)
    decided = start.decide(Wish(load=one, save=other, step=10))
    assert decided.chosen is not None and decided.chosen.iteration == 10
    with pytest.raises(Unloadable, match=r"--ckpt-step 15: .*no such folder; complete there: 20, 10"):
        start.decide(Wish(load=one, save=other, step=15))
    save(other, 5)
    with pytest.raises(Unloadable, match=r"--save .*other: holds checkpoints of its own \(up to iteration 5\)"):
        start.decide(Wish(load=one, save=other))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--ckpt-format", "torch"], "--ckpt-format torch: legal: torch_dist"),
        (["--non-persistent-ckpt-type", "local"], "--non-persistent-ckpt-type local: not committed whole"),
        (["--load", "s3://bucket/x"], "--load s3:/bucket/x: only folders"),
        (["--ckpt-step", "x"], "--ckpt-step: invalid int value"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_cannot_be_committed_is_refused(flags: list[str], said: str) -> None:
    with pytest.raises(Unloadable) as refused:
        start.wish_of(flags, {})
    assert said in str(refused.value)


def test_the_pointer_is_never_set_to_what_is_not_complete(tmp_path: Path) -> None:
    save(tmp_path, 10)
    commit.retract(save(tmp_path, 20, pointer=False))
    with pytest.raises(RuntimeError, match=r"not set to 20: .*iter_0000020 has no COMPLETE"):
        commit.point_to(tmp_path, 20)
    assert (tmp_path / POINTER).read_text() == "10"


def test_a_complete_checkpoint_is_never_overwritten(tmp_path: Path) -> None:
    folder = save(tmp_path, 10)
    with pytest.raises(RuntimeError, match="is not overwritten"):
        commit.start(folder)


def test_every_flipped_byte_is_found_and_named(tmp_path: Path) -> None:
    folder = save(tmp_path, 10)
    assert discovery.damaged_files(folder) == []
    for name in ("__0_0.distcp", "__1_0.distcp", ".metadata", "metadata.json"):
        content = (folder / name).read_bytes()
        damaged = bytearray(content)
        damaged[len(damaged) // 2] ^= 1
        (folder / name).write_bytes(damaged)
        shares = [discovery.damaged_files(folder, share, 3) for share in range(3)]
        (fault,) = [fault for share in shares for fault in share]
        assert fault.startswith(f"{folder / name}: hash ") and fault.endswith("the file is damaged")
        (folder / name).write_bytes(content)


def test_what_something_else_saved_is_taken_over_on_request(tmp_path: Path) -> None:
    folder = save(tmp_path, 10)
    commit.retract(folder)
    (folder / "manifest.json").unlink()
    (folder / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    with pytest.raises(Unloadable, match=r"something else saved it \(python -m megatron_hybrid.checkpoint.commit "):
        _chosen(tmp_path)
    commit.adopt(folder)
    assert _chosen(tmp_path)[0] == 10
