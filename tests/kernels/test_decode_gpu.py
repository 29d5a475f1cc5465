"""The one-token kernel on a GPU in bf16, against the reference over the whole sequence in fp64."""

from __future__ import annotations

import pytest
import torch

from megatron_hybrid.kernels.configs import TABLE, current_key, trial
from tests.kernels.decoding import Sequence, check

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

#: y is rounded to bf16, 0.0017 RMS; the state is fp32 throughout: one rounded to bf16 would be off by as much.
Y_BOUND, STATE_BOUND = 0.005, 1e-4


@pytest.mark.parametrize("gate", [True, False], ids=["gate", "no gate"])
@pytest.mark.parametrize(
    "shape",
    [(4, 4, 96, 192), (2, 6, 96, 192), (4, 4, 128, 256), (4, 4, 128, 128), (1, 2, 64, 64)],
    ids=["96-192", "96-192-grouped", "128-256", "128-128", "64-64-grouped"],
)
def test_70_tokens(shape: tuple[int, int, int, int], gate: bool) -> None:
    with trial(**TABLE.get((*current_key(), *shape[2:]), {})):
        check(Sequence(3, 70, shape, gate, torch.bfloat16, "cuda"), Y_BOUND, STATE_BOUND)


def test_beta_up_to_one() -> None:
    shape = (4, 4, 96, 192)
    with trial(**TABLE.get((*current_key(), *shape[2:]), {})):
        check(Sequence(1, 70, shape, True, torch.bfloat16, "cuda"), Y_BOUND, STATE_BOUND, allow_neg_eigval=False)
