"""What a call of gated_delta.py must be, on every backend: a kernel given another shape reads past it without a word.

Letters in shapes as there. Nothing here waits for a GPU: values are read on CPU only.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

#: Sizes by the letters that stand for them; several where more than one is legal.
Sizes = Mapping[str, int | tuple[int, ...]]

#: The arguments that must have the dtype of one another, by name the group.
ALIKE = {"q": "qkv", "k": "qkv", "v": "qkv", "a": "ab", "b": "ab"}


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
    first, device = next((name, x.device) for name, (_, x) in tensors.items() if x is not None)
    dtypes: dict[str, tuple[torch.dtype, str]] = {}
    for name, (letters, x) in tensors.items():
        if x is None:
            continue
        shape = x.shape
        if not _fits(known, letters.split(", "), shape):
            legal = ", ".join(_words(known.get(letter, letter)) for letter in letters.split(", "))
            raise ValueError(f"{name} is {tuple(shape)}; it must be [{letters}], here [{legal}]")
        if x.device != device:
            raise ValueError(f"{name} is on {x.device}; it must be on {device}, where {first} is")
        if not x.is_floating_point():
            raise ValueError(f"{name} is {x.dtype}; it must be a floating point dtype")
        if name in ALIKE:
            dtype, other = dtypes.setdefault(ALIKE[name], (x.dtype, name))
            if x.dtype != dtype:
                raise ValueError(f"{name} is {x.dtype}; it must be {dtype}, the dtype of {other}")
        if name == first and "T" in letters:
            known["N"] = shape[0]
            if cu_seqlens is not None:
                _check_documents(cu_seqlens, shape[0], shape[1], device, first)
                known["N"] = len(cu_seqlens) - 1
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


def _fits(known: dict[str, int | tuple[int, ...]], letters: list[str], shape: torch.Size) -> bool:
    if len(letters) != len(shape):
        return False
    for letter, size in zip(letters, shape, strict=True):
        legal = known.setdefault(letter, size)
        if size != legal and (isinstance(legal, int) or size not in legal):
            return False
    return True


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
