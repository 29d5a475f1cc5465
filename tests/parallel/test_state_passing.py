"""State passing by itself, in fp64: any cut of any documents gives the outputs and gradients of the whole."""

from __future__ import annotations

import os
import weakref
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_hybrid.kernels.gated_delta import mixer_core
from megatron_hybrid.parallel import state_passing
from megatron_hybrid.parallel.routes import Layout, Routes, build_routes, segments_of
from megatron_hybrid.parallel.state_passing import Exchange, choose_exchange
from tests.parallel.ranks import run_ranks

Sizes = tuple[int, int, int, int]  # Hk, H, K, V

#: Grouped value heads, K ≠ V, for the reference nothing a power of two; and the dtype that each backend runs in here.
BACKENDS: dict[str, tuple[Sizes, torch.dtype]] = {
    "reference": ((3, 6, 5, 7), torch.float64),
    "triton": ((1, 2, 16, 32), torch.float32),
}

#: Documents cut at any token: longer than a rank, of length 1, 2, 3, empty, ending on a border, inside a halo.
CONTIGUOUS = {
    "one": (120,),
    "long_and_short": (50, 1, 2, 3, 0, 4, 59, 1),
    "ends_on_borders": (30, 30, 0, 60),
    "one_token_after_a_border": (31, 1, 1, 87),
    "one_token_before_a_border": (29, 1, 1, 89),
    "all_of_one_token": (1,) * 12,
    "fewer_tokens_on_a_rank_than_a_halo": (8,),
}
ZIGZAG = {
    "one": (96,),
    "parts_of_one_token": (8, 8, 0, 16),
    "unequal": (64, 8, 0, 24, 200),
    "empty_last": (16, 0),
}


def _inputs(tokens: int, sizes: Sizes) -> dict[str, torch.Tensor]:
    HK, H, K, V = sizes
    generator = torch.Generator().manual_seed(tokens)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return {
        "x": normal(tokens, 2 * HK * K + H * V),
        "a": normal(tokens, H),
        "b": normal(tokens, H),
        "conv": 0.5 * normal(2 * HK * K + H * V, 4),
        "A_log": normal(H),
        "dt_bias": normal(H),
        "norm": 1 + 0.1 * normal(V),
        "dy": normal(tokens, H * V),
    }


def _mix(
    t: dict[str, torch.Tensor],
    sizes: Sizes,
    bounds: torch.Tensor,
    routes: Routes | None = None,
    exchange: Exchange = "auto",
    backend: str = "reference",
    keep: bool = False,
) -> torch.Tensor:
    group = dist.group.WORLD
    assert group is not None
    y, _ = mixer_core(
        t["x"][None],
        torch.cat([t["a"], t["b"]], dim=-1)[None],
        t["conv"],
        t["A_log"],
        t["dt_bias"],
        t["norm"],
        **dict(zip(("num_key_heads", "num_value_heads", "key_dim", "value_dim"), sizes, strict=True)),
        cu_seqlens=bounds,
        conv_halo=state_passing.conv_halo(t["x"], routes, group) if routes else None,
        pass_states=state_passing.passing(routes, group, exchange) if routes else None,
        keep_intermediates=keep,
        backend=backend,
    )
    return y[0]


def _gradients(t: dict[str, torch.Tensor], y: torch.Tensor) -> dict[str, torch.Tensor]:
    names = [name for name in t if name != "dy"]
    return dict(zip(names, torch.autograd.grad(y, [t[name] for name in names], t["dy"]), strict=True))


def _worst(
    rank: int, lengths: tuple[int, ...], world: int, layout: Layout, exchange: Exchange, backend: str = "reference",
    keep: bool = False,
) -> dict[str, float]:  # fmt: skip
    """This rank's tokens alone, by `backend`, against the whole in fp64: outputs and every gradient.

    Largest differences in fp64; in fp32 RMS of the difference over RMS of the tensor, as in test_triton_interpreter.
    """
    sizes, dtype = BACKENDS[backend]
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
    whole = {name: x.requires_grad_(name != "dy") for name, x in _inputs(sum(lengths), sizes).items()}
    y_whole = _mix(whole, sizes, bounds)
    expected = _gradients(whole, y_whole)

    routes = build_routes(lengths, world, rank, layout)
    mine = bounds[routes.documents[rank]] + routes.positions[rank]
    per_token = ("x", "a", "b", "dy")
    local = {
        name: (x.detach()[mine] if name in per_token else x.detach()).to(dtype, copy=True).requires_grad_(name != "dy")
        for name, x in whole.items()
    }
    y = _mix(local, sizes, routes.cu_segments, routes, exchange, backend, keep)
    found = _gradients(local, y)
    for name in ("conv", "A_log", "dt_bias", "norm"):  # weights: each rank's part of a sum
        dist.all_reduce(found[name])

    def difference(x: torch.Tensor, expected: torch.Tensor, here: torch.Tensor) -> float:
        if dtype == torch.float64:
            return (x - here).abs().max().item()
        return ((x - here).square().mean().sqrt() / expected.square().mean().sqrt()).item()

    worst = {name: difference(found[name], g, g[mine] if name in per_token else g) for name, g in expected.items()}
    return {"y": difference(y, y_whole, y_whole[mine]), **worst}


CASES = [
    *(("contiguous", name, lengths) for name, lengths in CONTIGUOUS.items()),
    *(("zigzag", name, lengths) for name, lengths in ZIGZAG.items()),
]


@pytest.mark.parametrize("exchange", ["all_gather", "scan"])
@pytest.mark.parametrize(
    ("layout", "name", "lengths"), CASES, ids=lambda value: value if isinstance(value, str) else ""
)
def test_any_cut_gives_the_whole(layout: Any, name: str, lengths: tuple[int, ...], exchange: Any) -> None:
    for worst in run_ranks(_worst, 4, lengths, 4, layout, exchange):
        assert max(worst.values()) < 1e-11, worst


interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1",
    reason="needs TRITON_INTERPRET=1 from the start, since triton reads it on import; tests/run.sh runs them so",
)


@interpreted
@pytest.mark.parametrize(
    ("layout", "lengths", "exchange", "keep"),
    [
        ("contiguous", (31, 1, 1, 0, 147), "scan", False),
        ("contiguous", (31, 1, 1, 0, 147), "scan", True),
        ("zigzag", (160, 4, 0, 8), "all_gather", False),
    ],
    ids=["contiguous-scan", "contiguous-scan-keep", "zigzag-all_gather"],
)
def test_triton_kernels_pass_states(layout: Any, lengths: tuple[int, ...], exchange: Any, keep: bool) -> None:
    """One kernel run forward and one back per rank, no gradient through the summaries: still the whole's gradients."""
    for worst in run_ranks(_worst, 2, lengths, 2, layout, exchange, "triton", keep):
        sums = max(worst.pop("A_log"), worst.pop("dt_bias"))  # over all tokens, which cancel
        assert max(worst.values()) < 3e-6 and sums < 2e-5, (worst, sums)


def _again(rank: int, lengths: tuple[int, ...], exchange: Exchange, keep: bool) -> dict[str, Any]:
    """Gradients of one graph run backward three times; whether the states that came in outlive each run."""
    sizes, dtype = BACKENDS["triton"]
    routes = build_routes(lengths, 2, rank, "contiguous")
    mine = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])[routes.documents[rank]] + routes.positions[rank]
    local = {
        name: (x[mine] if name in ("x", "a", "b", "dy") else x).to(dtype).requires_grad_(name != "dy")
        for name, x in _inputs(sum(lengths), sizes).items()
    }
    came_in = []
    start = state_passing.incoming_states

    def watched(*args: Any) -> torch.Tensor:
        states = start(*args)
        came_in.append(weakref.ref(states))
        return states

    state_passing.incoming_states = watched
    y = _mix(local, sizes, routes.cu_segments, routes, exchange, "triton", keep)
    leaves = [x for name, x in local.items() if name != "dy"]
    found, alive = [], []
    for retain_graph in (True, True, False):
        found.append(torch.autograd.grad(y, leaves, local["dy"], retain_graph=retain_graph))
        alive.append([states() is not None for states in came_in])
    return {"gradients": found, "alive": alive}


@interpreted
@pytest.mark.parametrize(("exchange", "keep"), [("scan", False), ("all_gather", True)])
def test_triton_graph_runs_backward_again(exchange: Any, keep: bool) -> None:
    """With retain_graph: the same bits. Without it what the states came through is let go with all else."""
    for result in run_ranks(_again, 2, (40,), exchange, keep):
        first, *others = result["gradients"]
        assert all(torch.equal(x, y) for other in others for x, y in zip(first, other, strict=True))
        assert result["alive"] == [[True], [True], [False]]


@pytest.mark.parametrize("world", [2, 3, 5])
def test_any_number_of_ranks(world: int) -> None:
    for exchange in ("all_gather", "scan"):
        for layout, lengths in (("contiguous", (7 * world, 1, 2, 3 * world - 3)), ("zigzag", (10 * world, 2 * world))):
            for worst in run_ranks(_worst, world, lengths, world, layout, exchange):
                assert max(worst.values()) < 1e-11, worst


def _forget_the_halo(rank: int, lengths: tuple[int, ...], layout: Layout) -> dict[str, float]:
    right = state_passing.conv_halo
    state_passing.conv_halo = lambda *args: torch.zeros_like(right(*args))
    return _worst(rank, lengths, 4, layout, "all_gather")


def _carry_over_documents(rank: int, lengths: tuple[int, ...], layout: Layout) -> dict[str, float]:
    build = state_passing.incoming_states

    def leaking(M: torch.Tensor, S: torch.Tensor, routes: Routes, *rest: Any) -> torch.Tensor:
        object.__setattr__(routes, "carries", torch.ones_like(routes.carries))
        return build(M, S, routes, *rest)

    state_passing.incoming_states = leaking
    return _worst(rank, lengths, 4, layout, "all_gather")


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_without_the_halo_it_differs(layout: Any) -> None:
    found = run_ranks(_forget_the_halo, 4, (96,), layout)
    assert max(worst["y"] for worst in found) > 1e-3


def test_a_state_carried_over_a_document_border_shows() -> None:
    found = run_ranks(_carry_over_documents, 4, (50, 40, 30), "contiguous")
    assert max(worst["y"] for worst in found) > 1e-3


@pytest.mark.parametrize(
    ("lengths", "layout", "said"),
    [
        (
            (64, 20),
            "zigzag",
            "document 1 of 20 tokens: .*-size 4 needs a multiple of 8; pad it to 24",
        ),
        ((10, 20), "contiguous", "30 tokens: --context-parallel-size 4 must divide them; pad to 32"),
    ],
)
def test_what_a_layout_cannot_hold_is_refused(lengths: tuple[int, ...], layout: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        segments_of(lengths, 4, 0, layout)


def test_exchange_is_chosen_by_the_documented_formula() -> None:
    """Little data: one round. Much data: fewer bytes."""
    routes = build_routes((160,), 8, 0)
    assert choose_exchange(routes, pair_bytes=1_000) == "all_gather"
    assert choose_exchange(routes, pair_bytes=100_000_000) == "scan"
    # The 7B, one document on 8 ranks: 30·96·(96+192)·4 bytes.
    assert choose_exchange(routes, pair_bytes=30 * 96 * 288 * 4) == "scan"
