"""What the tests of layouts share: measure a split model, take a remedy out, compare with one rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state

from megatron_hybrid.config import HybridConfig
from megatron_hybrid.modules import gated_delta_net, norms
from megatron_hybrid.training import loss
from tests.parallel import tiny
from tests.parallel.tiny import Layout

STAGES = "GG|G*"

#: fp32: what the order of a sum over ranks may move.
TOLERANCE = 1e-6


def one_rank(
    rank: int, folder: Path, options: HybridConfig | None = None, layout: Layout | None = None
) -> dict[str, Any]:
    """Loss, gradients and gradient norm of unsettled weights, which are left in `folder`."""
    layout = layout or Layout()
    chunks = tiny.build(layout, options)
    tiny.unsettle(chunks)
    tiny.save_weights(chunks, folder)
    return measure(layout, chunks)


def split(
    rank: int, layout: Layout, folder: Path, options: HybridConfig | None = None, broken: str = ""
) -> dict[str, Any]:
    """The same of the weights in `folder`, split; broken: what to take out first."""
    _break(broken)
    chunks = tiny.build(layout, options)
    tiny.load_weights(chunks, folder)
    return measure(layout, chunks)


def _break(what: str) -> None:
    """Take one remedy out (in this forked rank only), to see that the comparison notices."""
    if what == "head norm gradient stays on its rank":
        gated_delta_net.shared_by_heads = lambda weight, group: weight
    elif what == "q/k norm statistics stay on their rank":
        norms.reduce_from_tensor_model_parallel_region = lambda x, group: x
        norms.copy_to_tensor_model_parallel_region = lambda x, group: x
    elif what == "loss multiplied by the context-parallel size":
        summed = loss.sum_loss

        def multiplied(*args: Any, **kwargs: Any) -> loss.LossParts:
            total, count, report = summed(*args, **kwargs)
            return total * parallel_state.get_context_parallel_world_size(), count, report

        loss.sum_loss = multiplied
    elif what == "q/k statistics are not reduced in backward":
        norms.copy_to_tensor_model_parallel_region = lambda x, group: x


def measure(layout: Layout, chunks: list[torch.nn.Module]) -> dict[str, Any]:
    trainer = tiny.Trainer(layout, chunks)
    total = trainer.backward()
    trainer.gather_gradients()
    grads = tiny.global_tensors(chunks, "grad")
    _, norm, _ = trainer.optimizer.step()
    return {"loss": total, "grads": grads, "norm": float(norm)}


def differences(reference: dict[str, Any], results: list[dict[str, Any]]) -> dict[str, float]:
    """Largest absolute difference of the loss, of the gradient norm and of each parameter's gradient."""
    whole = tiny.assemble([reference["grads"]])
    split = tiny.assemble([r["grads"] for r in results])
    assert whole.keys() == split.keys()
    total = max((r["loss"] for r in results), key=lambda t: t[1])
    return {
        "loss": abs(float(total[0] / total[1] - reference["loss"][0] / reference["loss"][1])),
        # The norm is a sum over all parameters, of order 2 here: relative, unlike the rest.
        "gradient norm": max(abs(r["norm"] / reference["norm"] - 1) for r in results),
        **{key: (whole[key] - split[key]).abs().max().item() for key in whole},
    }


def assert_same(reference: dict[str, Any], results: list[dict[str, Any]]) -> None:
    """Everything within TOLERANCE; names the worst."""
    found = differences(reference, results)
    worst = max(found, key=lambda key: found[key])
    assert found[worst] <= TOLERANCE, f"{worst}: {found[worst]:.2e}"
