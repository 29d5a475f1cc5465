"""Masters in checkpoints: whole ones are asked for, and what an earlier version wrote instead is refused."""

from __future__ import annotations

import gc
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_hybrid import pretrain
from megatron_hybrid.checkpoint import commit, masters
from megatron_hybrid.checkpoint.average import AverageOptions, average
from megatron_hybrid.flags import KNOWN
from megatron_hybrid.modules import fp32_parameters
from megatron_hybrid.tools.cli import ToolError
from megatron_hybrid.tools.convert.dcp_writer import DcpWriter
from megatron_hybrid.tools.convert.to_olmo_core import OlmoCoreOptions, export_olmo_core
from megatron_hybrid.tools.dcp_reader import CONFIG_FILE, TRACKER_FILE, TorchDistCheckpoint
from tests.checkpoint.runs import arguments, loading, train
from tests.parallel.ranks import run_ranks

MASTER = masters.MASTER


def _no_remainders(rank: int, iteration: int) -> None:
    from megatron.core.optimizer import DistributedOptimizer

    optimizers = [thing for thing in gc.get_objects() if isinstance(thing, DistributedOptimizer)]
    assert optimizers and not any(one.config.store_param_remainders for one in optimizers)


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bf16 run of two steps, whose optimizer was asked for whole masters."""
    run = tmp_path_factory.mktemp("trained")
    flags = arguments(data, run, "--bf16", "--exit-interval", "2")
    assert run_ranks(train, 1, run, flags, _no_remainders) == [0]
    return run


def test_no_flag_asks_for_remainders() -> None:
    """So that what the plugin sets stands."""
    assert "remainder" not in KNOWN.read_text()


def _remainders(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What Transformer Engine's Adam kept beside bf16 weights, as Megatron stored it."""
    names = [n for n in tensors if n.startswith(MASTER) and tensors[n.removeprefix(MASTER)].dtype == torch.bfloat16]
    return {name: (tensors[name].view(torch.int32) & 0xFFFF).to(torch.int16).float() for name in names}


def _stale(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """First values of fp32 parameters."""
    return {name: tensors[name] + 1e-3 for name in tensors if name.startswith(MASTER) and name.endswith("A_log")}


def _as_int16(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.to(torch.int16) for name, tensor in _remainders(tensors).items()}


FAULTS = {
    "remainders": (_remainders, r"that of \S+ is up to \S+ from it"),
    "stale": (_stale, r"that of \S+A_log is up to 0.001 from it"),
    "int16": (_as_int16, "is of int16"),
}


def _with(change: Any, run: Path, target: Path) -> Path:
    """The run's checkpoints with other masters, as an earlier version would have written and committed them."""
    shutil.copytree(run / "checkpoints", target / "checkpoints")
    folder = target / "checkpoints" / "iter_0000002"
    source = TorchDistCheckpoint(run / "checkpoints" / folder.name)
    tensors = {name: source.read(name) for name in source.tensors}
    changed = change(tensors)
    assert changed
    shutil.rmtree(folder)
    folder.mkdir()
    with DcpWriter(folder) as writer:
        for name, tensor in {**tensors, **changed}.items():
            writer.add_tensor(name, tensor)
        for name in source.objects:
            with source.open_object(name) as handle:
                writer.add_bytes(name, handle.read())
    for name in (CONFIG_FILE, "common.pt"):
        if (source.folder / name).exists():
            shutil.copyfile(source.folder / name, folder / name)
    commit.adopt(folder)
    assert (folder.parent / TRACKER_FILE).read_text() == "2"
    return target


@pytest.mark.parametrize("case", FAULTS)
def test_what_are_no_masters_is_refused(case: str, data: Path, trained: Path, tmp_path: Path) -> None:
    change, said = FAULTS[case]
    assert masters.fault(TorchDistCheckpoint(trained / "checkpoints" / "iter_0000002")) is None
    bad = _with(change, trained, tmp_path / "bad")
    saved = str(bad / "checkpoints")
    said = f"iter_0000002: its optimizer state holds no fp32 masters of the weights .*{said}.*--no-keep-moments"
    for optimizer in (True, False):
        with pytest.raises(ToolError, match=said):
            average(AverageOptions((saved, str(trained / "checkpoints")), tmp_path / "soup", optimizer=optimizer))
    with pytest.raises(ToolError, match=said):
        export_olmo_core(OlmoCoreOptions(Path(saved), tmp_path / "core", optimizer=True))
    export_olmo_core(OlmoCoreOptions(Path(saved), tmp_path / "weights"))
    assert not (tmp_path / "soup").exists() and not (tmp_path / "core").exists()
    assert run_ranks(train, 1, bad, arguments(data, bad, "--bf16", *loading(bad))) == [3]


def test_a_stage_takes_such_weights_but_not_such_moments(data: Path, trained: Path, tmp_path: Path) -> None:
    bad = _with(_remainders, trained, tmp_path / "bad")

    def status(run: Path, *flags: str) -> int:
        folders = ["--pretrained-checkpoint", str(bad / "checkpoints"), *loading(run)]
        return run_ranks(train, 1, run, arguments(data, run, "--bf16", "--exit-interval", "1", *folders, *flags))[0]

    assert status(tmp_path / "alone", "--finetune") == 0
    assert status(tmp_path / "kept", "--finetune", "--keep-moments") == 3


def test_what_an_optimizer_saves_of_a_parameter() -> None:
    """Of an fp32 parameter itself, not the copy of its first value; never the lower halves of masters."""
    fp32, bf16 = torch.ones(2), torch.ones(2, dtype=torch.bfloat16)

    def states(dtype: torch.dtype) -> Any:
        return fp32_parameters._true_masters(lambda self, param: {"param": torch.zeros(2, dtype=dtype), "exp_avg": 1})

    optimizer = SimpleNamespace(
        model_param_group_index_map={fp32: (1, 0), bf16: (0, 0)},
        optimizer=SimpleNamespace(param_groups=[{"params": [bf16]}, {"params": [fp32]}]),
    )
    assert states(torch.float32)(optimizer, fp32) == {"param": fp32, "exp_avg": 1}
    assert not states(torch.float32)(optimizer, bf16)["param"].any()
    with pytest.raises(RuntimeError, match="store_param_remainders = False"):
        states(torch.int16)(optimizer, bf16)


def _with_fp8_parameters(rank: int, run: Path, flags: list[str]) -> int:
    """As far as the optimizer is told: there are none without a GPU."""
    provide = pretrain.provide_model

    def model(*args: Any, **kwargs: Any) -> Any:
        made = provide(*args, **kwargs)
        made.config.fp8_param = True
        return made

    pretrain.provide_model = model
    return train(rank, run, flags)


def test_fp8_parameters_never_start_from_weights_alone(data: Path, trained: Path, tmp_path: Path) -> None:
    """Their masters would be the weights rounded to FP8."""
    saved = str(trained / "checkpoints")
    average(AverageOptions((saved, saved), tmp_path / "mean", optimizer=False))

    def status(name: str, *flags: str, work: Any = _with_fp8_parameters) -> int:
        run = tmp_path / name
        return run_ranks(work, 1, run, arguments(data, run, "--bf16", "--exit-interval", "3", *flags))[0]

    first = ("--pretrained-checkpoint", saved, "--finetune", "--load")
    assert status("stage", *first, str(tmp_path / "stage" / "checkpoints")) == 3
    assert status("no optimizer", "--load", saved, "--no-load-optim") == 3
    assert status("release", "--load", str(tmp_path / "mean")) == 3
    assert status("in bf16", "--load", str(tmp_path / "mean"), work=train) == 0
    assert status("moments kept", *first, str(tmp_path / "moments kept" / "checkpoints"), "--keep-moments") == 0
    assert status("continued", "--load", saved) == 0
    assert status("fresh") == 0
