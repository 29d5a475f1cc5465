"""Training on --instance-data through Megatron's own trainer: ids, losses and resuming, under several layouts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_hybrid import pretrain
from megatron_hybrid.data import instance_dataset
from megatron_hybrid.tools.plot_run import read_series
from megatron_hybrid.training import batches as batches_module
from tests.parallel.ranks import run_ranks
from tests.test_pretrain import _train_and_show_error

VOCAB, EOD = 500, 498
STEPS, BATCH = 3, 4


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("raw")
    generator = np.random.default_rng(0)
    for name in "abc":
        docs = [np.append(generator.integers(0, EOD, size=n), EOD) for n in generator.integers(3, 60, size=60)]
        docs[5] = np.full(64, 7)  # the repetition filter rejects a row of it
        np.concatenate(docs).astype("<u4").tofile(folder / f"{name}.npy")
    return folder


def _arguments(data: Path, run: Path, *more: str) -> list[str]:
    return [
        *("--preset", "olmo-hybrid-tiny", "--tokenizer-type", "NullTokenizer", "--vocab-size", str(VOCAB - 1)),
        *("--instance-data", str(data), "--data-cache-path", str(run / "cache"), "--repetition-filter"),
        *("--hybrid-layer-pattern", "GGG*", "--num-layers", "4", "--seq-length", "64", "--num-workers", "0"),
        *("--max-position-embeddings", "64", "--hidden-size", "96", "--kv-channels", "16"),
        *("--train-iters", str(STEPS), "--lr-warmup-iters", "1", "--eval-iters", "0", "--micro-batch-size", "2"),
        *("--global-batch-size", str(BATCH), "--tensorboard-dir", str(run / "tensorboard")),
        *("--tensorboard-log-interval", "1", "--save", str(run / "checkpoints")),
        *("--save-interval", "100", *more),
    ]


def _train(rank: int, arguments: list[str], broken: str = "") -> dict[str, Any]:
    """Trains; returns the ids that this rank read, by (data-parallel rank, context- and tensor-parallel first)."""
    read: list[int] = []
    original = instance_dataset.InstanceDataset.__getitem__

    def reading(self: Any, position: int) -> dict[str, torch.Tensor]:
        read.append(int(self.order.ids(position, 1)[0]))
        return original(self, position)

    instance_dataset.InstanceDataset.__getitem__ = reading  # type: ignore[method-assign]
    if broken == "documents see each other":
        batches_module.document_lengths = lambda positions: [positions.numel()]
    elif broken == "rank's own order":
        of = instance_dataset.SampleOrder.ids
        instance_dataset.SampleOrder.ids = lambda self, first, count: of(self, first, count)[::-1] + dist.get_rank() % 2  # type: ignore[method-assign]
    try:
        pretrain.main(arguments)
    except SystemExit as stop:
        assert not stop.code, stop.code
    first = not (parallel_state.get_tensor_model_parallel_rank() or parallel_state.get_context_parallel_rank())
    return {"ids": read if first and parallel_state.is_pipeline_first_stage() else [], "rank": rank}


LAYOUTS = {
    "dp2": (2, []),
    "tp2-sp": (2, ["--tensor-model-parallel-size", "2", "--sequence-parallel"]),
    "cp2": (2, ["--context-parallel-size", "2"]),
    "pp2": (2, ["--pipeline-model-parallel-size", "2"]),
    "dp1-microbatch1": (1, ["--micro-batch-size", "1"]),
}


def _batches(ranks: list[dict[str, Any]]) -> list[list[int]]:
    """The ids of each global batch, sorted, of all ranks together."""
    own = [np.array(rank["ids"])[: STEPS * BATCH] for rank in ranks if rank["ids"]]
    per_rank = [ids[: len(ids) // STEPS * STEPS].reshape(STEPS, -1) for ids in own]
    return [sorted(np.concatenate([ids[step] for ids in per_rank]).tolist()) for step in range(STEPS)]


def _losses(run: Path) -> np.ndarray:
    return np.array(read_series(run / "tensorboard")["lm loss"].values)


@pytest.fixture(scope="module")
def one_rank(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Any]:
    """Ids and losses of one rank with and without document masking, from weights that are stored for all."""
    start = tmp_path_factory.mktemp("start")
    run_ranks(_train, 1, _arguments(data, start, "--train-iters", "2", "--exit-interval", "1"))
    found: dict[bool, Any] = {}
    for masking in (False, True):
        run = tmp_path_factory.mktemp(f"one{masking}")
        found[masking] = (_batches(run_ranks(_train, 1, _from(start, data, run, masking))), _losses(run))
    return {**found, "start": start}  # type: ignore[dict-item]


def _from(start: Path, data: Path, run: Path, masking: bool, *more: str) -> list[str]:
    """Begin at sample 0 with the stored weights (--finetune loads weights alone)."""
    flags = ["--load", str(start / "checkpoints"), "--finetune", *more]
    return _arguments(data, run, *flags, *(["--document-masking"] if masking else []))


@pytest.mark.parametrize(
    ("layout", "masking"),
    [*((layout, True) for layout in LAYOUTS), ("dp2", False)],
    ids=lambda value: value if isinstance(value, str) else "documents_masked" if value else "not_masked",
)
def test_ids_and_losses_do_not_depend_on_the_layout(
    layout: str, masking: bool, one_rank: dict[Any, Any], data: Path, tmp_path: Path
) -> None:
    ranks, flags = LAYOUTS[layout]
    found = _batches(run_ranks(_train, ranks, _from(one_rank["start"], data, tmp_path, masking, *flags)))
    ids, losses = one_rank[masking]
    assert found == ids
    np.testing.assert_allclose(_losses(tmp_path), losses, rtol=2e-6)


def test_masking_changes_the_loss(one_rank: dict[Any, Any]) -> None:
    assert np.abs(one_rank[True][1] - one_rank[False][1]).max() > 1e-5


@pytest.mark.parametrize("broken", ["documents see each other", "rank's own order"])
def test_what_is_broken_is_noticed(broken: str, one_rank: dict[Any, Any], data: Path, tmp_path: Path) -> None:
    ranks = run_ranks(_train, 2, _from(one_rank["start"], data, tmp_path, True), broken)
    ids, losses = one_rank[True]
    assert _batches(ranks) != ids or np.abs(_losses(tmp_path) - losses).max() > 1e-5


def test_a_resumed_run_goes_on_where_it_stopped(one_rank: dict[Any, Any], data: Path, tmp_path: Path) -> None:
    """Stopped after two steps, resumed on two ranks; other data is refused by name."""
    start = _from(one_rank["start"], data, tmp_path, True, "--exit-interval", "2")
    run_ranks(_train, 1, start)
    rest = _arguments(data, tmp_path, "--document-masking", "--load", str(tmp_path / "checkpoints"))
    ranks = run_ranks(_train, 2, rest)
    ids, losses = one_rank[True]
    assert sorted(number for rank in ranks for number in rank["ids"]) == ids[2]
    np.testing.assert_allclose(_losses(tmp_path), losses, rtol=2e-6)
    with pytest.raises(
        AssertionError, match=r"its checkpoints were trained on other data \(seed \(--seed, --data-seed\): 34521"
    ):
        run_ranks(_train_and_show_error, 1, [*rest, "--data-seed", "1"])


def test_more_samples_than_the_data_gives_are_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"--instance-epochs 1: .* gives \d+ samples .*allow \d+ epochs"):
        run_ranks(_train_and_show_error, 1, _arguments(data, tmp_path, "--train-iters", "99"))
    with pytest.raises(AssertionError, match=r"--eval-iters 2: no validation data; give --instance-valid-data"):
        run_ranks(_train_and_show_error, 1, _arguments(data, tmp_path, "--eval-iters", "2"))


def _train_as_fp8(rank: int, arguments: list[str]) -> list[int]:
    """The tokens of this rank's microbatches in a model whose config says FP8, of modules that stay in fp32."""
    provide, pack, tokens = pretrain.provide_model, batches_module.pack, []

    def model(*args: Any, **kwargs: Any) -> Any:
        made = provide(*args, **kwargs)
        made.config.fp8, made.config.fp8_recipe = "hybrid", "tensorwise"
        return made

    def packing(lengths: list[int], world: int, *args: Any, **kwargs: Any) -> Any:
        tokens.append(sum(lengths) // world)
        return pack(lengths, world, *args, **kwargs)

    pretrain.provide_model, batches_module.pack = model, packing
    _train(rank, arguments)
    return tokens


def test_in_fp8_masked_documents_fill_whole_tiles(one_rank: dict[Any, Any], data: Path, tmp_path: Path) -> None:
    """Transformer Engine stops where a rank's tokens are no multiple; padding changes no loss."""
    flags = _from(one_rank["start"], data, tmp_path, True, "--context-parallel-size", "2")
    for tokens in run_ranks(_train_as_fp8, 2, flags):
        assert len(tokens) >= STEPS * BATCH // 2 and not any(count % 16 for count in tokens), tokens
    np.testing.assert_allclose(_losses(tmp_path), one_rank[True][1], rtol=2e-6)


def test_sharing_of_padded_documents() -> None:
    index, lengths = batches_module.padded_documents([3, 8, 5], world=2, tp=3)
    assert lengths == [4, 8, 8, 4]  # 20 tokens to a multiple of 12
    assert index.tolist() == [0, 1, 2, -1, *range(3, 11), *range(11, 16), *[-1] * 7]
    index, lengths = batches_module.padded_documents([3, 8, 5], world=2, tp=3, multiple=16)
    assert lengths == [4, 8, 8, 76] and len(index) == 96
    assert batches_module.padded_documents([3, 8], world=1, tp=2, multiple=16)[1] == [3, 8]  # checked from the flags
