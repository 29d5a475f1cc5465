"""A second stream, for launches that have nothing to do with each other and each leave a part of the GPU idle."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache

import torch
from torch import Tensor


@cache
def _second_stream(device: torch.device) -> torch.cuda.Stream:
    # What is launched here is long and narrow: it gets its multiprocessors first, the wide launch beside it the rest.
    return torch.cuda.Stream(device, priority=-1)


@contextmanager
def beside(x: Tensor) -> Iterator[AbstractContextManager[object]]:
    """Within, launches under the context given run beside those outside it; afterwards both have been waited for.

    What the launches under the context write must be allocated before `beside`, and kept until its end: the allocator
    takes memory allocated under it for the second stream's alone, and memory allocated or freed outside it within may
    be touched by the first stream at any time. On CPU (the interpreter) everything runs in order.
    """
    if not x.is_cuda:
        yield nullcontext()
        return
    current, second = torch.cuda.current_stream(x.device), _second_stream(x.device)
    second.wait_stream(current)
    try:
        yield torch.cuda.stream(second)
    finally:
        current.wait_stream(second)
