"""Starts with other flags or data than those of the checkpoint: what is refused, what is said, and what stays legal."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_hybrid import logits
from megatron_hybrid.checkpoint import commit, fingerprint
from megatron_hybrid.tools.indexed_dataset import IndexedDatasetWriter
from tests.checkpoint.runs import STEPS, VOCAB, arguments, loading, train
from tests.parallel.ranks import run_ranks

#: Without it Megatron refuses another number of steps, whatever the data.
OVERRIDE = "--override-opt-param-scheduler"
#: A step to do: what is not refused trains.
MORE = ["--train-iters", "7", OVERRIDE]
NEWEST = f"iter_{STEPS:07d}"


def _dataset(prefix: Path, seed: int) -> Path:
    prefix.parent.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    with IndexedDatasetWriter(prefix, VOCAB) as writer:
        for _ in range(20):
            writer.add_document(generator.integers(0, VOCAB - 1, size=100))
        writer.commit()
    return prefix


def _start(flags: list[str], run: Path, capfd: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit status and stderr of a start on one rank; two had trained, which is legal."""
    capfd.readouterr()
    (status,) = run_ranks(train, 1, run, flags)
    return status, capfd.readouterr().err


def _rewrite(folder: Path, change: Any) -> None:
    """Another manifest in a committed folder."""
    manifest = commit.read_json(folder / commit.MANIFEST)
    change(manifest)
    commit.write_json(folder / commit.MANIFEST, manifest)
    marker = {"iteration": STEPS, "manifest_xxh3": commit.hash_file(folder / commit.MANIFEST)["xxh3"]}
    commit.write_json(folder / commit.COMPLETE, marker)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--seed", "7"], "seed (--seed): 34521 then, 7 now"),
        (["--split", "90,10,0"], "split (--split, training's part): [0.0, 1.0] then, [0.0, 0.9] now"),
        (["--train-iters", "60"], "[[1, False]] then, [[2, False]] now"),
        (["--document-masking"], "document_masking (--document-masking): False then, True now"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_another_order_is_refused(
    flags: list[str], said: str, straight: Path, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    loaded = straight / "checkpoints"
    status, error = _start(arguments(data, tmp_path, "--load", str(loaded), *MORE, *flags), tmp_path, capfd)
    assert status == 3 and said in error
    assert str(loaded / NEWEST / "manifest.json") in error and "add --allow-data-change" in error
    assert "--pretrained-checkpoint" in error and not list((tmp_path / "checkpoints").glob("iter_*"))


def test_a_resumed_run_with_another_seed_ends_with_the_message(
    straight: Path, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """In its own folder, with steps left to do; told to, it goes on."""
    shutil.copytree(straight / "checkpoints", tmp_path / "checkpoints")
    flags = arguments(data, tmp_path, *loading(tmp_path), "--train-iters", "8", "--seed", "7", OVERRIDE)
    status, error = _start(flags, tmp_path, capfd)
    assert status == 3 and "error: --data-path: not the data of" in error
    assert not (tmp_path / "checkpoints" / "iter_0000008").exists()
    status, error = _start([*flags, "--allow-data-change"], tmp_path, capfd)
    assert status == 0 and "data differ from those of" in error and "34521 then, 7 now" in error
    assert (tmp_path / "checkpoints" / "iter_0000008" / "COMPLETE").exists()


def test_more_steps_in_the_same_epoch_and_another_layout_are_legal_and_old_records_too(
    straight: Path, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(straight / "checkpoints", tmp_path / "checkpoints")
    _rewrite(tmp_path / "checkpoints" / NEWEST, lambda manifest: manifest.pop("order"))
    more = ["--micro-batch-size", "2", OVERRIDE, "--train-iters"]
    status, error = _start(arguments(data, tmp_path, *loading(tmp_path), *more, "7"), tmp_path, capfd)
    assert status == 0 and error.count("without the order of samples") == 1
    status, error = _start(arguments(data, tmp_path, *loading(tmp_path), *more, "9"), tmp_path, capfd)
    assert status == 0 and "without the order of samples" not in error
    assert (tmp_path / "checkpoints" / "iter_0000009" / "COMPLETE").exists()


def test_datasets_of_one_name_are_told_apart(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    web, code = _dataset(tmp_path / "web" / "text", 1), _dataset(tmp_path / "code" / "text", 2)

    def flags(weights: tuple[str, str], run: str = "run") -> list[str]:
        blend = ["--data-path", weights[0], str(web), weights[1], str(code), "--save-interval", "2"]
        return arguments(web, tmp_path / run, *blend, "--train-iters", "2")

    assert _start(flags(("1", "1")), tmp_path / "run", capfd)[0] == 0
    load = ["--load", str(tmp_path / "run" / "checkpoints")]
    status, error = _start([*flags(("3", "1"), "other"), *load, *MORE], tmp_path / "other", capfd)
    assert status == 3 and "[['web/text', 0.5], ['code/text', 0.5]] then, [['web/text', 0.75], ['code" in error
    scaled = [*flags(("30", "30"), "scaled"), *load, "--train-iters", "3", OVERRIDE]
    assert _start(scaled, tmp_path / "scaled", capfd)[0] == 0
    _dataset(web, 3)
    status, error = _start([*flags(("1", "1"), "other"), *load, *MORE], tmp_path / "other", capfd)
    assert status == 3 and "web/text.bin has another content" in error


def test_names_are_as_short_as_they_can_be() -> None:
    entry = {"bytes": 1, "xxh3": "a"}
    saved = {f"/old/{name}": entry for name in ("web/text.bin", "code/text.bin", "wiki.bin")}
    moved = {path.replace("/old", "/new/place"): value for path, value in saved.items()}
    assert fingerprint.changed_data(saved, moved) == []
    del moved["/new/place/web/text.bin"]
    assert fingerprint.changed_data(saved, moved) == ["web/text.bin is not there any more"]
    relative = {"a/x.bin": entry, "./a/x.bin": entry}  # one path in two words, as a blend may have it
    assert fingerprint.changed_data(relative, relative) == []


def test_a_new_stage_may_have_other_data_positions_and_length_and_no_other_model(
    straight: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    other = _dataset(tmp_path / "other", 5)
    run = tmp_path / "stage"
    stage = ["--pretrained-checkpoint", str(straight / "checkpoints"), *loading(run), "--train-iters", "2"]
    stage += ["--seed", "7", "--seq-length", "16", "--max-position-embeddings", "16", "--save-interval", "1"]
    stage += ["--position-embedding-type", "none"]
    for flags, said in (
        (["--no-gdn-allow-neg-eigval"], "linear_allow_neg_eigval (--gdn-allow-neg-eigval): True there, False here"),
        (["--norm-epsilon", "1e-4"], "rms_norm_eps (--norm-epsilon): 1e-06 there, 0.0001 here"),
        (["--gdn-norm-epsilon", "1e-3"], "gdn_norm_eps (--gdn-norm-epsilon): 1e-05 there, 0.001 here"),
        (["--window-size", "8,0"], "window_size: None there, [8, 0] here"),
        (["--qk-norm-width", "none"], "qk_norm (--qk-norm-width): 'full' there, 'none' here"),
    ):
        status, error = _start([*arguments(other, run, *stage), *flags], run, capfd)
        assert status == 3 and said in error, error
        assert f"error: --pretrained-checkpoint {straight / 'checkpoints'}: holds another model" in error
        assert str(straight / "checkpoints" / "megatron_hybrid.json") in error
    status, error = _start(arguments(other, run, *stage, "--exit-interval", "1"), run, capfd)
    assert status == 0, error
    assert "the same model, but max_position_embeddings: 32 there, 16 here" in error
    status, error = _start(arguments(other, run, *stage), run, capfd)  # restarted: its own checkpoints go before
    assert status == 0 and "--pretrained-checkpoint" not in error, error
    assert (run / "checkpoints" / "iter_0000002" / "COMPLETE").exists()


def test_another_model_is_refused_where_a_checkpoint_is_loaded_and_where_logits_are_asked_for(
    straight: Path, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    flags = arguments(data, tmp_path, "--load", str(straight / "checkpoints"), *MORE, "--no-gdn-output-gate")
    status, error = _start(flags, tmp_path, capfd)
    assert status == 3 and f"error: --load {straight / 'checkpoints'}: holds another model (output_gate" in error
    tokens = tmp_path / "tokens.safetensors"
    tokens.write_bytes(b"")  # not read
    words = [*flags, "--tokens", str(tokens), "--output", str(tmp_path / "logits")]
    words[words.index("--save") : words.index("--save") + 2] = []
    (status,) = run_ranks(_logits, 1, words)
    assert status == 3 and "holds another model (output_gate" in capfd.readouterr().err
    assert not (tmp_path / "logits").exists()


def _logits(rank: int, words: list[str]) -> int:
    try:
        logits.main(words)
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


@pytest.mark.parametrize("pointer", [True, False], ids=["pointer", "no_pointer"])
def test_in_one_folder_neither_model_nor_positions_change(
    pointer: bool, straight: Path, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "checkpoints"
    shutil.copytree(straight / "checkpoints", folder)
    if not pointer:
        (folder / "latest_checkpointed_iteration.txt").unlink()
    before = json.loads((folder / "megatron_hybrid.json").read_text())
    for flags, said in (
        (["--rotary-base", "1000"], "--rotary-base): 500000.0 there, 1000.0 here"),
        (["--position-embedding-type", "none"], "--rotary-base): 500000.0 there, None here"),
        (["--qk-norm-width", "head"], "qk_norm (--qk-norm-width): 'full' there, 'head' here"),
    ):
        status, error = _start(arguments(data, tmp_path, *loading(tmp_path), *MORE, *flags), tmp_path, capfd)
        assert status == 2 and said in error, error
        assert f"error: --save {folder}: holds" in error and str(folder / "megatron_hybrid.json") in error
        assert json.loads((folder / "megatron_hybrid.json").read_text()) == before


def test_an_order_that_depends_on_the_ranks_is_refused(
    data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    status, error = _start(arguments(data, tmp_path, "--dataloader-type", "cyclic"), tmp_path, capfd)
    assert status == 2 and "error: --dataloader-type cyclic: legal: single" in error


def test_fresh_does_not_start_from_another_stage(
    straight: Path, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Megatron would load the weights after all, unverified."""
    flags = ["--fresh", "--pretrained-checkpoint", str(straight / "checkpoints")]
    status, error = _start(arguments(data, tmp_path, *flags), tmp_path, capfd)
    assert status == 3 and "--fresh starts from random weights; leave one of them out" in error
