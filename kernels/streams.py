"""A second stream, for launches that do not read each other's results and each leave a part of the GPU idle."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

#: What has been launched on a stream up to some point; None on CPU.
Mark = torch.cuda.Event | None


@cache
def second_stream(device: torch.device) -> torch.cuda.Stream:
    """That of a device."""
    return torch.cuda.Stream(device)


class Beside:
    """Two streams, the current one and the second; on CPU (the interpreter) everything runs in order.

    What is long and narrow belongs on the current one: it begins at once and gets its multiprocessors first; the wide
    ones beside it, which begin a few microseconds later, get the rest.
    """

    def __init__(self, device: torch.device) -> None:
        self.kept: list[Tensor] = []
        self.is_used = False
        self.streams = (torch.cuda.current_stream(device), second_stream(device)) if device.type == "cuda" else None

    def here(self) -> Mark:
        """All that has been launched on the current stream."""
        return None if self.streams is None else self.streams[0].record_event()

    @contextmanager
    def after(self, mark: Mark) -> Iterator[None]:
        """Within, launches go to the second stream, after those there and those of the mark."""
        if self.streams is None or mark is None:
            yield
            return
        second, self.is_used = self.streams[1], True
        second.wait_event(mark)
        with torch.cuda.stream(second):
            yield

    def there(self) -> Mark:
        """All that has been launched on the second stream."""
        return None if self.streams is None else self.streams[1].record_event()

    def wait(self, mark: Mark) -> None:
        """What is launched on the current stream from here on comes after the mark."""
        if self.streams is not None and mark is not None:
            self.streams[0].wait_event(mark)

    def keep(self, x: Tensor) -> Tensor:
        """x, whose memory no other tensor gets before both streams have been waited for."""
        self.kept.append(x)
        return x


@contextmanager
def beside(x: Tensor) -> Iterator[Beside]:
    """Launches on two streams, both of which have been waited for afterwards.

    What the second stream's read and write must be allocated on the first, and be kept to the end. Nothing that is used
    elsewhere may be allocated there: the allocator would take it for the second stream's alone.
    """
    both = Beside(x.device)
    try:
        yield both
    finally:
        if both.is_used:
            both.wait(both.there())
