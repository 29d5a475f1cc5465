"""Which tensors a compiled kernel reads and writes, by its code, and so the bytes it must move."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor

from megatron_hybrid.kernels.inspection import Recorded


def pointers(ttir: str) -> tuple[set[int], set[int]]:
    """Places, among a kernel's pointers, of those it loads from and of those it stores to, by triton's code for it.

    Follows each pointer through the values computed from it and through what loops carry. A pointer that a variant of
    the kernel does not touch is in neither.
    """
    source: dict[str, set[int]] = {}
    loaded: set[int] = set()
    stored: set[int] = set()
    for line in ttir.splitlines():
        if "tt.func public" in line:
            source |= {name: {i} for i, name in enumerate(re.findall(r"(%\w+): !tt\.ptr", line))}
            continue
        for inside, outside in re.findall(r"(%\w+) = (%\w+)", line):  # what a loop carries
            source[inside] = source.get(outside, set())
        operands = re.findall(r"%\w+", line)
        if operation := re.search(r"\btt\.(load|store)\b", line):
            pointer = re.findall(r"%\w+", line[operation.end() :])[0]
            (loaded if operation[1] == "load" else stored).update(source.get(pointer, ()))
        if re.match(r"\s*%\w+(:\d+)? = ", line):
            # Replaced, not joined, by nothing too: branches beside each other use a name for different values.
            is_pointer = "!tt.ptr" in line and not operation
            source[operands[0]] = set().union(*(source.get(name, set()) for name in operands[1:] if is_pointer))
    return loaded, stored


def needed_bytes(launch: Recorded, compiled: Any) -> int:
    """Each tensor that is read once, and each that is written once."""
    values = [launch.arguments[param.name] for param in launch.function.params]
    tensors = [value for value in values if isinstance(value, Tensor)]
    return sum(
        tensors[i].numel() * tensors[i].element_size() for places in pointers(compiled.asm["ttir"]) for i in places
    )
