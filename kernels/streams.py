"""A second stream, for launches that do not read each other's results and each leave a part of the GPU idle."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache

import torch
from torch import Tensor


@cache
def second_stream(device: torch.device) -> torch.cuda.Stream:
    """That of a device."""
    # What is launched here begins long and narrow: it gets its multiprocessors first, the wide one beside it the rest.
    return torch.cuda.Stream(device, priority=-1)


@contextmanager
def beside(x: Tensor) -> Iterator[AbstractContextManager[object]]:
    """Within, launches under the context given run beside those outside it; afterwards both have been waited for.

    What the launches under it read must be there before `beside`, what they write be allocated before it, and both
    be kept, and left alone by the first stream, to its end. Nothing may be allocated under the context: the allocator
    would take it for the second stream's alone. On CPU (the interpreter) everything runs in order.
    """
    if not x.is_cuda:
        yield nullcontext()
        return
    current, second = torch.cuda.current_stream(x.device), second_stream(x.device)
    second.wait_stream(current)
    try:
        yield torch.cuda.stream(second)
    finally:
        current.wait_stream(second)
