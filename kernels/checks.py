"""What a call of gated_delta.py must be, on every backend: a kernel given another shape reads past it without a word.

Letters in shapes as there. Nothing here waits for a GPU: values are read on CPU only.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

#: Sizes by the letters that stand for them; several where more than one is legal.
Sizes = Mapping[str, int | tuple[int, ...]]

#: The arguments of one call that must have one dtype.
ALIKE = (("q", "k", "v"), ("a", "b"))


def check_call(
    tensors: Mapping[str, tuple[str, Tensor | None]], *, key_heads: str, value_heads: str, sizes: Sizes | None = None,
    cu_seqlens: Tensor | None = None,
) -> None:  # fmt: skip
    """Raises ValueError for the first tensor that does not fit the ones before it, and for illegal documents.

    Args:
        tensors: by argument, the letters of its dimensions, as in "B, T, H, V", and what was given; None: not given.
            The first one says on which device all are, and a letter's size is that of its first tensor.
        key_heads, value_heads: what gave Hk and H, for an error to name.
        sizes: of letters, where other arguments give them.
        cu_seqlens: boundaries of N documents in tensors of B, T, ...; without it N = B.
    """
    known: dict[str, int | tuple[int, ...]] = dict(sizes or {})
    given = {name: x for name, (_, x) in tensors.items() if x is not None}
    first, device = next((name, x.device) for name, x in given.items())
    for name, x in given.items():
        letters = tensors[name][0].split(", ")
        if len(letters) != x.dim() or not all(_fits(known, *pair) for pair in zip(letters, x.shape, strict=True)):
            legal = ", ".join(_words(known.get(letter, letter)) for letter in letters)
            raise ValueError(f"{name} is {tuple(x.shape)}; it must be [{', '.join(letters)}], here [{legal}]")
        if x.device != device:
            raise ValueError(f"{name} is on {x.device}; it must be on {device}, where {first} is")
        if not x.is_floating_point():
            raise ValueError(f"{name} is {x.dtype}; it must be a floating point dtype")
        if name == first and "T" in letters:
            known["N"] = x.shape[0]
            if cu_seqlens is not None:
                _check_documents(cu_seqlens, x.shape[0], x.shape[1], device, first)
                known["N"] = len(cu_seqlens) - 1
    for names in ALIKE:
        alike = [name for name in names if name in given]
        for name in alike[1:]:
            if given[name].dtype != given[alike[0]].dtype:
                legal = given[alike[0]].dtype
                raise ValueError(f"{name} is {given[name].dtype}; it must be {legal}, the dtype of {alike[0]}")
    Hk, H = known["Hk"], known["H"]
    assert isinstance(Hk, int) and isinstance(H, int)
    if Hk < 1:
        raise ValueError(f"{key_heads} is {Hk}; it must be at least 1")
    if H % Hk:
        raise ValueError(f"{value_heads} is {H}; it must be a multiple of {key_heads}, {Hk}")


def mixer_sizes(Hk: int, H: int, K: int, V: int, conv_weight: Tensor) -> Sizes:
    """Those of the mixer core's arguments; conv_weight says how many taps there are."""
    D, W = 2 * Hk * K + H * V, conv_weight.shape[-1] if conv_weight.dim() else 0
    return {
        "Hk": Hk, "H": H, "2 H": 2 * H, "K": K, "V": V, "D": D, "D or D + H V": (D, D + H * V), "1": 1,
        "W": (1, 2, 3, 4), "W - 1": W - 1,
    }  # fmt: skip


def conv_letters(conv_weight: Tensor) -> str:
    """As a matrix, or as torch.nn.Conv1d has it with groups = D."""
    return "D, 1, W" if conv_weight.dim() == 3 else "D, W"


def _fits(known: dict[str, int | tuple[int, ...]], letter: str, size: int) -> bool:
    legal = known.setdefault(letter, size)
    return size == legal if isinstance(legal, int) else size in legal


def _words(size: str | int | tuple[int, ...]) -> str:
    return " or ".join(map(str, size)) if isinstance(size, tuple) else str(size)


def _check_documents(cu_seqlens: Tensor, B: int, T: int, device: torch.device, first: str) -> None:
    if cu_seqlens.dtype not in (torch.int32, torch.int64) or cu_seqlens.dim() != 1 or len(cu_seqlens) < 2:
        given = f"{cu_seqlens.dtype} of shape {tuple(cu_seqlens.shape)}"
        raise ValueError(f"cu_seqlens is {given}; it must be int32 or int64 of shape [N + 1], N >= 1")
    if B != 1:
        raise ValueError(f"cu_seqlens is given, and {first} has B = {B}; B must be 1: pack the documents into one row")
    if cu_seqlens.device.type != "cpu":
        if cu_seqlens.device != device:
            raise ValueError(f"cu_seqlens is on {cu_seqlens.device}; it must be on {device}, where {first} is, or cpu")
        return
    values = cu_seqlens.tolist()
    if values[0] != 0 or values[-1] != T or values != sorted(values):
        raise ValueError(f"cu_seqlens is {values}; it must be non-decreasing from 0 to T = {T}")
