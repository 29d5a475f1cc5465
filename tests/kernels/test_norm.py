"""The q/k norm's kernels against PyTorch in fp64: whole rows, and rows shared by two ranks; interpreter and GPU."""

from __future__ import annotations

import os

import pytest
import torch

EPS = 1e-6
CASES = [(3, 2, 3, 16), (20, 1, 2, 32)]  # s, b, h, d: not a power of two; more rows than programs


def _error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double() - expected).norm() / expected.norm()).item()


def _compare(shape: tuple[int, int, int, int], ranks: int, dtype: torch.dtype, device: str) -> dict[str, float]:
    """Relative errors of y, dx and dweight of a row of ranks x h heads, taken from an interleaved projection."""
    from megatron_hybrid.kernels.triton_norm import Stage, norm, norm_gradient

    s, b, h, d = shape
    generator = torch.Generator(device).manual_seed(1)

    def random(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, device=device).to(dtype)

    x, dy = random(s, b, ranks * h, 3, d)[:, :, :, 1], random(s, b, ranks * h, d)
    weight = 1 + random(ranks * h * d)
    width = ranks * h * d
    exact, exact_weight = x.double().requires_grad_(), weight.double().requires_grad_()
    expected = torch.nn.functional.rms_norm(exact.flatten(2), (width,), exact_weight, EPS).view(x.shape)
    expected.backward(dy.double())
    parts = [slice(i * h, (i + 1) * h) for i in range(ranks)]
    args = [(x[:, :, part], weight.view(ranks, -1)[i]) for i, part in enumerate(parts)]
    stage: Stage = "apply" if ranks > 1 else "whole"
    sums, dots = torch.empty(2, ranks, s * b, device=device)
    if ranks > 1:
        for (part, w), squares in zip(args, sums, strict=True):
            norm(part, w, squares, width, EPS, "sums")
        sums[:] = sums.sum(0)
    made = [norm(part, w, squares, width, EPS, stage) for (part, w), squares in zip(args, sums, strict=True)]
    inputs = [(*args[i], made[i][1], dy[:, :, part], dots[i], width) for i, part in enumerate(parts)]
    if ranks > 1:
        dw = [norm_gradient(*row, "sums")[1] for row in inputs]
        dots[:] = dots.sum(0)
        dx = [norm_gradient(*row, "apply")[0] for row in inputs]
    else:
        dx, dw = ([result] for result in norm_gradient(*inputs[0], "whole"))
    assert exact.grad is not None and exact_weight.grad is not None
    return {
        "y": _error(torch.cat([y for y, _ in made], dim=2), expected.detach()),
        "dx": _error(torch.cat(dx, dim=2), exact.grad),
        "dweight": _error(torch.cat(dw), exact_weight.grad),
    }


@pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1",
    reason="needs TRITON_INTERPRET=1 from the start; tests/run.sh runs it so",
)
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("shape", CASES, ids=str)
def test_interpreted(shape: tuple[int, int, int, int], ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_hybrid.kernels.triton_norm.PROGRAMS", 8)
    errors = _compare(shape, ranks, torch.float32, "cpu")
    assert max(errors.values()) < 1e-6, errors


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("ranks", [1, 2])
def test_on_a_gpu(ranks: int) -> None:
    errors = _compare((2048, 2, 30 // ranks, 128), ranks, torch.bfloat16, "cuda")
    # One rounding to bf16 of y and dx, none of dweight.
    assert max(errors["y"], errors["dx"]) < 2.5e-3 and errors["dweight"] < 1e-5, errors
