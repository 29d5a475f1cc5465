"""The mean of checkpoints against torch's, and in Megatron's hands: of runs under two layouts, with padded heads."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_hybrid import pretrain
from megatron_hybrid.checkpoint import commit, discovery
from megatron_hybrid.checkpoint.average import AverageOptions, average
from megatron_hybrid.tools.cli import ToolError
from megatron_hybrid.tools.convert.dcp_writer import DcpWriter
from megatron_hybrid.tools.dcp_reader import TorchDistCheckpoint
from megatron_hybrid.tools.indexed_dataset import IndexedDatasetWriter
from tests.checkpoint.runs import VOCAB, arguments, train
from tests.parallel.ranks import run_ranks

TP4 = ["--tensor-model-parallel-size", "4"]  # 6 heads run as 8
PP2 = ["--pipeline-model-parallel-size", "2", "--hybrid-layer-pattern", "G|*"]
SIDECAR = "megatron_hybrid.json"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A data prefix, and two bf16 runs of two steps: TP 4 with padded heads, and PP 2 with another seed."""
    root = tmp_path_factory.mktemp("trained")
    with IndexedDatasetWriter(root / "text", VOCAB) as writer:
        for _ in range(40):
            writer.add_document(np.random.default_rng(0).integers(0, VOCAB - 1, size=200))
        writer.commit()
    for name, ranks, layout in (("tp4", 4, TP4), ("pp2", 2, [*PP2, "--seed", "7"])):
        flags = arguments(root / "text", root / name, "--exit-interval", "2", "--bf16", *layout)
        assert run_ranks(train, ranks, root / name, flags) == [0] * ranks
    return root / "text", root / "tp4" / "checkpoints", root / "pp2" / "checkpoints"


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = TorchDistCheckpoint(folder)
    return {name: checkpoint.read(name) for name in checkpoint.tensors}


def _assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


@pytest.mark.parametrize("weights", [None, (0.25, 0.75)], ids=["uniform", "weighted"])
def test_is_torch_s_mean_of_global_tensors(weights: Any, trained: Any, tmp_path: Path) -> None:
    _, first, second = trained
    average(AverageOptions((str(first), f"{second}@2"), tmp_path / "soup", weights))
    found = _tensors(tmp_path / "soup" / "iter_0000002")
    one, two = (_tensors(root / "iter_0000002") for root in (first, second))
    a, b = weights or (0.5, 0.5)
    masters = {name: a * one[name] + b * two[name] for name in one if name.startswith("optimizer.")}
    assert len(masters) == 3 * (len(one) - len(masters)) > 60
    expected = {
        name: masters.get(name, masters.get(f"optimizer.state.param.{name}")).to(one[name].dtype)  # type: ignore[union-attr]
        for name in one
    }
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        exact = (
            {"rtol": 0, "atol": 0}
            if weights is None
            else {"rtol": 1e-2 if tensor.dtype == torch.bfloat16 else 1e-6, "atol": 1e-9}
        )
        torch.testing.assert_close(found[name], tensor, **exact, msg=lambda text, name=name: f"{name}: {text}")
    assert {str(found[name].dtype) for name in found if name.endswith(("A_log", "dt_bias"))} == {"torch.float32"}
    record = json.loads((tmp_path / "soup" / "conversion.json").read_text())
    assert [source["weight"] for source in record["sources"]] == [a, b]
    manifest = first / "iter_0000002" / "manifest.json"
    assert record["sources"][0]["manifest_xxh3"] == commit.hash_file(manifest)["xxh3"]
    assert (tmp_path / "soup" / SIDECAR).read_text() == (first / SIDECAR).read_text()


def test_all_the_weight_on_one_is_that_one(trained: Any, tmp_path: Path) -> None:
    """So the bf16 weights are what the masters round to, in Megatron's files and in ours."""
    _, first, second = trained
    average(AverageOptions((str(second), str(first)), tmp_path / "soup", (0.0, 1.0)))
    _assert_equal(_tensors(tmp_path / "soup" / "iter_0000002"), _tensors(first / "iter_0000002"))


def _load_and_save(rank: int, flags: list[str]) -> tuple[int, int]:
    """A training run that saves what it has loaded when its first step would begin; what it starts from."""
    from megatron.training import get_args, training

    started: list[tuple[int, int]] = []

    def step(
        forward: Any, data: Any, model: Any, optimizer: Any, scheduler: Any, *_: Any, iteration: int, **__: Any
    ) -> Any:
        started.append((iteration, get_args().consumed_train_samples))
        training.save_checkpoint(iteration + 1, model, optimizer, scheduler, 0)
        raise SystemExit(0)

    training.train_step = step
    with pytest.raises(SystemExit):
        pretrain.main(flags)
    return started[0]


#: Ranks, layout and flags, whether the mean has optimizer state, and the iteration and samples training starts from.
STARTS: dict[str, tuple[int, list[str], str, bool, tuple[int, int]]] = {
    "continued": (2, PP2, "--load", True, (2, 4)),
    "weights_alone": (1, [], "--load", False, (0, 0)),
    "pretrained": (1, ["--finetune"], "--pretrained-checkpoint", True, (0, 0)),
}


@pytest.mark.parametrize("case", STARTS)
def test_training_starts_from_the_mean(case: str, trained: Any, tmp_path: Path) -> None:
    ranks, layout, load, optimizer, start = STARTS[case]
    data, first, second = trained
    average(AverageOptions((str(first), str(second)), tmp_path / "soup", optimizer=optimizer))
    own = ["--load", str(tmp_path / "run" / "checkpoints")] if case == "pretrained" else []
    flags = arguments(data, tmp_path / "run", "--bf16", *layout, load, str(tmp_path / "soup"), *own)
    assert run_ranks(_load_and_save, ranks, flags) == [start] * ranks
    expected = _tensors(tmp_path / "soup" / ("iter_0000002" if optimizer else "release"))
    found = _tensors(tmp_path / "run" / "checkpoints" / f"iter_{start[0] + 1:07d}")
    assert optimizer == any(name.startswith("optimizer.state.exp_avg") for name in expected)
    if case == "pretrained":  # a fresh optimizer
        expected = {name: tensor for name, tensor in expected.items() if not name.startswith("optimizer.")}
    _assert_equal({name: found[name] for name in expected}, expected)


def _plain(root: Path, tensors: dict[str, torch.Tensor], iteration: int = 1) -> Path:
    """A save folder with a committed checkpoint of any tensors."""
    folder = root / f"iter_{iteration:07d}"
    folder.mkdir(parents=True)
    writer = DcpWriter(folder)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.finish()
    (folder / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')
    commit.adopt(folder)
    (root / SIDECAR).write_text('{"format": 1}')
    return root


def test_bf16_is_summed_in_fp32(tmp_path: Path) -> None:
    """256 + 1 + 0.5 is 256 in bf16: its mean would be 85.5, and is 86."""
    state = {"optimizer.state.exp_avg.w": torch.ones(3)}
    roots = [
        _plain(tmp_path / str(value), {"w": torch.full((3,), value, dtype=torch.bfloat16), **state})
        for value in (256.0, 1.0, 0.5)
    ]
    average(AverageOptions(tuple(map(str, roots)), tmp_path / "soup"))
    found = _tensors(tmp_path / "soup" / "iter_0000001")["w"]
    stacked = torch.stack([_tensors(root / "iter_0000001")["w"] for root in roots])
    assert torch.equal(found, stacked.float().mean(0).to(torch.bfloat16))
    in_bf16 = (stacked[0] + stacked[1] + stacked[2]) / 3
    assert found.dtype == torch.bfloat16 and not torch.equal(found, in_bf16)


W, MOMENT = "decoder.w", "optimizer.state.exp_avg.decoder.w"
GOOD = {W: torch.ones(4, 2), MOMENT: torch.ones(4, 2)}


def _flip_a_byte(root: Path) -> None:
    path = next(path for path in (root / "iter_0000001").glob("*.distcp"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _other(tensors: dict[str, torch.Tensor]) -> Callable[[Path], None]:
    def replace(root: Path) -> None:
        shutil.rmtree(root)
        _plain(root, tensors)

    return replace


#: What is done to the second checkpoint, and what is said.
BAD_SOURCES: dict[str, tuple[Callable[[Path], object], str]] = {
    "uncommitted": (lambda root: commit.retract(root / "iter_0000001"), "iter_0000001: no COMPLETE"),
    "newest_uncommitted": (
        lambda root: commit.retract(_plain(root, GOOD, 2) / "iter_0000002"),
        "iter_0000002: no COMPLETE.*complete there: iter_0000001",
    ),
    "flipped_byte": (_flip_a_byte, "distcp: hash .* the file is damaged"),
    "missing": (shutil.rmtree, "--checkpoint .*b: no such folder"),
    "empty": (lambda root: shutil.rmtree(root / "iter_0000001"), "no checkpoint in it"),
    "no_sidecar": (lambda root: (root / SIDECAR).unlink(), "megatron_hybrid.json: missing; training writes it"),
    "another_model": (
        lambda root: (root / SIDECAR).write_text('{"format": 1, "norm_placement": "pre"}'),
        "another model .*norm_placement: 'pre', there None",
    ),
    "shape": (_other({**GOOD, W: torch.ones(4, 3)}), r"tensor decoder.w: \[4, 2\] in .*a/iter.*, \[4, 3\] in .*b/iter"),
    "name": (_other({**GOOD, "x": torch.ones(1)}), "tensor x: .*b/iter_0000001 has it, .*a/iter_0000001 does not"),
    "no_moments": (_other({W: torch.ones(4, 2)}), f"tensor {MOMENT}: .*--without-optimizer"),
}


@pytest.mark.parametrize("bad", BAD_SOURCES)
def test_a_bad_source_is_one_line(bad: str, tmp_path: Path) -> None:
    spoil, message = BAD_SOURCES[bad]
    first, second = (_plain(tmp_path / name, GOOD) for name in "ab")
    spoil(second)
    with pytest.raises(ToolError, match=message) as refused:
        average(AverageOptions((str(first), str(second)), tmp_path / "soup"))
    assert "\n" not in str(refused.value)
    assert {path.name for path in tmp_path.iterdir()} <= {"a", "b"}


BAD_WEIGHTS = {
    "0.5": "1 weights for 2 checkpoints",
    "0.5,0.6": "their sum is 1.1, legal: 1",
    "nan,1": "legal: finite numbers of 0 or more",
    "inf,0": "legal: finite",
    "1.5,-0.5": "of 0 or more",
}


@pytest.mark.parametrize("weights", BAD_WEIGHTS)
def test_weights_that_make_no_mean(weights: str, tmp_path: Path) -> None:
    given = tuple(float(word) for word in weights.split(","))
    with pytest.raises(ToolError, match=BAD_WEIGHTS[weights]):
        average(AverageOptions(("a", "b"), tmp_path / "soup", given))


def test_fewer_than_two_a_missing_iteration_and_an_output_in_the_way(tmp_path: Path) -> None:
    roots = tuple(str(_plain(tmp_path / name, GOOD)) for name in "ab")
    with pytest.raises(ToolError, match="given 1 time"):
        average(AverageOptions(roots[:1], tmp_path / "soup"))
    with pytest.raises(ToolError, match="no iter_0000009 in it; complete there: iter_0000001"):
        average(AverageOptions((roots[0], f"{roots[1]}@9"), tmp_path / "soup"))
    with pytest.raises(ToolError, match="legal: DIR or DIR@ITERATION"):
        average(AverageOptions((roots[0], f"{roots[1]}@x"), tmp_path / "soup"))
    with pytest.raises(ToolError, match="a source is in it"):
        average(AverageOptions(roots, tmp_path / "a", force=True))
    (tmp_path / "soup").mkdir()
    (tmp_path / "soup" / "mine").write_text("kept")
    with pytest.raises(ToolError, match="it is not empty"):
        average(AverageOptions(roots, tmp_path / "soup"))
    assert (tmp_path / "soup" / "mine").read_text() == "kept"


def test_the_command(tmp_path: Path) -> None:
    first, second = (str(_plain(tmp_path / name, GOOD)) for name in "ab")
    command = [
        sys.executable,
        "-m",
        "megatron_hybrid.checkpoint.average",
        "--checkpoint",
        first,
        "--checkpoint",
        second,
    ]
    command += ["--output", str(tmp_path / "soup"), "--weights"]
    refused = subprocess.run([*command, "0.5,0.4"], capture_output=True, text=True, timeout=60)
    assert (
        refused.returncode == 1 and refused.stderr.startswith("error: --weights") and not (tmp_path / "soup").exists()
    )
    done = subprocess.run([*command, "0.5,0.5"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "the mean of 2 checkpoints, 2 tensors" in done.stdout, done.stderr
    assert discovery.fault_of(tmp_path / "soup" / "iter_0000001") is None
