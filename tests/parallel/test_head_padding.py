"""Tensor-parallel sizes that divide nothing: 6 heads, an FFN of 133 and a vocabulary of 189 on 2, 3, 4, 5 and 8 ranks.

Loss, gradients and gradient norm are one rank's, and the padding is exactly zero and stays so.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_hybrid import model
from megatron_hybrid.config import HybridConfig
from megatron_hybrid.modules.norms import QKNorm
from megatron_hybrid.parallel import head_padding
from megatron_hybrid.parallel.head_padding import Sizes, real_numel, rounded_up, split_of, summary
from tests.parallel import tiny
from tests.parallel.compare import STAGES, TOLERANCE, differences, measure
from tests.parallel.ranks import run_ranks
from tests.parallel.tiny import Layout

VOCABULARY = 189
ODD = {"ffn_hidden_size": 133}
GROUPED = {**ODD, "num_query_groups": 3, "linear_num_key_heads": 3}

LAYOUTS = [
    Layout(tp=2),
    Layout(tp=4),
    Layout(tp=4, sp=True),
    Layout(tp=5),
    Layout(tp=8, sp=True),
    Layout(tp=4, pp=2, pattern=STAGES),
    Layout(tp=4, dp=2, distributed_optimizer=True),
    Layout(tp=4, sp=True, cp=2),
]


def _odd(layout: Layout, sizes: dict[str, Any]) -> Layout:
    tiny.PADDED_VOCAB = VOCABULARY  # in this forked rank only
    return replace(layout, overrides=sizes)


def _reference(rank: int, folder: Path, options: HybridConfig | None, sizes: dict[str, Any]) -> dict[str, Any]:
    layout = _odd(Layout(), sizes)
    chunks = tiny.build(layout, options)
    tiny.unsettle(chunks)
    tiny.save_weights(chunks, folder)
    return measure(layout, chunks)


def _split(
    rank: int, layout: Layout, folder: Path, options: HybridConfig | None, sizes: dict[str, Any], broken: str = ""
) -> dict[str, Any]:
    layout = _odd(layout, sizes)
    if broken == "vocabulary padding takes part in the softmax":
        model.hide_padded_logits = lambda *args: None
    chunks = tiny.build(layout, options)
    tiny.load_weights(chunks, folder)
    for chunk in chunks:
        for module in chunk.modules():
            if broken == "q/k norm divides by the padded width" and isinstance(module, QKNorm):
                module.true_widths = tuple(w.numel() * layout.tp for w in (module.q_weight, module.k_weight))
        if broken == "padding is not zero":
            for part in _padding(chunk).values():
                part.data.normal_(std=0.1)
    return measure(layout, chunks)


def _padding(chunk: torch.nn.Module) -> dict[str, torch.Tensor]:
    """{parameter and part: its padding on this rank}, where there is any."""
    found = {}
    for name, param in chunk.named_parameters():
        split = split_of(param)
        for part, start, size, real in split.shares() if split else ():
            if real < size:
                found[f"{name}:{part.name}{start}"] = param.detach().narrow(split.dim, start + real, size - real)
    return found


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("weights") / "reference"


@pytest.fixture(scope="module")
def reference(weights: Path) -> dict[str, Any]:
    return run_ranks(_reference, 1, weights, None, ODD)[0]


def _worst(differences: dict[str, float]) -> str:
    worst = max(differences, key=lambda key: differences[key])
    return f"{worst}: {differences[worst]:.2e}"


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_same_as_one_rank(layout: Layout, reference: dict[str, Any], weights: Path) -> None:
    found = differences(reference, run_ranks(_split, layout.ranks, layout, weights, None, ODD))
    assert max(found.values()) <= TOLERANCE, _worst(found)


@pytest.mark.parametrize(
    ("options", "sizes"),
    [
        (HybridConfig(qk_norm_width="head"), ODD),
        (HybridConfig(qk_norm_width="none", norm_placement="pre", gdn_output_gate=False), ODD),
        (HybridConfig(), GROUPED),
    ],
    ids=["head_qk_norm", "pre-no_qk_norm-no_output_gate", "grouped_heads"],
)
def test_other_architectures_too(options: HybridConfig, sizes: dict[str, Any], tmp_path: Path) -> None:
    layout = Layout(tp=4)
    reference = run_ranks(_reference, 1, tmp_path / "weights", options, sizes)[0]
    found = differences(reference, run_ranks(_split, layout.ranks, layout, tmp_path / "weights", options, sizes))
    assert max(found.values()) <= TOLERANCE, _worst(found)


@pytest.mark.parametrize(
    "broken",
    [
        "vocabulary padding takes part in the softmax",
        "q/k norm divides by the padded width",
        "padding is not zero",
    ],
)
def test_without_the_remedy_it_differs(broken: str, reference: dict[str, Any], weights: Path) -> None:
    found = differences(reference, run_ranks(_split, 4, Layout(tp=4), weights, None, ODD, broken))
    assert max(found.values()) > 100 * TOLERANCE


def _count(rank: int, layout: Layout) -> tuple[int, int]:
    """Parameters that are split over ranks, and all, without padding."""
    chunk = tiny.build(_odd(layout, ODD))[0]
    split = sum(real_numel(param) for param in chunk.parameters() if split_of(param))
    return split, model.count_parameters([chunk])


def test_padding_is_not_counted() -> None:
    whole, on_four = run_ranks(_count, 1, Layout())[0], run_ranks(_count, 4, Layout(tp=4))
    assert sum(split for split, _ in on_four) == whole[0]
    assert {count - split for split, count in on_four} == {whole[1] - whole[0]}


def _train(rank: int, layout: Layout, zeroed: bool) -> dict[str, float]:
    layout = _odd(layout, ODD)
    if not zeroed:
        head_padding.Split.zero_padding_ = lambda self, tensor: None
    chunks = tiny.build(layout)
    trainer = tiny.Trainer(layout, chunks)
    for group in trainer.optimizer.param_groups:
        group["weight_decay"] = 0.1  # on every parameter, norms and decay rates too
    for _ in range(4):
        trainer.step()
    return {name: part.abs().max().item() for name, part in _padding(chunks[0]).items()}


@pytest.mark.parametrize("layout", [Layout(tp=4), Layout(tp=4, bf16=True, distributed_optimizer=True)], ids=str)
def test_padding_is_exactly_zero_after_training(layout: Layout) -> None:
    largest = run_ranks(_train, 4, layout, True)
    padded = {key for rank in largest for key in rank}
    for name in (
        *("in_proj.weight:query", "in_proj.weight:key", "in_proj.weight:value", "in_proj.weight:z"),
        *("ab_proj.weight:alpha", "ab_proj.weight:beta", "conv1d.weight:query", "A_log", "dt_bias", "out_proj.weight"),
        *("linear_qkv.weight", "linear_proj.weight", "q_weight", "k_weight", "linear_fc1.weight", "linear_fc2.weight"),
        *("embedding.word_embeddings.weight", "output_layer.weight"),
    ):
        assert any(name in key for key in padded), name
    assert not any(value for rank in largest for value in rank.values()), largest
    assert len(largest[3]) > len(largest[0])  # the padding is at the end


def test_padding_that_was_not_zeroed_does_not_become_zero() -> None:
    largest = run_ranks(_train, 4, Layout(tp=4), False)
    assert any(value for rank in largest for value in rank.values())


@pytest.mark.parametrize(
    ("size", "tp", "alignment", "expected"),
    [(30, 4, 1, 32), (30, 8, 1, 32), (30, 5, 1, 30), (11008, 3, 16, 11040), (100352, 8, 16, 100352), (133, 4, 16, 136)],
)
def test_rounding_keeps_alignment(size: int, tp: int, alignment: int, expected: int) -> None:
    assert rounded_up(size, tp, alignment) == expected


def test_summary_says_what_it_costs() -> None:
    sizes = Sizes(heads=30, groups=30, ffn=11008, gdn_key_heads=30, gdn_value_heads=30)
    said = "--tensor-model-parallel-size 4: padded with zeros: heads 30 to 32 (+6.7 %)"
    assert summary(sizes, 4, "GGG*", 100352) == said
    assert summary(sizes, 3, "GGG*", 100352) == (
        "--tensor-model-parallel-size 3: padded with zeros: FFN width 11008 to 11040 (+0.3 %), "
        "vocabulary 100352 to 100368 (+0.0 %)"
    )
    assert summary(sizes, 2, "GGG*", 100352) is None
    other = replace(sizes, heads=32, groups=8)
    assert "Gated DeltaNet heads 30 to 32 (+6.7 %)" in str(summary(other, 8, "GGG*", 100352))
