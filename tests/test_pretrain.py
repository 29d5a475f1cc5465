"""The trainer itself, `megatron_hybrid.pretrain` on Megatron's own loop: resume, and what a checkpoint folder says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_hybrid import pretrain
from megatron_hybrid.tools.indexed_dataset import IndexedDatasetWriter
from megatron_hybrid.tools.plot_run import read_series
from tests.parallel.ranks import run_ranks

VOCAB = 500


def _train(rank: int, arguments: list[str]) -> None:
    try:
        pretrain.main(arguments)
    except SystemExit as stop:  # Megatron leaves this way after --exit-interval
        assert not stop.code, stop.code


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    prefix = tmp_path_factory.mktemp("data") / "text"
    generator = np.random.default_rng(0)
    with IndexedDatasetWriter(prefix, VOCAB) as writer:
        for _ in range(40):
            writer.add_document(generator.integers(0, VOCAB - 1, size=200))
        writer.commit()
    return prefix


def _arguments(data: Path, run: Path, *more: str) -> list[str]:
    arguments = [
        *("--preset", "olmo-hybrid-tiny", "--tokenizer-type", "NullTokenizer", "--vocab-size", str(VOCAB - 1)),
        *("--data-path", str(data), "--split", "100,0,0", "--data-cache-path", str(run / "cache")),
        *("--hybrid-layer-pattern", "GGG*", "--num-layers", "4", "--seq-length", "64"),
        *("--max-position-embeddings", "64", "--hidden-size", "96", "--kv-channels", "16"),
        *("--train-iters", "6", "--lr-warmup-iters", "1", "--eval-iters", "0"),
        *("--micro-batch-size", "2", "--global-batch-size", "4", "--tensorboard-dir", str(run / "tensorboard")),
        *("--tensorboard-log-interval", "1", "--save", str(run / "checkpoints")),
    ]
    has_checkpoints = (run / "checkpoints" / "latest_checkpointed_iteration.txt").exists()
    load = ["--load", str(run / "checkpoints")] if has_checkpoints else []
    return [*arguments, *load, *more]


SPLITS = {
    "tp2-sp": ["--tensor-model-parallel-size", "2", "--sequence-parallel"],
    "dp2-bf16": ["--use-distributed-optimizer", "--bf16"],
    "tp2-bf16-same_layout_only": [
        *("--tensor-model-parallel-size", "2", "--use-distributed-optimizer", "--bf16"),
        *("--without", "dist-ckpt-optim-fully-reshardable"),
    ],
}


@pytest.mark.parametrize("split", SPLITS)
def test_resumed_run_has_the_losses_of_an_uninterrupted_one(split: str, data: Path, tmp_path: Path) -> None:
    """From the checkpoint in the middle; fp32 with the distributed optimizer, and killed: tests/checkpoint."""
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    run_ranks(_train, 2, _arguments(data, straight, *SPLITS[split], "--save-interval", "3"))
    shutil.copytree(straight / "checkpoints", resumed / "checkpoints")
    shutil.rmtree(resumed / "checkpoints" / "iter_0000006")
    run_ranks(_train, 2, _arguments(data, resumed, *SPLITS[split], "--save-interval", "100"))
    expected, found = (read_series(run / "tensorboard") for run in (straight, resumed))
    for tag in ("lm loss", "grad-norm", "learning-rate"):
        assert list(found[tag].steps) == [4, 5, 6] == list(expected[tag].steps)[3:]
        np.testing.assert_array_equal(found[tag].values, expected[tag].values[3:], err_msg=tag)


@pytest.fixture(scope="module")
def straight(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The losses of six steps on one rank."""
    run = tmp_path_factory.mktemp("straight")
    run_ranks(_train, 1, _arguments(data, run))
    return read_series(run / "tensorboard")["lm loss"]


@pytest.mark.parametrize("layout", ["auto", "auto:2"])
def test_megatrons_trainer_continues_on_the_planned_stages(
    layout: str, straight: Any, data: Path, tmp_path: Path
) -> None:
    """Three steps on one rank, three more on two pipeline ranks: the losses of six steps on one rank."""
    run_ranks(_train, 1, _arguments(data, tmp_path, "--exit-interval", "3"))
    split = ["--pipeline-model-parallel-size", "2", "--pipeline-layout", layout]
    run_ranks(_train, 2, _arguments(data, tmp_path, *split))
    found = read_series(tmp_path / "tensorboard")["lm loss"]
    assert list(found.steps) == list(straight.steps) == list(range(1, 7))
    np.testing.assert_allclose(found.values, straight.values, rtol=1e-6)


def test_padded_tensor_parallel_size_resumes_under_another(
    data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """6 heads and 512 rows on 4 ranks, then on 1 and on 5: what the arguments in the checkpoint say fits all."""

    def losses(run: Path) -> np.ndarray:
        return np.array(read_series(run / "tensorboard")["lm loss"].values)

    tp4 = ["--tensor-model-parallel-size", "4", "--sequence-parallel", "--save-interval", "3"]
    straight = tmp_path / "straight"
    run_ranks(_train, 4, _arguments(data, straight, *tp4))
    assert "--tensor-model-parallel-size 4: padded with zeros: heads 6 to 8 (+33.3 %)" in capfd.readouterr().err
    described = json.loads((straight / "checkpoints" / "megatron_hybrid.json").read_text())
    assert (described["num_attention_heads"], described["linear_num_value_heads"]) == (6, 6)
    for tp in (1, 5):
        resumed = tmp_path / f"tp{tp}"
        shutil.copytree(straight / "checkpoints", resumed / "checkpoints")
        shutil.rmtree(resumed / "checkpoints" / "iter_0000006")
        flags = ["--tensor-model-parallel-size", str(tp), "--save-interval", "100", "--ckpt-fully-parallel-load"]
        run_ranks(_train, tp, _arguments(data, resumed, *flags))
        np.testing.assert_allclose(losses(resumed), losses(straight)[3:], rtol=0, atol=2e-5)


def test_checkpoint_folder_says_what_it_holds(data: Path, tmp_path: Path) -> None:
    first = _arguments(data, tmp_path, "--train-iters", "2", "--save-interval", "2")
    run_ranks(_train, 1, first)
    described = json.loads((tmp_path / "checkpoints" / "megatron_hybrid.json").read_text())
    assert described["hybrid_layer_pattern"] == "GGG*"
    assert (described["true_vocab_size"], described["vocab_size"]) == (VOCAB - 1, 512)
    assert described["rope_theta"] == 500000.0
    with pytest.raises(
        AssertionError,
        match=r"--save .*: holds another model \(intermediate_size \(--ffn-hidden-size\): 528 there, 132",
    ):
        again = _arguments(data, tmp_path, "--train-iters", "2", "--save-interval", "2", "--ffn-hidden-size", "132")
        run_ranks(_train_and_show_error, 1, again)


def test_a_launch_that_failed_before_it_saved_leaves_the_folder_free(data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    (folder / "megatron_hybrid.json").write_text('{"hidden_size": 1}')
    run_ranks(_train, 1, _arguments(data, tmp_path, "--train-iters", "2", "--save-interval", "2"))
    assert json.loads((folder / "megatron_hybrid.json").read_text())["hidden_size"] == 96


def test_ids_without_a_row_end_the_run(data: Path, tmp_path: Path) -> None:
    """The data have ids up to 498; on two tensor-parallel ranks those from 384 on would be embedded as zeros."""
    smaller = ["--vocab-size", "300", "--tensor-model-parallel-size", "2"]
    with pytest.raises(AssertionError, match=r"the data hold id 49\d, and the embedding has 384 rows"):
        run_ranks(_train, 2, _arguments(data, tmp_path, *smaller))


def _train_and_show_error(rank: int, arguments: list[str]) -> None:
    """The command's one line of stderr becomes the error that the parent sees."""
    import contextlib
    import io

    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        try:
            pretrain.main(arguments)
        except SystemExit as stop:
            raise AssertionError(f"exit status {stop.code}: {said.getvalue()}") from None
