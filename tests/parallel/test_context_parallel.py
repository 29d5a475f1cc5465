"""Context parallelism in the whole model: every way of communicating, leaks, refusals. Layouts: test_matrix."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import parallel_state

from megatron_hybrid.config import HybridConfig
from megatron_hybrid.parallel.packed import pack
from tests.parallel import tiny
from tests.parallel.compare import assert_same, differences, split
from tests.parallel.ranks import run_ranks
from tests.parallel.tiny import Layout


@pytest.mark.parametrize("comm", ["all_gather", "scan", "a2a"])
@pytest.mark.parametrize("layout", [Layout(cp=2), Layout(cp=3, packed=True), Layout(tp=2, cp=3)], ids=str)
def test_every_way_of_communicating(
    comm: Any, layout: Layout, references: dict[bool, dict[str, Any]], weights: Path
) -> None:
    options = HybridConfig(gdn_cp_comm_type=comm)
    results = run_ranks(split, layout.ranks, layout, weights / str(layout.packed), options)
    assert_same(references[layout.packed], results)


def test_scan_over_eight_positions(references: dict[bool, dict[str, Any]], weights: Path) -> None:
    """Four ranks, three rounds of hops of 1, 2 and 4 positions."""
    results = run_ranks(split, 4, Layout(cp=4), weights / "False", HybridConfig(gdn_cp_comm_type="scan"))
    assert_same(references[False], results)


def test_all_to_all_refuses_heads_it_cannot_share(weights: Path) -> None:
    message = r"--gdn-cp-comm-type a2a: --context-parallel-size 4 does not divide the 6 .* legal: 1, 2, 3, 6"
    with pytest.raises(AssertionError, match=message):
        run_ranks(split, 4, Layout(cp=4), weights / "False", HybridConfig(gdn_cp_comm_type="a2a"))


def test_loss_multiplied_by_the_context_parallel_size_differs(
    references: dict[bool, dict[str, Any]], weights: Path
) -> None:
    broken = "loss multiplied by the context-parallel size"
    results = run_ranks(split, 2, Layout(cp=2), weights / "False", None, broken)
    assert differences(references[False], results)["gradient norm"] == pytest.approx(
        1.0, abs=1e-3
    )  # twice the right one


def _logits(rank: int, layout: Layout, folder: Path, changed: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's logits of a packed row and the documents of its tokens; `changed`: this token is another one."""
    chunks = tiny.build(layout)
    tiny.load_weights(chunks, folder)
    group = parallel_state.get_context_parallel_group()
    documents = pack(tiny.PACKED_LENGTHS, group.size(), group.rank())
    tokens = tiny.sample(0)["tokens"].reshape(1, -1)
    if changed is not None:
        tokens[0, changed] = (tokens[0, changed] + 1) % tiny.VOCAB
    local = tokens[:, documents.local_index()]
    with torch.no_grad():
        logits = chunks[0](local, torch.zeros_like(local), None, packed_seq_params=documents)
    return logits[0].clone(), torch.searchsorted(documents.cu_seqlens_q, documents.local_index(), right=True) - 1


@pytest.mark.parametrize("layout", [Layout(), Layout(cp=2), Layout(cp=4), Layout(tp=2, sp=True, cp=2)], ids=str)
def test_no_document_sees_another(layout: Layout, references: dict[bool, dict[str, Any]], weights: Path) -> None:
    """The last token of the second document is another one: no other document's logits move, by not one bit."""
    folder, document = weights / "True", 1
    last = sum(tiny.PACKED_LENGTHS[: document + 1]) - 1
    moved = 0
    before = run_ranks(_logits, layout.ranks, layout, folder, None)
    after = run_ranks(_logits, layout.ranks, layout, folder, last)
    for (old, documents), (new, _) in zip(before, after, strict=True):
        assert torch.equal(old[documents != document], new[documents != document])
        moved += int((old != new).any())
    assert moved > 0


def test_packed_documents_are_the_documents_alone(references: dict[bool, dict[str, Any]], weights: Path) -> None:
    def alone(rank: int) -> list[torch.Tensor]:
        chunks = tiny.build(Layout())
        tiny.load_weights(chunks, weights / "True")
        tokens = tiny.sample(0)["tokens"].reshape(1, -1)
        with torch.no_grad():
            return [
                chunks[0](part, torch.arange(part.shape[1])[None], None)[0]
                for part in tokens.split(list(tiny.PACKED_LENGTHS), dim=1)
                if part.numel()
            ]

    packed, _ = run_ranks(_logits, 1, Layout(), weights / "True", None)[0]
    torch.testing.assert_close(packed, torch.cat(run_ranks(alone, 1)[0]), rtol=0, atol=1e-5)


def _documents_longer_than_the_sequence(rank: int) -> None:
    chunks = tiny.build(Layout(cp=2))
    tokens = torch.zeros(1, 24, dtype=torch.int64)
    chunks[0](tokens, tokens, None, packed_seq_params=pack((64,), 2, rank))


def test_documents_longer_than_the_sequence_are_refused() -> None:
    with pytest.raises(AssertionError, match="packed documents of 64 tokens describe a sequence of 48"):
        run_ranks(_documents_longer_than_the_sequence, 2)
