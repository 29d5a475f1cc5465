"""Work handed to one thread, done in the order in which it was handed over, with few pieces waiting."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any


def workers() -> int:
    """Threads that write: the kernel's part of writing keeps a core busy at about 1 GB/s and less."""
    return min(4, os.cpu_count() or 1)


class InOrder:
    """One thread. An error in the work comes out of a later `submit` or of `finish`.

    Args:
        name: of the thread, for those who look at a running process.
        waiting: pieces that may be outstanding; each holds its arguments, so this bounds memory.
    """

    def __init__(self, name: str, waiting: int) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._outstanding: deque[Future[Any]] = deque()
        self._waiting = waiting

    def submit(self, work: Callable[..., Any], *arguments: Any) -> None:
        """Hands over a call; waits while too many are outstanding."""
        while len(self._outstanding) >= self._waiting:
            self._outstanding.popleft().result()
        self._outstanding.append(self._pool.submit(work, *arguments))

    def finish(self) -> None:
        """Waits for all of it and ends the thread."""
        try:
            while self._outstanding:
                self._outstanding.popleft().result()
        finally:
            self.stop()

    def stop(self) -> None:
        """Ends the thread after the call it is in; what waits is not done."""
        self._pool.shutdown(wait=True, cancel_futures=True)
