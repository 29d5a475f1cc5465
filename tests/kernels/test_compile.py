"""Every launch that training makes, compiled for the GPUs it is meant for: no GPU is needed to see that it does.

The interpreter runs code that the compiler refuses (a variable that changes its type in a loop, for one).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_hybrid.kernels import triton_autograd
from megatron_hybrid.kernels.configs import DEFAULTS, TABLE
from megatron_hybrid.kernels.inspection import Recorded, compile_for, recording, resources
from megatron_hybrid.kernels.triton_launch import Options
from megatron_hybrid.tools.tune_kernels.search import WIDE, mixer

MODEL = (30, 30, 96, 192)  # Hk, H, K, V
T = 256
SHARED_BYTES = 232_448  #: what one block may use, on sm_90 and sm_100


def passing(M: Tensor, S: Tensor) -> Callable[[], Tensor]:
    return lambda: S.clone()


CASES: dict[str, dict[str, Any]] = {
    "dense": {},
    "packed": {"packed": True},
    "shared by ranks": {"packed": True, "halo": True, "pass_states": passing},
    "continued": {"halo": True, "initial": True, "final": True, "every": 4},
    "all states kept": {"every": 1},
    "all kept": {"packed": True, "keep": True},
}


def launches(
    packed: bool = False, halo: bool = False, initial: bool = False, final: bool = False, every: int = 0,
    pass_states: Any = None, keep: bool = False, heads: tuple[int, int, int, int] = MODEL,
) -> list[Recorded]:  # fmt: skip
    """Those of one mixer core, forward and backward, in bf16."""
    Hk, H, K, V = heads
    D = 2 * Hk * K + H * V
    bf16 = {"dtype": torch.bfloat16, "requires_grad": True}
    bounds = torch.tensor([0, 100, T], dtype=torch.int32) if packed else None
    documents = 2 if packed else 1
    with recording(**TABLE["sm_90", "3.6", K, V]) as found:
        y, last = triton_autograd.MixerCore.apply(
            torch.zeros(1, T, D + H * V, **bf16), torch.zeros(1, T, 2 * H, **bf16), torch.zeros(D, 4, **bf16),
            torch.zeros(H, requires_grad=True), torch.zeros(H, requires_grad=True), torch.zeros(V, **bf16),
            torch.zeros(documents, D, 3, **bf16) if halo else None,
            torch.zeros(documents, H, K, V, requires_grad=True) if initial else None,
            heads, Options(K**-0.5, states_every=every, keep_intermediates=keep), bounds, final, pass_states,
        )  # fmt: skip
        torch.autograd.backward([y, last] if final else [y], [torch.zeros_like(y), *([last.detach()] if final else [])])
    return found


def variant(launch: Recorded) -> tuple[Any, ...]:
    """What decides which code is compiled."""
    constants = (p.name for p in launch.function.params if p.is_constexpr)
    return (launch.name, *((name, launch.arguments[name]) for name in constants), *launch.options.items())


@cache
def variants() -> dict[tuple[Any, ...], Recorded]:
    return {variant(launch): launch for case in CASES.values() for launch in launches(**case)}


#: Instructions that spill, loads and stores of local memory. On sm_90, at the model's head sizes: the scan that keeps
#: everything, and the gradient of k in three stages, which is faster than in one without spills.
SPILLS = {
    ("scan", 90): 6, ("key_gradient", 90): 9,
    ("prepare", 100): 91, ("scan", 100): 39, ("adjoint_scan", 100): 288, ("inverse_gradient", 100): 18,
}  # fmt: skip
SPILLS_OF_OTHERS = {
    (128, 128): {"scan": 14, "adjoint_scan": 20, "query_gradient": 4, "key_gradient": 43},
    (128, 256): {"scan": 14, "adjoint_scan": 20, "key_gradient": 40},
}


def test_every_launch_compiles_for_hopper() -> None:
    for launch in variants().values():
        compiled = compile_for(launch, 90)
        assert compiled.metadata.shared <= SHARED_BYTES, variant(launch)


@pytest.mark.parametrize(("capability", "unit"), [(90, "HGMMA"), (100, "UTCHMMA")], ids=["sm_90", "sm_100"])
def test_matrix_units_and_registers(capability: int, unit: str) -> None:
    """Products run on the warpgroup's matrix unit, K = 96 as 64 + 32 and nothing as 128; next to nothing spills."""
    for launch in {variant(launch): launch for launch in launches()}.values():
        used = resources(compile_for(launch, capability))
        assert used.shared_bytes <= SHARED_BYTES
        assert used.spill_bytes <= SPILLS.get((launch.name, capability), 0), (launch.name, used)
        if launch.name in ("prepare", "scan", "adjoint_scan", "query_gradient", "inverse_gradient", "key_gradient"):
            assert all(name.startswith(unit) for name in used.instructions), (launch.name, used.instructions)
            widths = [int(name.split(".")[1].split("x")[1]) for name in used.instructions if capability == 90]
            assert max(widths, default=0) <= 64, (launch.name, used.instructions)


@pytest.mark.parametrize("sizes", sorted({(K, V) for _, _, K, V in TABLE} - {MODEL[2:]}), ids=str)
def test_entries_of_other_head_sizes(sizes: tuple[int, int]) -> None:
    spills = {}
    for keep in (False, True):
        for launch in launches(heads=(4, 4, *sizes), keep=keep):
            used = resources(compile_for(launch, 90))
            assert used.shared_bytes <= SHARED_BYTES, (launch.name, used)
            spills[launch.name] = max(spills.get(launch.name, 0), used.spill_bytes)
    assert {name: n for name, n in spills.items() if n} == SPILLS_OF_OTHERS.get(sizes, {})


@pytest.mark.parametrize("size", [16, 256])
def test_sizes_without_an_entry_have_launches_to_try(size: int) -> None:
    """That fit, without spills by the hundred: where tune_kernels begins, or for wide heads its first candidates."""
    entry = DEFAULTS | ({kernel: launches[0] for kernel, launches in WIDE.items()} if size > 128 else {})
    with recording(**entry) as found:
        mixer(2, size, size, 128, "cpu")()
    problems = []
    for launch in {variant(launch): launch for launch in found}.values():
        used = resources(compile_for(launch, 90))
        if used.shared_bytes > SHARED_BYTES or used.spill_bytes > 150:
            problems.append((launch.name, launch.options, used.shared_bytes, used.spill_bytes))
    assert not problems
