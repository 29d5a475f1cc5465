"""The loss's kernels against PyTorch in fp64: in triton's interpreter, and on a GPU in bf16 at the 7B's vocabulary."""

from __future__ import annotations

import os

import pytest
import torch

from megatron_hybrid.modules import cross_entropy

interpreted = os.environ.get("TRITON_INTERPRET") == "1"


def _compare(rows: int, columns: int, padding: int, dtype: torch.dtype, device: str) -> tuple[float, float]:
    """Largest error of logsumexp and label's logit, and of the gradient over its largest entry beside the label's."""
    from megatron_hybrid.kernels import triton_cross_entropy as fused

    generator = torch.Generator(device).manual_seed(1)
    wide = 5 * torch.randn(rows, columns + 7, generator=generator, device=device).to(dtype)
    logits = wide[:, :columns]  # rows apart
    logits[:, columns - padding :] = torch.finfo(dtype).min
    logits[0, : columns - padding] = 80.0 * torch.linspace(-1, 1, columns - padding, device=device).to(dtype)
    local = torch.randint(-1, columns - padding, (rows,), generator=generator, device=device)
    local[1] = -1
    grads = torch.randn(2, rows, generator=generator, device=device)

    exact = logits.double().requires_grad_()
    logsumexp = exact.logsumexp(-1)
    picked = torch.where(local >= 0, exact.gather(1, local.clamp(min=0)[:, None])[:, 0], 0.0)
    # As the layer combines them: loss = logsumexp - picked.
    ((grads[0] + grads[1]) * logsumexp - grads[0] * picked).sum().backward()

    found = fused.logsumexp_and_picked(logits, local)
    out = logits.clone()
    fused.logits_gradient(logits, local, found[0], *grads, out)
    fused.logits_gradient(wide[:, :columns], local, found[0], *grads, wide[:, :columns])  # in place
    assert torch.equal(wide[:, :columns], out)
    values = max((a - b).abs().max().item() for a, b in zip(found, (logsumexp, picked), strict=True))
    assert exact.grad is not None
    return values, ((out.double() - exact.grad).norm() / exact.grad.norm()).item()


@pytest.mark.skipif(not interpreted, reason="needs TRITON_INTERPRET=1 from the start; tests/run.sh runs it so")
@pytest.mark.parametrize(("columns", "padding"), [(200, 0), (4096, 1), (9001, 100)])
def test_interpreted(columns: int, padding: int) -> None:
    values, gradient = _compare(5, columns, padding, torch.float32, "cpu")
    assert values < 2e-5 and gradient < 2e-6  # measured 8e-6 (of values up to 80) and 4e-7


@pytest.mark.skipif(not interpreted, reason="needs TRITON_INTERPRET=1 from the start; tests/run.sh runs it so")
def test_nan_is_not_lost() -> None:
    from megatron_hybrid.kernels import triton_cross_entropy as fused

    logits = torch.zeros(2, 5000)
    logits[1, 4999] = float("nan")
    logsumexp, _ = fused.logsumexp_and_picked(logits, torch.zeros(2, dtype=torch.int64))
    assert logsumexp[0].isfinite() and logsumexp[1].isnan()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu() -> None:
    values, gradient = _compare(64, 100352, 75, torch.bfloat16, "cuda")
    assert values < 2e-5 and gradient < 2e-3  # bf16 rounds by 2^-9 at most


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_beyond_32_bits() -> None:
    """22,000 tokens of 100,352 rows, more than 2^31 logits: the first and last tokens as in plain PyTorch."""
    import torch.distributed as dist

    logits = torch.randn(22_000, 100_352, device="cuda", dtype=torch.bfloat16).requires_grad_()
    labels = torch.randint(0, 100_352, (22_000,), device="cuda")

    class Alone:
        def rank(self) -> int:
            return 0

        def size(self) -> int:
            return 1

    group: dist.ProcessGroup = Alone()  # type: ignore[assignment]
    losses, logsumexp = cross_entropy.token_losses(logits, labels, group)
    (losses + 0.1 * logsumexp).sum().backward()
    assert logits.grad is not None
    for rows in (slice(0, 64), slice(21_936, 22_000)):
        plain = logits.detach()[rows].float().requires_grad_()
        expected = torch.nn.functional.cross_entropy(plain, labels[rows], reduction="none")
        (expected + 0.1 * plain.logsumexp(-1)).sum().backward()
        torch.testing.assert_close(losses[rows], expected, rtol=1e-6, atol=1e-5)
        assert plain.grad is not None
        assert (logits.grad[rows].float() - plain.grad).norm() < 2e-3 * plain.grad.norm()
