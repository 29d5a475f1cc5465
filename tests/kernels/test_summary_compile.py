"""The launches of a summary's backward, K + V columns with the entry of (K, V), compiled for a GPU that is not here."""

from __future__ import annotations

import pytest
import torch

from megatron_hybrid.kernels.configs import TABLE
from megatron_hybrid.kernels.inspection import compile_for, recording, resources
from megatron_hybrid.kernels.triton_autograd import Summary
from megatron_hybrid.kernels.triton_problem import Options

SHARED_BYTES = 232_448  #: what one block may use on sm_90
#: Loads and stores of spilled registers on sm_90, at most.
SPILLS = {
    (96, 192): {"prepare": 20, "query_gradient": 24},
    (128, 256): {"adjoint_scan": 34, "key_gradient": 49},
}


@pytest.mark.parametrize("sizes", SPILLS, ids=str)
def test_backward_compiles_for_hopper(sizes: tuple[int, int]) -> None:
    (K, V), H, T = sizes, 4, 256
    bf16 = {"dtype": torch.bfloat16, "requires_grad": True}
    per_head = [torch.zeros(H, requires_grad=True) for _ in range(2)]
    with recording(**TABLE["sm_90", "3.6", K, V]) as found:
        k, v, a, b = (torch.zeros(1, T, H, *dim, **bf16) for dim in ((K,), (V,), (), ()))
        both = Summary.apply(k, v, a, b, *per_head, Options(1.0), None)
        found.clear()
        both.sum().backward()
    used = {launch.name: resources(compile_for(launch, 90)) for launch in found}
    assert used.keys() > {"scan", "adjoint_scan", "query_gradient"}
    assert all(x.shared_bytes <= SHARED_BYTES and not x.strange for x in used.values()), used
    assert {name: x.spill_bytes for name, x in used.items() if x.spill_bytes} == SPILLS[sizes]
