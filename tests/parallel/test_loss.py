"""The loss with z-loss, and without whole logits, under tensor parallelism: against plain PyTorch, every gradient."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_hybrid.modules import cross_entropy
from megatron_hybrid.training.loss import forward_step, sum_loss
from tests.parallel import tiny
from tests.parallel.compare import STAGES, TOLERANCE, assert_same, differences, measure
from tests.parallel.ranks import run_ranks
from tests.parallel.tiny import Layout

#: Large, so that its gradient is of the cross entropy's order.
Z_LOSS = 0.05

#: With tokens of a chunk: 0 for whole logits.
CASES = [
    (Layout(), 25),
    (Layout(tp=2), 0),
    (Layout(tp=4), 0),
    (Layout(tp=4, sp=True, pp=2, pattern=STAGES), 25),
    (Layout(tp=2, cp=2, sp=True), 0),
    (Layout(tp=5), 25),  # 192 rows on 5 ranks are padded
]


def _plain_forward_step(batches: Any, model: torch.nn.Module) -> Any:
    """Whole logits, PyTorch's logsumexp, autograd."""
    batch = next(batches)
    logits = model(batch["tokens"], batch["position_ids"], None)[..., : tiny.PADDED_VOCAB].float()
    logsumexp = logits.logsumexp(-1)
    losses = logsumexp - logits.gather(-1, batch["labels"][..., None])[..., 0]
    mask = batch["loss_mask"]

    def loss(output: torch.Tensor) -> Any:
        total = ((losses + Z_LOSS * logsumexp**2) * mask).sum()
        return total, mask.sum().int(), {"lm loss": torch.stack([(losses * mask).sum(), mask.sum()]).detach()}

    return logits, loss


def _measure(layout: Layout, chunks: list[torch.nn.Module], step: Any) -> dict[str, Any]:
    tiny.forward_step = step
    return measure(layout, chunks)


def _plain(rank: int, folder: Path) -> dict[str, Any]:
    chunks = tiny.build(Layout())
    tiny.unsettle(chunks)
    tiny.save_weights(chunks, folder)
    return _measure(Layout(), chunks, lambda batches, model, **unused: _plain_forward_step(batches, model))


def _split(rank: int, layout: Layout, folder: Path, chunk_tokens: int, broken: str = "") -> dict[str, Any]:
    if broken == "logsumexp of this rank's rows only":
        original = cross_entropy._combine
        cross_entropy._combine = lambda parts, group: (original(parts, group)[0], torch.cat([p[0] for p in parts]))
    elif broken == "z-loss without its gradient":
        original_gradient = cross_entropy._logits_gradient
        cross_entropy._logits_gradient = lambda logits, local, lse, losses, z, out: original_gradient(
            logits, local, lse, losses, torch.zeros_like(z), out=out
        )
    chunks = tiny.build(layout)
    tiny.load_weights(chunks, folder)
    for chunk in chunks:
        chunk.report_logsumexp, chunk.loss_chunk_tokens = True, chunk_tokens
    return _measure(layout, chunks, partial(forward_step, z_loss=Z_LOSS))


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("weights") / "plain"
    return folder, run_ranks(_plain, 1, folder)[0]


@pytest.mark.parametrize(("layout", "chunk_tokens"), CASES, ids=str)
def test_z_loss_as_in_plain_pytorch(layout: Layout, chunk_tokens: int, reference: Any) -> None:
    folder, expected = reference
    assert_same(expected, run_ranks(_split, layout.ranks, layout, folder, chunk_tokens))


@pytest.mark.parametrize("broken", ["logsumexp of this rank's rows only", "z-loss without its gradient"])
def test_broken_z_loss_differs(broken: str, reference: Any) -> None:
    folder, expected = reference
    found = differences(expected, run_ranks(_split, 2, Layout(tp=2), folder, 0, broken))
    assert found["output_layer.weight"] > 100 * TOLERANCE


def test_reports_and_normaliser() -> None:
    """ "lm loss" is the cross entropy alone; what counts is the mask's tokens; evaluation reports nothing else."""
    mask = torch.tensor([[1.0, 1.0, 0.0]])
    output = torch.tensor([[[1.0, 2.0, 5.0]], [[3.0, 4.0, 7.0]]], requires_grad=True)
    seen: list[torch.Tensor] = []
    total, count, reports = sum_loss(mask, output, check_finite=False, z_loss=0.1, observe=seen.append)
    assert float(total.detach()) == pytest.approx(3 + 0.1 * 25) and int(count) == 2
    assert reports["lm loss"].tolist() == [3.0, 2.0] and reports["z loss"].tolist() == pytest.approx([2.5, 2.0])
    assert seen[0].tolist() == [3.0, 2.0]
    filtered = sum_loss(mask, output, check_finite=False, counted_mask=torch.ones(1, 3))
    assert int(filtered[1]) == 3 and filtered[2]["lm loss"].tolist() == [3.0, 3.0]
    with torch.no_grad():
        assert set(sum_loss(mask, output, check_finite=False, z_loss=0.1)[2]) == {"lm loss"}


class _Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = [x for x in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(x, torch.Tensor)]
        self.elements = max([self.elements, *(x.numel() for x in made)])
        return out


def _largest(rank: int, chunk_tokens: int) -> int:
    tokens, rows, width = 1000, 3000, 32
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, width, generator=generator, requires_grad=True)
    weight = torch.randn(rows, width, generator=generator, requires_grad=True)
    labels = torch.randint(0, rows, (tokens,), generator=generator)
    group = torch.distributed.group.WORLD
    with _Largest() as largest:
        if chunk_tokens:
            losses, logsumexp = cross_entropy.chunked_token_losses(hidden, weight, labels, group, chunk_tokens, rows)
        else:
            losses, logsumexp = cross_entropy.token_losses(hidden @ weight.t(), labels, group)
        (losses + logsumexp.square()).mean().backward()
    return largest.elements


def test_logits_never_exist_whole() -> None:
    """Nothing is larger than a chunk's logits, or than the weight."""
    assert run_ranks(_largest, 1, 100)[0] == 100 * 3000
    assert run_ranks(_largest, 1, 0)[0] == 1000 * 3000
