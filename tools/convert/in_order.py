"""Work handed to a thread or a few, begun in the order in which it was handed over, with few pieces waiting."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any


def workers() -> int:
    """Threads that convert, two for a core: while one makes a hash, another waits for the disk."""
    return 2 * min(4, os.cpu_count() or 1)


class InOrder:
    """Calls in threads of their own. An error in one comes out of a later `submit` or of `finish`.

    Args:
        name: of the threads, for those who look at a running process.
        waiting: pieces that may be outstanding; each holds its arguments, so this bounds memory.
        threads: how many; with one, each call ends before the next begins.
    """

    def __init__(self, name: str, waiting: int, threads: int = 1) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix=name)
        self._outstanding: deque[Future[Any]] = deque()
        self._waiting = waiting

    def submit(self, work: Callable[..., Any], *arguments: Any) -> None:
        """Hands over a call; waits while too many are outstanding."""
        while len(self._outstanding) >= self._waiting:
            self._outstanding.popleft().result()
        self._outstanding.append(self._pool.submit(work, *arguments))

    def finish(self) -> None:
        """Waits for all of it and ends the threads."""
        try:
            while self._outstanding:
                self._outstanding.popleft().result()
        finally:
            self.stop()

    def stop(self) -> None:
        """Ends the threads after the calls they are in; what waits is not done."""
        self._pool.shutdown(wait=True, cancel_futures=True)
