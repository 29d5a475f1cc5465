"""One agreed stop for all ranks, and the files that say how a run ended.

SIGTERM or SIGUSR1 at any rank, or a trigger file that rank 0 sees, ends the run after the step at hand: Megatron's loop
asks `signals_received` once a step, on every rank, saves a checkpoint and exits.
"""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from megatron_hybrid.checkpoint.commit import write_json

#: How a run ended: file in the --save folder. A run that ended in another way has left none of them.
STOPPED_CLEAN = "STOPPED_CLEAN"
TRAINING_COMPLETE = "TRAINING_COMPLETE"
STOPPED_NONFINITE = "STOPPED_NONFINITE"
MARKERS = (STOPPED_CLEAN, TRAINING_COMPLETE, STOPPED_NONFINITE)

#: What a rank reports: larger numbers win where ranks have different reasons.
REASONS = ("", "the stop file", "SIGUSR1", "SIGTERM")
_SIGNALS = {signal.SIGUSR1: 2, signal.SIGTERM: 3}


class StopRequests:
    """Stands where Megatron's `DistributedSignalHandler` stands.

    Args:
        file: a file that asks for a stop by being there; None for none.
        say: prints one line, on one rank.
    """

    def __init__(self, file: Path | None, say: Callable[[str], None]) -> None:
        self.file, self.say = file, say
        self.reason = ""
        self.since: float | None = None
        self._seen = 0

    def listen(self) -> None:
        """Take the signals; from now on they stop the run in an orderly way only.

        Processes forked later do not die of them either: a job step's signal must not take a data loader's workers
        away before the last step is done. At exit they are ended for good.
        """
        for number in _SIGNALS:
            signal.signal(number, self._on_signal)
        atexit.register(_end_helpers)

    def _on_signal(self, number: int, frame: Any) -> None:
        self._note(_SIGNALS[signal.Signals(number)])

    def _note(self, reason: int) -> None:
        self._seen = max(self._seen, reason)
        self.since = self.since or time.monotonic()

    def signals_received(self) -> list[bool]:
        """Whether to stop, for each rank; collective, one integer a rank."""
        import torch
        from megatron.training.dist_signal_handler import all_gather_item

        if self.file is not None and os.environ.get("RANK", "0") == "0" and self.file.exists():
            self._note(1)
        seen = all_gather_item(self._seen, dtype=torch.int32)
        if any(seen) and not self.reason:
            ranks = [rank for rank, reason in enumerate(seen) if reason == max(seen)]
            shown = ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")
            self.reason = REASONS[max(seen)]
            self.since = self.since or time.monotonic()
            self.say(f"stopping after this step: {self.reason} at rank {shown}")
        return [bool(reason) for reason in seen]

    def consume(self) -> None:
        """The stop file has done its work; on one rank."""
        if self.file is not None:
            self.file.unlink(missing_ok=True)


def _end_helpers() -> None:
    """Before multiprocessing's own exit function, which sends SIGTERM and then waits, without end."""
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


@contextlib.contextmanager
def signals_ignored() -> Iterator[None]:
    """For starting helper processes, which must finish writing when a whole job step is sent a signal."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def clear_markers(folder: Path) -> None:
    """At the start of a run: how the one before ended is no longer how this one did."""
    for name in MARKERS:
        (folder / name).unlink(missing_ok=True)


def write_marker(folder: Path, name: str, **content: Any) -> None:
    """Say how the run ended."""
    write_json(folder / name, {**content, "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())})
