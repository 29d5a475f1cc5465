"""Runs workers on this machine until a plan is done, shows how far they are, and replaces those that die."""

import faulthandler
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from megatron_hybrid.tools.cli import ToolError
from megatron_hybrid.tools.corpus.ledger import HEARTBEAT_SECONDS, Leases, Ledger, LedgerState, enter_run
from megatron_hybrid.tools.corpus.plan import Plan, load_plan
from megatron_hybrid.tools.corpus.worker import SHARD_FOLDER, Settings, Worker, shard_files_exist

DRAINED_STATUS = 75  # of a process told to stop before the plan was done: start it again (EX_TEMPFAIL)
MAX_DEATHS = 2  # of workers on the same shard before the run gives up
LOG_SECONDS = 30.0  # between progress lines where stderr is no terminal
SCREEN_SECONDS = 0.5
WORKER_ENVIRONMENT = {  # one core per worker
    "RAYON_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
}


class Drained(Exception):
    """The run was told to stop; the shards at work were finished, others are left."""


class Drain:
    """Whether SIGUSR1 or SIGTERM told this process to finish the shards at work and stop."""

    def __init__(self) -> None:
        self.asked = False
        self._old: dict[int, Any] = {}

    def __enter__(self) -> "Drain":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGUSR1, signal.SIGTERM):
                self._old[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *ignored: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: object) -> None:
        self.asked = True


class ProgressLine:
    """MB/s of text, tokens/s, time left and rejected lines, on stderr."""

    def __init__(self, plan: Plan, state: LedgerState) -> None:
        self._estimates = {shard.index: shard.estimated_bytes for shard in plan.shards}
        self._finished = set(state.done)
        self._running: dict[int, dict[str, Any]] = {}
        self._tokens = self._text_bytes = 0
        self._rejected: Counter[str] = Counter()
        self._started = self._shown = time.monotonic()
        self._screen = sys.stderr.isatty()

    def take(self, event: dict[str, Any]) -> None:
        """Follows one event of a worker."""
        if event["event"] == "progress":
            self._running[event["shard"]] = event
        elif event["event"] == "done":
            last = self._running.pop(event["shard"], None)
            self._finished.add(event["shard"])
            self._tokens += event["tokens"]
            self._text_bytes += event["text_bytes"]
            self._rejected.update(last["rejected"] if last else {})
        elif event["event"] == "notice":
            self.say(event["text"])

    def say(self, text: str) -> None:
        """Prints a line of its own."""
        print(f"{chr(13) + ' ' * 78 + chr(13) if self._screen else ''}{text}", file=sys.stderr, flush=True)

    def show(self) -> None:
        """Draws the line, if it is time to."""
        now = time.monotonic()
        if now - self._shown < (SCREEN_SECONDS if self._screen else LOG_SECONDS):
            return
        self._shown = now
        line = self.line(now - self._started)
        if self._screen:
            width = shutil.get_terminal_size((100, 24)).columns or 100
            print(f"\r{line[: width - 1]:<{width - 1}}", end="", file=sys.stderr, flush=True)
        else:
            print(line, file=sys.stderr, flush=True)

    def clear(self) -> None:
        """Ends the line on a screen."""
        if self._screen:
            print(f"\r{' ' * 78}\r", end="", file=sys.stderr, flush=True)

    def line(self, seconds: float) -> str:
        """The progress after `seconds` of work."""
        running = self._running.values()
        text_bytes = self._text_bytes + sum(event["text_bytes"] for event in running)
        tokens = self._tokens + sum(event["tokens"] for event in running)
        rejected = self._rejected + sum((Counter(event["rejected"]) for event in running), Counter())
        total = sum(self._estimates.values())
        done = sum(self._estimates[shard] for shard in self._finished)
        done += sum(min(event["text_bytes"], self._estimates[event["shard"]]) for event in running)
        rate = text_bytes / seconds if seconds > 0 else 0.0
        left = f"{(total - done) / rate / 60:,.1f} min left" if rate else "time left unknown"
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in sorted(rejected.items()))
        return (
            f"{100 * done / max(total, 1):5.1f} %, shards {len(self._finished)}/{len(self._estimates)}, "
            f"{rate / 1e6:,.1f} MB/s of text, {tokens / max(seconds, 1e-9) / 1e6:,.2f} M tokens/s, {left}, "
            f"rejected: {reasons or 'none'}"
        )


def run_plan(
    folder: Path, settings: Settings, workers: int, run_id: str, engine: str = "local"
) -> LedgerState:  # fmt: skip
    """Does every shard of the plan in `folder` that is not recorded; returns the state of the ledger.

    With `engine` local workers are processes of this machine (one: this process), with ray they are actors.

    Raises ToolError for the first fault under --on-error fail, for a shard that kills its workers,
    and, once all others are done, for files that could not be read to their end. Raises Drained where
    SIGUSR1 or SIGTERM ended the work early.
    """
    plan = load_plan(folder)
    leases = Leases(folder)
    mine = enter_run(leases, run_id)
    beat = threading.Thread(target=_beat, args=(leases,), daemon=True)
    beat.start()
    try:
        ledger = Ledger(folder, plan.fingerprint)
        _forget_lost(folder, plan, ledger)
        _remove_leftovers(folder, leases)
        state = ledger.read()
        if len(state.done) < len(plan.shards):
            progress = ProgressLine(plan, state)
            left = len(plan.shards) - len(state.done)
            with Drain() as drain:
                if engine == "local" and workers == 1:
                    faults = _alone(folder, settings, progress, drain)
                else:
                    workers = min(workers, left)
                    start = partial(_worker_class(engine, workers), folder, settings)
                    faults = _pool(start, workers, settings.stall_seconds, progress, plan, drain)
            progress.clear()
            if faults:
                raise ToolError(_summary(faults))
            if drain.asked and len(ledger.read().done) < len(plan.shards):
                raise Drained(
                    f"{folder}: stopped as asked; {len(ledger.read().done)} of {len(plan.shards)} shards are done"
                )
        return ledger.read()
    finally:
        leases.give_back(mine)


def _beat(leases: Leases) -> None:
    while True:
        time.sleep(HEARTBEAT_SECONDS)
        leases.renew()


def _summary(faults: list[str]) -> str:
    more = f" (and {len(faults) - 1} more; all are in the ledger)" if len(faults) > 1 else ""
    return f"{faults[0]}{more}"


def _forget_lost(folder: Path, plan: Plan, ledger: Ledger) -> None:
    """Takes back the record of every shard whose files are gone."""
    done = dict(ledger.read().done)
    for shard in plan.shards:
        record = done.get(shard.index)
        if record is not None and not shard_files_exist(folder, shard, record):
            ledger.append({"event": "lost", "id": record["id"]})


def _remove_leftovers(folder: Path, leases: Leases) -> None:
    """Removes temporary files of dead processes.

    A worker takes the lease of a shard before it makes files: so a file seen first and a lease
    looked at second never make a live worker's file look dead.
    """
    shards = folder / SHARD_FOLDER
    found = [path for path in shards.iterdir() if ".tmp." in path.name] if shards.is_dir() else []
    for path in found:
        if not leases.is_live(path.name.partition(".")[0]):
            path.unlink(missing_ok=True)


def _alone(folder: Path, settings: Settings, progress: ProgressLine, drain: Drain) -> list[str]:
    """One worker, in this process; should it report nothing for too long, the process ends and shows where it was."""
    faults: list[str] = []
    worker: Worker | None = None

    def report(event: dict[str, Any]) -> None:
        _expect_more(settings.stall_seconds)
        progress.take(event)
        progress.show()
        if drain.asked and worker is not None:
            worker.draining = True
        if event["event"] == "failed":
            faults.append(event["error"])
            if event["stop"] and worker is not None:
                worker.draining = True

    _expect_more(settings.stall_seconds)
    try:
        worker = Worker(folder, settings, report)
        worker.run()
    finally:
        faulthandler.cancel_dump_traceback_later()
    return faults


def _expect_more(seconds: float) -> None:
    """Ends this process, with a traceback and status 1, unless called again within `seconds` (0: never).

    Its timer needs no Python lock: it works also where native code hangs that holds it.
    """
    if seconds:
        faulthandler.dump_traceback_later(seconds, exit=True, file=2)  # stderr, also where a test replaced it


class PoolWorker(Protocol):
    """A worker as the pool sees it: what it is at, when it was last heard of, and how to end it."""

    shard: int | None
    heard: float
    silent: bool

    def drain(self) -> None:
        """Lets the shard at work be the last."""

    def kill(self) -> None:
        """Ends the worker at once."""

    def wait(self) -> None:
        """Returns when it is gone."""


PoolEvents = queue.Queue[tuple[PoolWorker, dict[str, Any]]]  # the last event of each worker is "gone"


class _Process:
    """A worker process."""

    def __init__(self, folder: Path, settings: Settings, events: PoolEvents) -> None:
        environment = os.environ | WORKER_ENVIRONMENT
        command = [
            sys.executable,
            "-m",
            "megatron_hybrid.tools.corpus.worker",
            str(folder),
            json.dumps(asdict(settings)),
        ]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
        self.shard: int | None = None
        self.heard = time.monotonic()
        self.silent = False
        threading.Thread(target=self._listen, args=(events,), daemon=True).start()

    def _listen(self, events: PoolEvents) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            try:
                events.put((self, json.loads(line)))
            except ValueError:
                sys.stderr.write(line.decode(errors="replace"))
        self._process.wait()
        events.put((self, {"event": "gone", "status": self._process.returncode}))

    def drain(self) -> None:
        """Lets the shard at work be the last."""
        self._process.send_signal(signal.SIGUSR1)

    def kill(self) -> None:
        """Ends the process at once."""
        self._process.kill()

    def wait(self) -> None:
        """Returns when the process is gone."""
        self._process.wait()


def _worker_class(engine: str, workers: int) -> Callable[[Path, Settings, PoolEvents], PoolWorker]:
    if engine == "local":
        return _Process
    from megatron_hybrid.tools.corpus.ray_workers import RayWorker, connect

    connect(workers)
    return RayWorker


def _pool(
    start: Callable[[PoolEvents], PoolWorker],
    workers: int,
    stall_seconds: float,
    progress: ProgressLine,
    plan: Plan,
    drain: Drain,
) -> list[str]:
    """`workers` of those that `start` makes; a dead or silent one is replaced, a shard that kills two ends the run."""
    events: PoolEvents = queue.Queue()
    alive = {start(events) for _ in range(workers)}
    faults: list[str] = []
    deaths: Counter[int | None] = Counter()  # by shard; None: between shards, or before it could say
    told = False
    try:
        while alive:
            if drain.asked and not told:
                told = True
                for process in alive:
                    process.drain()
            _kill_silent(alive, stall_seconds)
            try:
                process, event = events.get(timeout=SCREEN_SECONDS)
            except queue.Empty:
                progress.show()
                continue
            process.heard = time.monotonic()
            progress.take(event)
            progress.show()
            if event["event"] == "start":
                process.shard = event["shard"]
            elif event["event"] == "done":
                process.shard = None
            elif event["event"] == "failed":
                process.shard = None
                faults.append(event["error"])
                if event["stop"]:
                    return faults
            elif event["event"] == "gone":
                alive.discard(process)
                if told and not process.silent:  # the signal may have come before the worker could take it
                    continue
                if event["status"] == 0 and process.shard is None:
                    continue
                how = f"status {event['status']}"
                if process.silent:
                    how = f"{stall_seconds:g} s without a sign of life"
                deaths[process.shard] += 1
                if deaths[process.shard] >= MAX_DEATHS:
                    return [*faults, _deadly(plan, process.shard, how)]
                where = "between shards" if process.shard is None else f"at shard {process.shard}"
                progress.say(f"a worker died ({how}) {where}; another takes over")
                if not told:
                    alive.add(start(events))
        return faults
    finally:
        for process in alive:
            process.kill()
        for process in alive:
            process.wait()


def _kill_silent(alive: set[PoolWorker], stall_seconds: float) -> None:
    """Ends every worker that reported nothing for so long; it is seen gone like one that died by itself."""
    for process in alive:
        if stall_seconds and time.monotonic() - process.heard > stall_seconds:
            process.silent = True
            process.kill()


def _deadly(plan: Plan, shard: int | None, how: str) -> str:
    if shard is None:
        return f"{MAX_DEATHS} workers died before they could say at which shard, the last with {how}"
    first = plan.files[plan.shards[shard].segments[0].file].path
    return (
        f"shard {shard} ({first}{' and others' if len(plan.shards[shard].segments) > 1 else ''}): {MAX_DEATHS} workers "
        f"died at it, the last with {how}; status -9 is most often for memory: give each worker more or use fewer "
        "--workers; a worker that only was slow needs a larger --stall-seconds"
    )
