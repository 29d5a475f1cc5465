"""--overlap-param-gather: what reads a parameter without calling its module waits for the gather too.

With one parameter in each bucket nothing else waits on its behalf: not for the output layer's weight, which a loss in
chunks reads, nor for a convolution's or an output norm's.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron_hybrid.tools.plot_run import read_series
from tests.parallel.ranks import run_ranks
from tests.test_pretrain import _arguments, _train, data

__all__ = ["data"]  # the fixture

_SPLIT = ["--use-distributed-optimizer", "--overlap-grad-reduce", "--ddp-bucket-size", "1"]


@pytest.mark.parametrize("chunks", [[], ["--loss-chunk-tokens", "25"]], ids=["whole_logits", "loss_in_chunks"])
def test_overlapped_gathers_change_no_bit(chunks: list[str], data: Path, tmp_path: Path) -> None:
    for name, overlap in (("apart", []), ("overlapped", ["--overlap-param-gather"])):
        run_ranks(_train, 2, _arguments(data, tmp_path / name, *_SPLIT, "--train-iters", "4", *chunks, *overlap))
    expected, found = (read_series(tmp_path / name / "tensorboard") for name in ("apart", "overlapped"))
    for tag in ("lm loss", "grad-norm"):
        assert list(expected[tag].steps) == [1, 2, 3, 4] == list(found[tag].steps)
        np.testing.assert_array_equal(found[tag].values, expected[tag].values, err_msg=tag)
