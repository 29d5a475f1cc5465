"""Checkpoints hold no trace of padding: written on one tensor-parallel size, read on any other, and exported alike.

6 heads, an FFN of 133 and a vocabulary of 189: TP 2, 4, 5 and 8 all pad, each differently.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing

from megatron_hybrid.parallel import head_padding
from megatron_hybrid.tools.convert import ExportOptions, export
from megatron_hybrid.tools.dcp_reader import TorchDistCheckpoint
from tests.parallel import tiny
from tests.parallel.compare import STAGES
from tests.parallel.ranks import run_ranks
from tests.parallel.test_head_padding import ODD, VOCABULARY, _odd, _padding
from tests.parallel.test_resharding import _state, _train
from tests.parallel.tiny import Layout
from tests.tools.tiny_model import sidecar

ONE = Layout(distributed_optimizer=True)
DP2 = Layout(dp=2, distributed_optimizer=True)
TP2_PP2_DP2 = Layout(tp=2, pp=2, dp=2, pattern=STAGES, distributed_optimizer=True)
TP3_SP = Layout(tp=3, sp=True, distributed_optimizer=True)
TP4_SP = Layout(tp=4, sp=True, distributed_optimizer=True)
TP4_DP2 = Layout(tp=4, dp=2, distributed_optimizer=True)
TP5 = Layout(tp=5, distributed_optimizer=True)
TP8_SP = Layout(tp=8, sp=True, distributed_optimizer=True)
BF16_TP4 = Layout(tp=4, bf16=True, distributed_optimizer=True)
BF16_PP2 = Layout(pp=2, pattern=STAGES, bf16=True, distributed_optimizer=True)

#: Of the losses and, relative, of the gradient norms of a resumed run, which order their sums differently.
TOLERANCE = 1e-6, 1e-5


def _save(trainer: tiny.Trainer, folder: Path) -> None:
    if dist.get_rank() == 0:
        folder.mkdir()
    dist.barrier()
    dist_checkpointing.save(_state(trainer, loading=False), str(folder))


def _write(rank: int, layout: Layout, folder: Path) -> list[tuple[float, float]]:
    """Train two steps, save, and say how two more go."""
    layout = _odd(layout, ODD)
    trainer = tiny.Trainer(layout, tiny.build(layout))
    _train(trainer, 2)
    _save(trainer, folder)
    return _train(trainer, 2)


def _read_and_write(
    rank: int, layout: Layout, source: Path, target: Path, take_out: Callable[[], None]
) -> dict[str, Any]:
    """Load into a trainer that has its own weights and moments, save again, train on."""
    layout = _odd(layout, ODD)
    take_out()
    trainer = tiny.Trainer(layout, tiny.build(layout))
    _train(trainer, 1)
    loaded = dist_checkpointing.load(_state(trainer, loading=True), str(source))
    trainer.chunks[0].load_state_dict(loaded["model"])
    trainer.optimizer.load_state_dict(loaded["optimizer"])
    _save(trainer, target)
    resumed = _train(trainer, 2)
    padding = [part.abs().max().item() for part in _padding(trainer.chunks[0]).values()]
    return {"resumed": resumed, "padding": max(padding, default=0.0)}


def _as_it_is() -> None: ...


def _differing(first: Path, second: Path) -> tuple[int, list[str]]:
    """How many tensors two checkpoints hold, and which are not the same, bit for bit."""
    one, other = TorchDistCheckpoint(first), TorchDistCheckpoint(second)
    assert one.tensors.keys() == other.tensors.keys()
    return len(one.tensors), [name for name in one.tensors if not torch.equal(one.read(name), other.read(name))]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Layout], tuple[Path, list[tuple[float, float]]]]:
    """A checkpoint of each layout, made when first asked for, and how its run went on."""
    root, known = tmp_path_factory.mktemp("checkpoints"), {}

    def of(layout: Layout) -> tuple[Path, list[tuple[float, float]]]:
        if str(layout) not in known:
            folder = root / str(layout)
            known[str(layout)] = folder, run_ranks(_write, layout.ranks, layout, folder)[0]
        return known[str(layout)]

    return of


#: Each reads what the one before has written, so every kind of padding is written and read, and fresh from training
#: at TP 4 by the first one.
CHAIN = [TP5, TP8_SP, DP2, TP2_PP2_DP2, TP3_SP, TP4_SP, ONE]


@pytest.fixture(scope="module")
def chain(written: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint of TP 4 and the one that each of CHAIN has made of its predecessor's, checked on the way."""
    root, (first, straight) = tmp_path_factory.mktemp("chain"), written(TP4_DP2)
    folders = {str(TP4_DP2): first}
    source = first
    for layout in CHAIN:
        results = run_ranks(_read_and_write, layout.ranks, layout, source, root / str(layout), _as_it_is)
        source = folders[str(layout)] = root / str(layout)
        _assert_goes_on(first, source, straight, results)
    return folders


def _assert_goes_on(
    first: Path, again: Path, straight: list[tuple[float, float]], results: list[dict[str, Any]]
) -> None:
    """What was written again is the same bit for bit, and training went on as it would have."""
    count, differing = _differing(first, again)
    assert not differing and count > 4 * 30, again  # weights, master weights and two moments, in 4 layers
    assert not max(result["padding"] for result in results), again
    expected, found = (torch.tensor(run, dtype=torch.float64) for run in (straight, results[0]["resumed"]))
    differences = (expected - found).abs() / torch.stack([torch.ones(2), expected[:, 1]], dim=1)
    assert (differences <= torch.tensor(TOLERANCE)).all(), (again, straight, results[0])


def test_continues_under_every_other_size(chain: dict[str, Path]) -> None:
    assert len(chain) == 1 + len(CHAIN)


def test_continues_with_padding_after_training_without(written: Any, tmp_path: Path) -> None:
    source, straight = written(ONE)
    results = run_ranks(_read_and_write, 4, TP4_SP, source, tmp_path / "again", _as_it_is)
    _assert_goes_on(source, tmp_path / "again", straight, results)


def test_stored_shapes_are_the_model_s(written: Any) -> None:
    shapes = {name: t.shape for name, t in TorchDistCheckpoint(written(TP4_DP2)[0]).tensors.items()}
    for name, shape in (
        ("embedding.word_embeddings.weight", (VOCABULARY, 96)),
        ("decoder.layers.0.self_attention.in_proj.weight.query", (6 * 24, 96)),
        ("decoder.layers.0.self_attention.out_proj.weight", (96, 6 * 48)),
        ("decoder.layers.0.self_attention.A_log", (6,)),
        ("decoder.layers.3.self_attention.linear_qkv.weight", (3 * 6 * 16, 96)),
        ("decoder.layers.3.mlp.linear_fc1.weight", (2 * 133, 96)),
    ):
        assert shapes[name] == shape
        assert shapes[f"optimizer.state.exp_avg.{name}"] == shape


def test_bf16_continues_under_another_size(written: Any, tmp_path: Path) -> None:
    source, straight = written(BF16_TP4)
    resumed = run_ranks(_read_and_write, 2, BF16_PP2, source, tmp_path / "again", _as_it_is)[0]["resumed"]
    assert not _differing(source, tmp_path / "again")[1]
    torch.testing.assert_close(straight, resumed, rtol=1e-2, atol=0)


def _padding_counted_as_real() -> None:
    head_padding.Split.padded = property(lambda self: False)


def test_with_padding_stored_it_cannot_be_read(written: Any, tmp_path: Path) -> None:
    source, _ = written(ONE)
    with pytest.raises(AssertionError, match="Global shape mismatch"):
        run_ranks(_read_and_write, 4, TP4_SP, source, tmp_path / "again", _padding_counted_as_real)


def test_exports_are_equal(chain: dict[str, Path], tmp_path: Path) -> None:
    """The Hugging Face folder made of a checkpoint does not show on how many ranks it was written."""
    described = {name: tiny.SIZES[name] for name in tiny.SIZES if name.startswith(("linear", "num", "hidden"))}
    description = sidecar(
        hybrid_layer_pattern=tiny.PATTERN,
        **described,
        intermediate_size=133,
        head_dim=16,
        vocab_size=VOCABULARY,
        true_vocab_size=tiny.VOCAB,
    )
    hashes = []
    for name, folder in (("tp1", chain[str(ONE)]), ("tp4", chain[str(TP4_DP2)])):
        (folder / "megatron_hybrid.json").write_text(json.dumps(description))
        export(ExportOptions(folder, tmp_path / "exported" / name))
        record = json.loads((tmp_path / "exported" / name / "conversion.json").read_text())
        hashes.append(record["tensors"])
    assert hashes[0] == hashes[1] and len(hashes[0]) > 60
