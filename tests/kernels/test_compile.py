"""Every launch that training makes, compiled for the GPUs it is meant for: no GPU is needed to see that it does.

The interpreter runs code that the compiler refuses (a variable that changes its type in a loop, for one).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_hybrid.kernels import triton_autograd
from megatron_hybrid.kernels.configs import DEFAULTS, TABLE, Launch
from megatron_hybrid.kernels.inspection import Recorded, Resources, compile_for, recording, resources
from megatron_hybrid.kernels.triton_problem import Options, cut_finely
from megatron_hybrid.tools.tune_kernels.search import WIDE, decoding, mixer
from megatron_hybrid.tools.tune_kernels.traffic import needed_bytes

MODEL = (30, 30, 96, 192)  # Hk, H, K, V
T = 256
SHARED_BYTES = 232_448  #: what one block may use, on sm_90 and sm_100


def passing(M: Tensor, S: Tensor) -> Callable[[], Tensor]:
    return lambda: S.clone()


CASES: dict[str, dict[str, Any]] = {
    "dense": {},
    "in pieces": {"pieces": True},
    "in pieces, all kept": {"pieces": True, "keep": True},
    "packed": {"packed": True},
    "shared by ranks": {"packed": True, "halo": True, "pass_states": passing},
    "continued": {"halo": True, "initial": True, "final": True, "every": 4},
    "all states kept": {"every": 1},
    "all kept": {"packed": True, "keep": True},
}


def launches(
    packed: bool = False, halo: bool = False, initial: bool = False, final: bool = False, every: int = 0,
    pass_states: Any = None, keep: bool = False, pieces: bool = False, heads: tuple[int, int, int, int] = MODEL,
) -> list[Recorded]:  # fmt: skip
    """Those of one mixer core, forward and backward, in bf16."""
    Hk, H, K, V = heads
    D = 2 * Hk * K + H * V
    bf16 = {"dtype": torch.bfloat16, "requires_grad": True}
    bounds = torch.tensor([0, 100, T], dtype=torch.int32) if packed else None
    documents = 2 if packed else 1
    with recording(**TABLE["sm_90", "3.6", K, V]) as found, cut_finely() if pieces else nullcontext():
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


Built = tuple[Recorded, Resources]
#: (K, V, capability) -> what is compiled: with nothing kept, and for sm_90 with all kept; for the model in pieces too,
#: and packed. sm_100 takes as long and has no entries of its own.
_built: dict[tuple[int, int, int], list[Built]] = {}


def built(K: int, V: int, capability: int) -> list[Built]:
    """Every variant once, for all tests here."""
    if (K, V, capability) not in _built:
        if MODEL[2:] == (K, V):
            cases = ("dense", "in pieces", "in pieces, all kept", "all kept") if capability == 90 else ("in pieces",)
            found = [launch for case in cases for launch in launches(**CASES[case])]
        else:
            policies = (False, True) if capability == 90 else (False,)
            found = [launch for keep in policies for launch in launches(heads=(4, 4, K, V), keep=keep)]
        with recording(**TABLE["sm_90", "3.6", K, V]) as decoded:
            decoding(4, K, V, 2, "cpu")()
        kinds = {variant(launch): launch for launch in [*found, *decoded]}
        _built[K, V, capability] = [(x, resources(compile_for(x, capability))) for x in kinds.values()]
    return _built[K, V, capability]


#: Instructions that spill, loads and stores of local memory, by (K, V, capability): the most of any variant. Where
#: sm_90 spills at the model's head sizes, launches without spills are slower. sm_100 has no entries of its own: these
#: are sm_90's, compiled for it and not run there.
SPILLS: dict[tuple[int, int, int], dict[str, int]] = {
    (96, 192, 90): {"prepare": 2, "scan": 15, "norm_backward": 22, "query_gradient": 28, "key_gradient": 6},
    (128, 128, 90): {"scan": 14, "adjoint_scan": 20, "query_gradient": 4, "key_gradient": 43},
    (128, 256, 90): {"scan": 14, "adjoint_scan": 20, "key_gradient": 40, "decode": 167},
    (256, 256, 90): {"scan": 201, "adjoint_scan": 152, "query_gradient": 3, "key_gradient": 38, "decode": 2795},
    (64, 64, 100): {"adjoint_scan": 123},
    (96, 192, 100): {
        "prepare": 91,
        "scan": 26,
        "norm_backward": 26,
        "adjoint_scan": 288,
        "query_gradient": 72,
        "inverse_gradient": 20,
        "key_gradient": 36,
    },
    (128, 128, 100): {"scan": 88, "adjoint_scan": 427},
    (128, 256, 100): {"scan": 94, "adjoint_scan": 432, "decode": 123},
    (256, 256, 100): {"scan": 779, "adjoint_scan": 1474, "key_gradient": 13, "decode": 2788},
}
ENTRIES = sorted((K, V) for _, _, K, V in TABLE)
MATRIX = ("prepare", "scan", "adjoint_scan", "query_gradient", "inverse_gradient", "key_gradient")


def test_every_case_of_the_model_compiles_for_hopper() -> None:
    for launch in {variant(launch): launch for case in CASES.values() for launch in launches(**case)}.values():
        used = resources(compile_for(launch, 90))
        assert used.shared_bytes <= SHARED_BYTES and not used.strange, (variant(launch), used)


@pytest.mark.parametrize(("capability", "unit"), [(90, "HGMMA"), (100, "UTCHMMA")], ids=["sm_90", "sm_100"])
@pytest.mark.parametrize("sizes", ENTRIES, ids=str)
def test_every_entry(sizes: tuple[int, int], capability: int, unit: str) -> None:
    """Compiles, fits, reads its own shared memory, runs its products on the warpgroup's matrix unit, and spills no more
    than is known."""
    spills: dict[str, int] = {}
    for launch, used in built(*sizes, capability):
        assert used.shared_bytes <= SHARED_BYTES, variant(launch)
        assert not used.strange, (variant(launch), used.strange)
        spills[launch.name] = max(spills.get(launch.name, 0), used.spill_bytes)
        if launch.name in MATRIX:
            assert all(name.startswith(unit) for name in used.instructions), (variant(launch), used.instructions)
    assert {name: n for name, n in spills.items() if n} == SPILLS.get((*sizes, capability), {})


@pytest.mark.parametrize("sizes", [(16, 16), (96, 192)], ids=str)
def test_wrong_code_is_found(sizes: tuple[int, int]) -> None:
    """Launches that ended in an illegal access on an H200: ptxas 12.8.93 compiles them wrongly."""
    with recording(query_gradient=Launch(4, 1, 64)) as found:
        mixer(30, *sizes, 128, "cpu")()
    launch = next(launch for launch in found if launch.name == "query_gradient")
    assert resources(compile_for(launch, 90)).strange


def test_no_padding_of_the_models_key_dim() -> None:
    """K = 96 as 64 + 32, nothing as 128."""
    for launch, used in built(*MODEL[2:], 90):
        if launch.name in MATRIX:
            widths = [int(name.split(".")[1].split("x")[1]) for name in used.instructions]
            assert max(widths, default=0) <= 64, (launch.name, used.instructions)


def test_bytes_per_token() -> None:
    """As counted by hand for each head: what is read once and what is written once, bf16 unless said."""
    K, V, C, fp32 = 96, 192, 64, 2
    inverse, scores, factors = C, C, 2 * 2 * fp32
    by_hand = {
        "conv": 2 * (2 * K + V) + 2 * fp32,  # and 1 / norms
        "scan": 2 * K + V + inverse + scores + factors + V,
        "norm": 3 * V,
        "norm_backward": 5 * V + V * fp32 / C,
        "adjoint_scan": 2 * K + V + inverse + scores + factors + K * V / C + V,
    }
    counted = []
    for tokens in (C, 2 * C):
        with recording(**TABLE["sm_90", "3.6", K, V]) as found:
            mixer(MODEL[1], K, V, tokens, "cpu")()  # heads as in other tests here: compiled once
        counted.append([(x, needed_bytes(x, compile_for(x, 90))) for x in found[:10] if x.name in by_hand])
    seen = set()
    for (launch, less), (_, more) in zip(*counted, strict=True):
        if launch.name not in seen:  # the second scan and convolution are those of the backward
            seen.add(launch.name)
            assert (more - less) / C == pytest.approx(2 * MODEL[1] * by_hand[launch.name], rel=0.01), launch.name
    assert seen == by_hand.keys()


@pytest.mark.parametrize("size", [16, 240])
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
