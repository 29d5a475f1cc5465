"""Every combination of tensor, sequence, context and pipeline parallelism up to eight ranks, dense and packed.

Six heads, so that four tensor-parallel ranks never divide them: loss, gradient norm and every gradient as on one rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from tests.parallel import tiny
from tests.parallel.compare import STAGES, assert_same, split
from tests.parallel.ranks import run_ranks
from tests.parallel.tiny import Layout


def _layouts(most_ranks: int = 8) -> Iterator[Layout]:
    for packed, pp, cp, tp, sp in product((False, True), (1, 2), (1, 2, 4), (1, 2, 4), (False, True)):
        layout = Layout(tp=tp, sp=sp, cp=cp, pp=pp, packed=packed, pattern=STAGES if pp > 1 else tiny.PATTERN)
        if 1 < layout.ranks <= most_ranks and (tp > 1 or not sp):
            yield layout


@pytest.mark.parametrize("layout", _layouts(), ids=str)
def test_same_as_one_rank(layout: Layout, references: dict[bool, dict[str, Any]], weights: Path) -> None:
    results = run_ranks(split, layout.ranks, layout, weights / str(layout.packed))
    assert_same(references[layout.packed], results)
