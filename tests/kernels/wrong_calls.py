"""Calls of gated_delta.py's four functions, each with one argument wrong, and what the error must say of it.

Before they were checked, some of these read or wrote memory beyond a tensor, or gave numbers without an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_hybrid.kernels import gated_delta

HK, H, K, V, W, T = 2, 4, 16, 32, 4, 6
D = 2 * HK * K + H * V
Change = Callable[[dict[str, Any]], dict[str, Any]]


def rand(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))


def legal(function: str) -> dict[str, Any]:
    """Arguments of two documents in one packed row (`decode_step`: of two rows)."""
    gates = {"A_log": rand(H), "dt_bias": rand(H)}
    packed = {"cu_seqlens": torch.tensor([0, 2, T])}
    weights = {"conv_weight": rand(D, W), **gates, "norm_weight": rand(V)}
    delta = {"k": rand(1, T, HK, K), "v": rand(1, T, H, V), "a": rand(1, T, H), "b": rand(1, T, H)} | gates | packed
    if function == "gated_delta_rule":
        return {"q": rand(1, T, HK, K), "initial_state": rand(2, H, K, V)} | delta
    if function == "shard_summary":
        return delta
    if function == "mixer_core":
        sizes = {"num_key_heads": HK, "num_value_heads": H, "key_dim": K, "value_dim": V}
        states = {"conv_halo": rand(2, D, W - 1), "initial_state": rand(2, H, K, V)}
        return {"qkvz": rand(1, T, D + H * V), "ab": rand(1, T, 2 * H)} | weights | sizes | states | packed
    states = {"conv_state": rand(2, D, W - 1), "state": rand(2, H, K, V)}
    return {"qkvz": rand(2, D + H * V), "ab": rand(2, 2 * H)} | weights | states | {"num_key_heads": HK}


def call(function: str, arguments: dict[str, Any], backend: str) -> Any:
    return getattr(gated_delta, function)(**arguments, backend=backend)


def changed(name: str, change: Callable[[Tensor], Tensor]) -> Change:
    return lambda given: given | {name: change(given[name])}


def fewer(dim: int) -> Callable[[Tensor], Tensor]:
    return lambda x: x.narrow(dim, 0, x.shape[dim] - 1)


#: By function and argument: dimensions that are compared with another argument's, or with the sizes given.
DIMENSIONS = {
    "gated_delta_rule": {
        "k": (1, 2, 3), "v": (1,), "a": (1, 2), "b": (1, 2), "A_log": (0,), "dt_bias": (0,),
        "initial_state": (0, 1, 2, 3),
    },
    "shard_summary": {"v": (1,), "a": (1, 2), "b": (1, 2), "A_log": (0,), "dt_bias": (0,)},
    "mixer_core": {
        "qkvz": (2,), "ab": (1, 2), "conv_weight": (0,), "A_log": (0,), "dt_bias": (0,), "norm_weight": (0,),
        "conv_halo": (0, 1, 2), "initial_state": (0, 1, 2, 3),
    },
    "decode_step": {
        "qkvz": (0, 1), "ab": (0, 1), "conv_weight": (0,), "A_log": (0,), "dt_bias": (0,), "norm_weight": (0,),
        "conv_state": (0, 1, 2),
    },
}  # fmt: skip


def heads(value: int, key: int = HK) -> Change:
    """Every tensor of the delta rule with other numbers of heads."""
    dims = {"v": 2, "a": 2, "b": 2, "A_log": 0, "dt_bias": 0, "initial_state": 1}

    def change(given: dict[str, Any]) -> dict[str, Any]:
        fewer_values = {name: given[name].narrow(dim, 0, value) for name, dim in dims.items() if name in given}
        return given | fewer_values | {name: given[name][:, :, :key] for name in ("q", "k") if name in given}

    return change


def mixer_heads(value: int, key: int) -> dict[str, Any]:
    channels = 2 * key * K + value * V
    return {
        "num_value_heads": value, "num_key_heads": key, "qkvz": rand(1, T, channels + value * V),
        "ab": rand(1, T, 2 * value), "conv_weight": rand(channels, W), "A_log": rand(value), "dt_bias": rand(value),
        "initial_state": rand(2, value, K, V), "conv_halo": rand(2, channels, W - 1),
    }  # fmt: skip


def twice(given: dict[str, Any]) -> dict[str, Any]:
    """Two rows of everything that has rows."""
    rows = ("q", "k", "v", "a", "b", "qkvz", "ab")
    return {name: torch.cat([x, x]) if name in rows else x for name, x in given.items()}


def with_arguments(**others: Any) -> Change:
    return lambda given: given | others


Case = tuple[str, str, Change, str]  # function, what is wrong, change, what the error says


def _any_tensor(function: str) -> Iterator[Case]:
    first = "state" if function == "decode_step" else next(iter(legal(function)))
    for name, x in legal(function).items():
        if not isinstance(x, Tensor):
            continue
        elsewhere = (
            rf"^\w+ is on cpu; it must be on meta, where {first} is" if name == first else f"^{name} is on meta; "
        )
        yield function, f"{name} without dimensions", changed(name, lambda x: x.flatten()[0]), f"^{name} is "
        yield function, f"{name} on another device", changed(name, lambda x: x.to("meta")), elsewhere
        if x.is_floating_point():
            said = f"^{name} is torch.int32; it must be a floating point dtype"
            yield function, f"{name} of integers", changed(name, lambda x: x.int()), said


def _delta(function: str) -> Iterator[Case]:
    said = "^the number of heads of v is 3; it must be a multiple of the number of heads of k, 2"
    yield function, "three value heads on two", heads(3), said
    yield function, "no key heads", heads(4, 0), "^the number of heads of k is 0; it must be at least 1"
    for name in ("v", "b"):
        said = f"^{name} is torch.bfloat16; it must be torch.float32, the dtype of "
        yield function, f"{name} in bf16", changed(name, lambda x: x.bfloat16()), said


def _mixer() -> Iterator[Case]:
    said = "^num_value_heads is 3; it must be a multiple of num_key_heads, 2"
    yield "mixer_core", "three value heads on two", with_arguments(**mixer_heads(3, 2)), said
    said = "^num_key_heads is 0; it must be at least 1"
    yield "mixer_core", "no key heads", with_arguments(**mixer_heads(4, 0)), said
    yield "mixer_core", "another number of key heads", with_arguments(num_key_heads=3), "^qkvz is .* 224 or 352"
    yield "mixer_core", "another key dim", with_arguments(key_dim=32), "^qkvz is .* 256 or 384"


def _taps(function: str) -> Iterator[Case]:
    history = "conv_halo" if function == "mixer_core" else "conv_state"
    five = with_arguments(conv_weight=rand(D, 5), **{history: rand(2, D, 4)})
    yield function, "five taps", five, "^conv_weight is .* 1 or 2 or 3 or 4"
    yield function, "two inputs a channel", changed("conv_weight", lambda x: x.unflatten(1, (2, 2))), "^conv_weight is "


def _decode() -> Iterator[Case]:
    yield "decode_step", "another number of key heads", with_arguments(num_key_heads=3), "^qkvz is "
    yield "decode_step", "state of three dimensions", changed("state", lambda x: x[0]), r"^state is .* \[B, H, K, V\]"
    said = "^state is torch.bfloat16; it must be torch.float32"
    yield "decode_step", "state in bf16", changed("state", lambda x: x.bfloat16()), said


def _documents(function: str) -> Iterator[Case]:
    wrong = {
        "of rows": (torch.tensor([[0, T]]), r"torch.int64 of shape \(1, 2\); it must be int32 or int64"),
        "of fractions": (torch.tensor([0.0, 2.0, T]), "torch.float32 "),
        "of int16": (torch.tensor([0, 2, T], dtype=torch.int16), "torch.int16 "),
        "of one": (torch.tensor([0]), r"torch.int64 of shape \(1,\); it must be"),
        "from one": (torch.tensor([1, 2, T]), rf"\[1, 2, {T}\]; it must be non-decreasing from 0 to T = {T}"),
        "too short": (torch.tensor([0, 2, T - 1]), rf"\[0, 2, {T - 1}\]"),
        "too long": (torch.tensor([0, 2, T + 64]), rf"\[0, 2, {T + 64}\]"),
        "backwards": (torch.tensor([0, T + 1, T]), rf"\[0, {T + 1}, {T}\]"),
    }
    for what, (x, said) in wrong.items():
        yield function, f"cu_seqlens {what}", with_arguments(cu_seqlens=x), f"^cu_seqlens is {said}"
    yield function, "two packed rows", twice, "^cu_seqlens is given, and .* has B = 2; B must be 1"


def cases() -> Iterator[Case]:
    for function, arguments in DIMENSIONS.items():
        for name, dims in arguments.items():
            for dim in dims:
                yield function, f"{name} dim {dim}", changed(name, fewer(dim)), f"^{name} is .*; it must be "
        yield from _any_tensor(function)
    for function in ("gated_delta_rule", "shard_summary"):
        yield from _delta(function)
    yield from _mixer()
    yield from _decode()
    for function in ("mixer_core", "decode_step"):
        yield from _taps(function)
    for function in ("gated_delta_rule", "shard_summary", "mixer_core"):
        yield from _documents(function)


CASES = pytest.mark.parametrize(
    ("function", "change", "said"),
    [pytest.param(function, *rest, id=f"{function}: {what}".replace(" ", "_")) for function, what, *rest in cases()],
)


def check(function: str, change: Change, said: str, backend: str) -> None:
    """Refused, and nothing that the call would write to has been written."""
    given = change(legal(function))
    before = {key: x.clone() for key, x in given.items() if isinstance(x, Tensor)}
    with pytest.raises(ValueError, match=said):
        call(function, given, backend)
    kept = [key for key, x in before.items() if x.device.type != "meta"]
    assert all(torch.equal(before[key], given[key]) for key in kept)
