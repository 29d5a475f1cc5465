"""Starts the processes of a plan, and starts them again without the cell at which one of them hung or died."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from tests.parallel.split.cells import Cell, Job, Outcome, Plan, cells_of

ROOT = Path(__file__).parents[3]
#: A cell that was being run when its processes were ended is tried so often.
TRIES = 2


def environment(device: str) -> dict[str, str]:
    """CUDA_DEVICE_MAX_CONNECTIONS: Megatron demands 1 of TP and CP before Blackwell, set before CUDA starts.

    Attention's backward pass gives the same bits twice: what differs between layouts is not chance.
    """
    threads = str(max(1, (os.cpu_count() or 1) // 4))
    found = {**os.environ, "CUDA_DEVICE_MAX_CONNECTIONS": "1", "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0"}
    found |= {"PYTHONUNBUFFERED": "1", "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": threads}
    found["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    if device == "cpu":
        found["CUDA_VISIBLE_DEVICES"] = ""
    return found


class Driver:
    """The cells of a plan in processes. `poll` until it returns False; outcomes come in `take`."""

    def __init__(self, plan: Plan, folder: Path) -> None:
        self.plan, self.folder = plan, folder
        self.left: list[tuple[Job, Cell]] = [(job, cell) for job in plan.jobs for cell in cells_of([job])]
        self.tries: dict[Cell, int] = {}
        self.generation = 0
        self.processes: list[subprocess.Popen[bytes]] = []
        self.finished: dict[Cell, Outcome] = {}
        folder.mkdir(parents=True)
        self._start()

    def _start(self) -> None:
        """Processes for the cells that are left."""
        self.generation += 1
        jobs = []
        for job in self.plan.jobs:
            recipes = tuple(cell.recipe for other, cell in self.left if other is job)
            if recipes:
                jobs.append(replace(job, recipes=recipes))
        plan = replace(self.plan, jobs=tuple(jobs))
        (self.folder / "plan.json").write_text(json.dumps({**plan.as_data(), "generation": self.generation}))
        for file in (*self.folder.glob("now_*"), *self.folder.glob("*.status")):
            file.unlink()
        used = sorted({place for job in jobs for place in job.processes})
        self.places, self.processes = used, []
        worker = [sys.executable, "-m", "tests.parallel.split.worker", str(self.folder)]
        for place in used:
            with (self.folder / f"log_{self.generation}_{place}").open("w") as log:
                command = [*worker, str(place), self.plan.device]
                self.processes.append(
                    subprocess.Popen(command, stdout=log, stderr=log, env=environment(self.plan.device), cwd=ROOT)
                )

    def take(self) -> Iterator[tuple[Cell, Outcome]]:
        """What has finished since the last call."""
        found, self.finished = self.finished, {}
        yield from found.items()

    def poll(self) -> bool:
        """Looks once; False when there is nothing left to wait for."""
        self._collect()
        if not self.left:
            self._end()
            return False
        codes = [process.poll() for process in self.processes]
        hung = self._overdue()
        if any(codes) or hung or all(code is not None for code in codes):
            self._again(hung)
        return bool(self.left)

    def _collect(self) -> None:
        """Cells of which every rank has said how it went."""
        for job, cell in list(self.left):
            statuses = [self.folder / f"{cell.file}.{rank}.status" for rank in range(job.layout.ranks)]
            if not all(status.exists() for status in statuses):
                continue
            errors = [f"rank {rank}: {text}" for rank, s in enumerate(statuses) if (text := s.read_text())]
            if errors:
                self._finish(job, cell, Outcome(error="\n".join(errors)))
            else:
                files = [self.folder / f"{cell.file}.{rank}.found" for rank in range(job.layout.ranks)]
                # Pickles, but of this run's own processes and in its own folder.
                self._finish(job, cell, Outcome([torch.load(file, weights_only=False) for file in files]))
                for file in files:
                    file.unlink()

    def _finish(self, job: Job, cell: Cell, outcome: Outcome) -> None:
        self.finished[cell] = outcome
        self.left = [(other, c) for other, c in self.left if c != cell]

    def _overdue(self) -> list[Cell]:
        """Cells that take too long, or of which one rank has failed while another goes on."""
        found = []
        for job, cell in self.left:
            here = [self.folder / f"now_{place}" for place in job.processes]
            if not all(now.exists() and Cell(*json.loads(now.read_text())) == cell for now in here):
                continue  # some are not there yet
            if time.time() - max(now.stat().st_mtime for now in here) > self.plan.cell_limit_s:
                found.append(cell)
            statuses = [self.folder / f"{cell.file}.{rank}.status" for rank in range(job.layout.ranks)]
            failed = [s for s in statuses if s.exists() and s.read_text()]
            if failed and time.time() - max(s.stat().st_mtime for s in failed) > self.plan.grace_s:
                found.append(cell)
        return list(dict.fromkeys(found))

    def _again(self, hung: Sequence[Cell]) -> None:
        """End all processes, write off what hung or was tried too often, and start those for the rest."""
        here = [self.folder / f"now_{place}" for place in self.places]
        running = list(dict.fromkeys(Cell(*json.loads(now.read_text())) for now in here if now.exists()))
        dead = [place for place, process in zip(self.places, self.processes, strict=True) if process.poll()]
        for process in self.processes if hung else []:
            if process.poll() is None:
                os.kill(process.pid, signal.SIGUSR1)
        time.sleep(0.5 if hung else 0)
        self._end()
        self._collect()
        for job, cell in list(self.left):
            if cell not in hung and not (cell in running and set(dead) & set(job.processes)):
                continue  # its processes were ended for others' sake
            self.tries[cell] = self.tries.get(cell, 0) + 1
            said = [
                f"rank {rank}: {status.read_text()}"
                for rank in range(job.layout.ranks)
                if (status := self.folder / f"{cell.file}.{rank}.status").exists() and status.read_text()
            ]
            if said or self.tries[cell] >= TRIES:
                why = "hung" if cell in hung else f"process {dead} ended" if dead else "processes ended"
                self._finish(job, cell, Outcome(error="\n".join([why, *said, *self._logs(job)])))
        if not running and self.left:  # none came as far as a cell
            for job, cell in list(self.left):
                self._finish(job, cell, Outcome(error="\n".join(["not started", *self._logs(job)])))
        if self.left:
            self._start()

    def _logs(self, job: Job) -> list[str]:
        """Ends of what the processes said."""
        found = []
        for place in job.processes:
            log = self.folder / f"log_{self.generation}_{place}"
            text = log.read_text(errors="replace")[-1500:] if log.exists() else ""
            found.append(f"process {place}: {text}")
        return found

    def _end(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
        for process in self.processes:
            process.wait()

    def close(self, why: str) -> None:
        """End the processes; what has not run, has not for this reason."""
        self._collect()
        self._end()
        for job, cell in list(self.left):
            self._finish(job, cell, Outcome(error=why))


def run(drivers: Sequence[Driver], budget_s: float, each: Callable[[Cell, Outcome], None]) -> None:
    """All of them side by side; `each` is called with what a cell gave as soon as it is there."""
    deadline = time.monotonic() + budget_s
    try:
        while time.monotonic() < deadline:
            going_on = [driver.poll() for driver in drivers]
            for driver in drivers:
                for cell, outcome in driver.take():
                    each(cell, outcome)
            if not any(going_on):
                break
            time.sleep(0.05)
    finally:
        for driver in drivers:
            driver.close(f"not run: {budget_s:.0f} s were over")
            for cell, outcome in driver.take():
                each(cell, outcome)
