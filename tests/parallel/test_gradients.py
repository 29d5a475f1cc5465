"""Every way of splitting the model gives one rank's loss, gradients and gradient norm."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import parallel_state

from megatron_hybrid import model
from megatron_hybrid.config import HybridConfig
from megatron_hybrid.modules import gated_delta_net, norms
from megatron_hybrid.training import loss
from tests.parallel import tiny
from tests.parallel.ranks import run_ranks
from tests.parallel.tiny import Layout

STAGES = "GGG*|GGG*"
INTERLEAVED = "GG|G*|GGG|*"

LAYOUTS = [
    Layout(tp=2),
    Layout(tp=2, sp=True),
    Layout(tp=3, sp=True),
    Layout(pp=2, pattern=STAGES),
    Layout(pp=2, pattern="GGG*GG|G*"),
    Layout(pp=2, pattern=INTERLEAVED),
    Layout(dp=2),
    Layout(dp=2, distributed_optimizer=True),
    Layout(tp=2, sp=True, pp=2, pattern=STAGES),
    Layout(tp=2, pp=2, pattern=INTERLEAVED, distributed_optimizer=True),
]

#: fp32: what the order of a sum over ranks may move.
TOLERANCE = 1e-6


def _reference(rank: int, folder: Path, options: HybridConfig | None) -> dict[str, Any]:
    chunks = tiny.build(Layout(), options)
    tiny.unsettle(chunks)
    tiny.save_weights(chunks, folder)
    return _measure(Layout(), chunks)


def _split(rank: int, layout: Layout, folder: Path, options: HybridConfig | None, broken: str) -> dict[str, Any]:
    _break(broken)
    chunks = tiny.build(layout, options)
    tiny.load_weights(chunks, folder)
    return _measure(layout, chunks)


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


def _measure(layout: Layout, chunks: list[torch.nn.Module]) -> dict[str, Any]:
    trainer = tiny.Trainer(layout, chunks)
    total = trainer.backward()
    trainer.gather_gradients()
    grads = tiny.global_tensors(chunks, "grad")
    _, norm, _ = trainer.optimizer.step()
    return {"loss": total, "grads": grads, "norm": float(norm)}


def _differences(reference: dict[str, Any], results: list[dict[str, Any]]) -> dict[str, float]:
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


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("weights") / "reference"


@pytest.fixture(scope="module")
def reference(weights: Path) -> dict[str, Any]:
    return run_ranks(_reference, 1, weights, None)[0]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_same_as_one_rank(layout: Layout, reference: dict[str, Any], weights: Path) -> None:
    differences = _differences(reference, run_ranks(_split, layout.ranks, layout, weights, None, ""))
    worst = max(differences, key=lambda key: differences[key])
    assert differences[worst] <= TOLERANCE, f"{worst}: {differences[worst]:.2e}"


def test_gradients_are_large_enough_to_compare(reference: dict[str, Any]) -> None:
    """A gradient near the tolerance would make the comparison empty."""
    largest = {key: grad.abs().max().item() for key, grad in tiny.assemble([reference["grads"]]).items()}
    assert min(largest.values()) > 100 * TOLERANCE, sorted(largest.items(), key=lambda item: item[1])[:3]


@pytest.mark.parametrize(
    ("broken", "parameter"),
    [
        ("head norm gradient stays on its rank", "out_norm.weight"),
        ("q/k norm statistics stay on their rank", "loss"),
        ("q/k statistics are not reduced in backward", "linear_qkv.weight"),
    ],
    ids=lambda value: str(value),
)
def test_without_the_remedy_it_differs(broken: str, parameter: str, reference: dict[str, Any], weights: Path) -> None:
    layout = Layout(tp=2)
    differences = _differences(reference, run_ranks(_split, layout.ranks, layout, weights, None, broken))
    assert max(value for key, value in differences.items() if parameter in key) > 100 * TOLERANCE


@pytest.mark.parametrize(
    "options",
    [
        HybridConfig(qk_norm_width="head"),
        HybridConfig(qk_norm_width="none", norm_placement="pre", gdn_output_gate=False),
    ],
    ids=["head_qk_norm", "pre-no_qk_norm-no_output_gate"],
)
def test_other_architectures_split_too(options: HybridConfig, tmp_path: Path) -> None:
    layout = Layout(tp=2)
    reference = run_ranks(_reference, 1, tmp_path / "weights", options)[0]
    differences = _differences(reference, run_ranks(_split, layout.ranks, layout, tmp_path / "weights", options, ""))
    assert max(differences.values()) <= TOLERANCE, differences


def _interleaved_in_batches(rank: int, folder: Path, checked: bool) -> dict[str, Any]:
    layout = Layout(pp=2, pattern=INTERLEAVED, overrides={"overlap_p2p_comm": False, "batch_p2p_comm": True})
    if not checked:
        model._check_interleaving = lambda config, pattern: None
    chunks = tiny.build(layout)
    tiny.load_weights(chunks, folder)
    return _measure(layout, chunks)


def test_interleaved_stages_on_two_ranks_need_overlapped_messages(reference: dict[str, Any], weights: Path) -> None:
    with pytest.raises(AssertionError, match=r"overlap_p2p_comm=False with pipeline size 2 and 4 stages"):
        run_ranks(_interleaved_in_batches, 2, weights, True)
    unchecked = run_ranks(_interleaved_in_batches, 2, weights, False)
    assert max(_differences(reference, unchecked).values()) > 100 * TOLERANCE
