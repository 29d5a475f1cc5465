"""What gated_delta.py refuses before any work, on the reference; test_triton_interpreter.py asks the same of triton."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_hybrid.kernels.checks import check_call
from tests.kernels import wrong_calls


@pytest.mark.parametrize("function", wrong_calls.DIMENSIONS)
def test_what_is_changed_was_legal(function: str) -> None:
    wrong_calls.call(function, wrong_calls.legal(function), "reference")


@wrong_calls.CASES
def test_wrong_arguments(function: str, change: wrong_calls.Change, said: str) -> None:
    wrong_calls.check(function, change, said, "reference")


def test_values_elsewhere_than_on_cpu_are_not_read() -> None:
    """A device without values stands for a GPU, whose values would have to be waited for."""
    x = torch.zeros(1, 6, 2, 16, device="meta")
    call = {"key_heads": "Hk", "value_heads": "H", "sizes": {"Hk": 1}}
    check_call({"x": ("B, T, H, V", x)}, cu_seqlens=torch.tensor([0, 6]).to("meta"), **call)
    with pytest.raises(ValueError, match=r"cu_seqlens is \[0, 5\]"):
        check_call({"x": ("B, T, H, V", x)}, cu_seqlens=torch.tensor([0, 5]), **call)


@pytest.mark.parametrize("function", ["shard_summary", "decode_step"])
def test_fla_is_no_name_of_the_reference(function: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What flash-linear-attention is not asked to do is refused where it is installed, and nothing else does it."""
    (tmp_path / "fla").mkdir()
    (tmp_path / "fla" / "__init__.py").write_text("raise ImportError('not to be imported')")
    monkeypatch.syspath_prepend(tmp_path)
    given = wrong_calls.legal(function)
    before = {name: x.clone() for name, x in given.items() if isinstance(x, Tensor)}
    with pytest.raises(RuntimeError, match=r"backend fla has no .*; use triton or reference"):
        wrong_calls.call(function, given, "fla")
    assert all(torch.equal(before[name], given[name]) for name in before)
