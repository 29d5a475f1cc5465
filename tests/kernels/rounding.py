"""bf16 in triton's interpreter as a GPU has it: rounded to nearest, products of it taken in fp32.

By itself triton 3.6's interpreter cuts bf16 off towards zero, twice the error, and multiplies its bit patterns as
integers in a product of matrices.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    cast, dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot

    def widened(x: Any) -> Any:
        return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def cast_rounding(self: Any, x: Any, to: Any) -> Any:
        if (x.dtype.scalar, to.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, x, to)
        rounded = torch.from_numpy(np.array(x.data, order="C")).bfloat16().view(torch.int16).numpy().view(np.uint16)
        return TensorHandle(rounded, tl.bfloat16)

    def dot_of_floats(self: Any, a: Any, b: Any, *others: Any) -> Any:
        a, b = (widened(x) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return dot(self, a, b, *others)

    changed = {"cast_impl": cast_rounding, "create_dot": dot_of_floats}
    try:
        for name, function in changed.items():
            setattr(InterpreterBuilder, name, function)
        yield
    finally:
        InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot = cast, dot
