"""What gates training: the kernels as training will run them, and that it can fail."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

from megatron_hybrid.kernels import gated_delta, self_test, triton_launch

CPU = torch.device("cpu")
interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1",
    reason="needs TRITON_INTERPRET=1 from the start, since triton reads it on import; tests/run.sh runs them so",
)


@pytest.mark.parametrize("kept", [{"states_every": 4, "keep_intermediates": False}, {"keep_intermediates": True}])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_run_decides_what_is_tested(
    dtype: torch.dtype, kept: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From training's gate to the kernels, whose place the reference takes here, where no GPU is."""
    asked = set()

    def core(qkvz: torch.Tensor, *tensors: Any, backend: str, **options: Any) -> Any:
        if backend == "triton" and torch.is_grad_enabled():
            bounds = options["cu_seqlens"]
            asked.add((qkvz.dtype, qkvz.shape[1], bounds is not None, *(options[name] for name in kept)))
        return original(qkvz, *tensors, backend="reference", **options)

    original = gated_delta.mixer_core
    monkeypatch.setattr(gated_delta, "mixer_core", core)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(self_test, "self_test", lambda *sizes, **kept: self_test.errors_of_both(*sizes, CPU, **kept))
    self_test.before_training.cache_clear()
    errors = self_test.before_training(None, dtype, 16, 16, **kept)
    self_test.before_training.cache_clear()
    gradients = {"qkvz", "ab", "conv_weight", "A_log", "dt_bias", "norm_weight"}
    assert errors.keys() == gradients | {"y", "evaluated", "final"}
    tokens = sum(self_test.documents(kept.get("states_every", 0)))
    assert asked == {(dtype, tokens, packed, *kept.values()) for packed in (False, True)}


@pytest.mark.parametrize("every", [0, 1, 4, 32, 64])
def test_a_document_has_two_pieces_of_states_and_others_are_short(every: int) -> None:
    lengths = self_test.documents(every)
    assert max(lengths) > 64 * max(every, 1) and min(lengths) < 4 and any(4 < n < 64 for n in lengths)


def test_nan_is_no_pass() -> None:
    assert self_test.beyond({"y": float("nan"), "qkvz": 0.001}).startswith("y nan")


@interpreted
@pytest.mark.parametrize(
    ("dtype", "lengths"), [(torch.bfloat16, [2, 66]), (torch.float16, [2, 6])], ids=["bf16", "fp16"]
)
def test_right_kernels_pass(dtype: torch.dtype, lengths: list[int]) -> None:
    """In the rounding of a GPU; the fewer columns, the nearer to the bounds."""
    from tests.kernels.rounding import as_on_a_gpu

    with as_on_a_gpu():
        errors = self_test.mixer_errors(32, 32, CPU, dtype, lengths=lengths, states_every=1)
        tokens = self_test.decode_errors(32, 32, CPU, dtype, tokens=2)
    assert self_test.beyond(errors) == self_test.beyond(tokens, self_test.DECODED) == ""


class Wrong:
    """A kernel that leaves one of its results a twentieth too large, or each time by more."""

    def __init__(self, kernel: Any, result: str, growing: bool = False) -> None:
        self.kernel, self.factor, self.growing = kernel, 1.05, growing
        self.place = list(inspect.signature(kernel.fn).parameters).index(result)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            self.kernel[grid](*args, **kwargs)
            args[self.place].mul_(self.factor)
            self.factor += 0.01 * self.growing

        return launch


@interpreted
@pytest.mark.parametrize(
    ("kernel", "result", "red"),
    [
        ("conv", "v_out", {"final"}),
        ("prepare", "P_out", {"qkvz"}),
        ("norm", "y_out", {"y", "evaluated"}),
        ("norm_backward", "dw_out", {"norm_weight"}),
        ("adjoint_scan", "dr_out", {"qkvz", "conv_weight"}),
        ("query_gradient", "dq_out", {"qkvz"}),
        ("inverse_gradient", "db_out", {"ab"}),
        ("key_gradient", "dA_out", {"A_log"}),
        ("conv_backward", "dw_out", {"conv_weight"}),
    ],
)
def test_a_wrong_kernel_is_red(kernel: str, result: str, red: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_test, "HEADS", 1)
    name = f"{kernel}_kernel"
    monkeypatch.setattr(triton_launch, name, Wrong(getattr(triton_launch, name), result))
    errors = self_test.mixer_errors(16, 16, CPU, torch.float32, lengths=[5])
    assert {name for name, e in errors.items() if not e <= self_test.TOLERANCES[name]} >= red
    monkeypatch.setattr(self_test, "errors_of_both", lambda *sizes, **kept: errors)
    with pytest.raises(RuntimeError, match="fail their self-test on cpu, K = 16, V = 16"):
        self_test.self_test(16, 16, CPU, torch.float32)


@interpreted
def test_other_bits_are_red(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_test, "HEADS", 1)
    monkeypatch.setattr(triton_launch, "norm_kernel", Wrong(triton_launch.norm_kernel, "y_out", growing=True))
    with pytest.raises(RuntimeError, match=r"different bits for the same input twice: y$"):
        self_test.mixer_errors(16, 16, CPU, torch.float32, lengths=[5])
