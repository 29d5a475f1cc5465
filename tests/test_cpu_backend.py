"""The CPU backend: every symbol it replaces exists, by name; nothing happens where a GPU is present."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from megatron_hybrid import cpu_backend
from megatron_hybrid.cpu_backend import REPLACEMENTS, Replacement


@pytest.mark.parametrize("replacement", REPLACEMENTS, ids=lambda r: r.name)
def test_replaced_symbol_exists(replacement: Replacement) -> None:
    owner, attribute = replacement.owner()
    assert hasattr(owner, attribute)
    assert replacement.reason


def test_a_removed_symbol_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = Replacement("megatron.core.utils", "no_such_function", lambda original: original, "a test")
    monkeypatch.setattr(cpu_backend, "REPLACEMENTS", (*REPLACEMENTS, gone))
    monkeypatch.setattr(cpu_backend, "_enabled", False)
    with pytest.raises(RuntimeError, match=r"megatron\.core\.utils\.no_such_function is gone .* because: a test"):
        cpu_backend.enable()


def test_nothing_is_replaced_with_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_backend, "_enabled", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    before = torch.cuda.current_device
    assert cpu_backend.enable() is False
    assert torch.cuda.current_device is before


def test_importing_replaces_nothing() -> None:
    code = (
        "import torch; before = torch.cuda.current_device, torch.Tensor.cuda, torch.Tensor.type\n"
        "import megatron_hybrid.cpu_backend, megatron_hybrid.pretrain, megatron_hybrid.compat\n"
        "assert before == (torch.cuda.current_device, torch.Tensor.cuda, torch.Tensor.type)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_step_counters_are_separate_after_load() -> None:
    """What the wrapped load does with one counter that all parameters share."""
    shared = torch.tensor(3.0)

    class Optimizer:
        def __init__(self) -> None:
            self.optimizer = torch.optim.Adam([torch.zeros(1, requires_grad=True), torch.zeros(1, requires_grad=True)])

    optimizer = Optimizer()
    load = cpu_backend._load_with_own_steps(
        lambda self, state: [
            self.optimizer.state[p].update(step=shared) for p in self.optimizer.param_groups[0]["params"]
        ]
    )
    load(optimizer, {})
    first, second = optimizer.optimizer.state.values()
    assert first["step"] == second["step"] == 3 and first["step"] is not second["step"]
