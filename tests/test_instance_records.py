"""The record of --instance-data in a checkpoint folder: a run is not continued on another mix, masks or filter."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_hybrid.data.fingerprint import FILE_NAME, Reading, describe, differences
from megatron_hybrid.data.instances import HASH_ROWS, Cutter, FixedInstances, hash_of
from megatron_hybrid.data.order import SampleOrder
from megatron_hybrid.data.sources import INDEX_DTYPE
from megatron_hybrid.data.token_files import open_raw
from megatron_hybrid.tools.corpus.fingerprint import fingerprint
from megatron_hybrid.tools.indexed_dataset import IndexedDatasetWriter, bin_path
from tests.parallel.ranks import run_ranks
from tests.test_instance_training import EOD, VOCAB, _arguments
from tests.test_pretrain import _train

LENGTH, INSTANCES = 64, 32
MORE = ["--train-iters", "4", "--override-opt-param-scheduler"]


def _mix(folder: Path, first: int) -> Path:
    """An index of tools.mix over two datasets, `first` instances of the one and the rest of the other."""
    datasets = []
    folder.mkdir(exist_ok=True)
    for number, name in enumerate("ab"):
        if not bin_path(folder / name).exists():
            with IndexedDatasetWriter(folder / name, VOCAB) as writer:
                writer.add_document(np.random.default_rng(number).integers(0, EOD, size=INSTANCES * LENGTH))
                writer.commit()
        made_of = fingerprint(bin_path(folder / name))[0]
        datasets.append({"prefix": str(folder / name), "tokens": INSTANCES * LENGTH, "fingerprint": made_of})
    index = np.zeros(INSTANCES, dtype=INDEX_DTYPE)
    index["dataset"][first:] = 1
    index["sample"] = [*range(first), *range(INSTANCES - first)]
    np.save(folder / "s.instances.npy", index)
    about = {"sequence_length": LENGTH, "instances": INSTANCES, "datasets": datasets}
    (folder / "s.instances.json").write_text(json.dumps(about))
    return folder / "s.instances.npy"


def _mixture(folder: Path, ratio: float) -> Path:
    folder.mkdir(exist_ok=True)
    for number, name in enumerate("ab"):
        ids = np.random.default_rng(number).integers(0, EOD, size=INSTANCES * LENGTH)
        ids.astype("<u4").tofile(folder / f"{name}.npy")
    (folder / "mix.yaml").write_text(
        f"""requested_tokens: {INSTANCES * LENGTH}
sources:
  - {{source_name: a, target_ratio: {ratio}, paths: [{folder}/a.npy]}}
  - {{source_name: b, target_ratio: {1 - ratio}, paths: [{folder}/b.npy]}}
"""
    )
    return folder / "mix.yaml"


KINDS: dict[str, Any] = {
    "index": lambda folder, changed: _mix(folder, 8 if changed else 24),
    "mixture": lambda folder, changed: _mixture(folder, 0.25 if changed else 0.75),
}


def _resume(run: Path, flags: list[str], capfd: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit status and stderr of a start that has a fourth step to do."""
    capfd.readouterr()
    (status,) = run_ranks(_status, 1, [*flags, "--load", str(run / "checkpoints"), *MORE])
    return status, capfd.readouterr().err


def _status(rank: int, flags: list[str]) -> int:
    from megatron_hybrid import pretrain

    try:
        pretrain.main(flags)
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_is_not_resumed_on_another_mix(kind: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run, made = tmp_path / "run", KINDS[kind]
    flags = _arguments(made(tmp_path / "mix", False), run)
    run_ranks(_train, 1, flags)
    made(tmp_path / "mix", True)
    status, error = _resume(run, flags, capfd)
    assert status == 2 and "its checkpoints were trained on other data (selection (what --instance-data takes" in error
    assert str(run / "checkpoints" / FILE_NAME) in error and "here: --instance-data" in error
    assert "add --allow-data-change" in error and not (run / "checkpoints" / "iter_0000004").exists()
    made(tmp_path / "mix", False)
    if kind == "index":
        for words, said in (
            (["--no-repetition-filter"], "repetition_filter (--repetition-filter): True there, False here"),
            (["--document-masking"], "document_masking (--document-masking): False there, True here"),
        ):
            status, error = _resume(run, [*flags, *words], capfd)
            assert status == 2 and said in error
        written = run / "checkpoints" / FILE_NAME
        new = json.loads(written.read_text())
        kept = ("format", "sequence_length", "instances", "packing", "shuffle", "seed", "data", "files", "tokens")
        written.write_text(json.dumps({key: new[key] for key in kept}))  # as an earlier version wrote it
        copy = tmp_path / "in_data_path"
        shutil.copytree(run / "checkpoints", copy / "checkpoints")
        swap = flags.index("--instance-data")
        words = ["--data-path", str(tmp_path / "mix" / "a"), "--split", "100,0,0", "--no-repetition-filter"]
        words = [*flags[:swap], *flags[swap + 2 :], *words, "--save", str(copy / "checkpoints")]
        status, error = _resume(copy, words, capfd)
        assert status == 3 and "--instance-data then, --data-path now" in error
    # The size of a batch is legal in the first epoch, if a mixture does not count by it.
    batch = ["--global-batch-size", "6"] if kind == "index" else ["--micro-batch-size", "4"]
    status, error = _resume(run, [*flags, *batch], capfd)
    assert status == 0, error
    assert error.count("written by an earlier version") == (kind == "index")
    assert (run / "checkpoints" / "iter_0000004" / "COMPLETE").exists()


def _described(path: Path, mask: str = "", batch: int = 3) -> dict[str, Any]:
    instances = FixedInstances([open_raw(path, "uint32", mask)], Cutter(LENGTH, VOCAB, EOD))
    reading = Reading(LENGTH, "fixed", 1, mask, False, False)
    return describe(instances, SampleOrder(len(instances), batch, 1, 3), reading)


def _differences(folder: Path, there: dict[str, Any], here: dict[str, Any], reached: int = 0) -> str:
    (folder / FILE_NAME).write_text(json.dumps(there))
    said: list[str] = []
    found = differences(folder, here, reached, said.append)
    assert said == []
    return "; ".join(found)


def test_the_rule_and_the_bytes_of_label_masks_are_recorded(tmp_path: Path) -> None:
    path = tmp_path / "ids.npy"
    np.arange(LENGTH * 2, dtype="<u4").tofile(path)
    mask = np.ones(LENGTH * 2, dtype=np.bool_)
    for name in ("mask.npy", "other.npy"):
        mask.tofile(tmp_path / name)
    plain, masked = _described(path, batch=1), _described(path, "ids:mask", batch=1)
    assert "label_mask (--instance-label-mask): None there, ids:mask here" in _differences(tmp_path, plain, masked)
    assert "ids:mask there, ids:other" in _differences(tmp_path, masked, _described(path, "ids:other", batch=1))
    mask[5] = False
    mask.tofile(tmp_path / "mask.npy")
    assert _differences(tmp_path, masked, _described(path, "ids:mask", batch=1)).startswith("masks (the files of")


def test_the_batch_counts_once_an_epoch_has_dropped_its_tail(tmp_path: Path) -> None:
    """10 instances: epochs of 9 samples in batches of 3, of 8 in batches of 4, of 10 in batches of 5."""
    path = tmp_path / "ids.npy"
    np.arange(LENGTH * 10, dtype="<u4").tofile(path)
    by = {batch: _described(path, batch=batch) for batch in (2, 3, 4, 5)}
    assert _differences(tmp_path, by[3], by[4], reached=8) == ""
    assert "3 there, 4 here" in _differences(tmp_path, by[3], by[4], reached=9)
    assert _differences(tmp_path, by[5], by[2], reached=30) == ""  # both drop nothing


def test_hashes_see_every_piece_and_the_order() -> None:
    index = np.zeros(HASH_ROWS + 3, dtype=INDEX_DTYPE)
    plain = hash_of(index)
    index["sample"][-1] = 1
    last = hash_of(index)
    assert len({plain, last, hash_of(index[::-1])}) == 3
