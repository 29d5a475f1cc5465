"""One process of a plan: its cells in order, in process groups that are made anew for each layout.

    python -m tests.parallel.split.worker FOLDER PLACE DEVICE

FOLDER holds plan.json. PLACE: which of the plan's processes this is; on GPUs, which GPU. DEVICE: the plan's. Each rank
writes what a cell gave, then waits for the other ranks' files: a cell that failed on some ranks and not on others
leaves groups that cannot be used again, so new ones are made, and where a rank never comes `driver` ends all and starts
them again.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import signal
import sys
import time
import traceback
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

if __name__ == "__main__" and sys.argv[3] == "cpu":
    # Where it is installed Megatron takes its Adam, which asks for a GPU; here Megatron shall not find it.
    sys.modules["transformer_engine"] = None  # type: ignore[assignment]

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_hybrid import compat
from megatron_hybrid.tools.gpu_bench import harness
from tests.parallel import compare
from tests.parallel.split import model
from tests.parallel.split.cells import ONE_RANK_FAILS, Cell, Job, Plan, cells_of

#: Exit status of a process whose GPU answers no more: an illegal access stays with the process.
GPU_LOST = 3


class Worker:
    def __init__(self, folder: Path, place: int) -> None:
        self.folder, self.place = folder, place
        data = json.loads((folder / "plan.json").read_text())
        self.generation: int = data.pop("generation")
        self.plan = Plan.from_data(data)

    def run(self) -> None:
        compat.start_backend()
        if self.plan.device == "cuda":
            torch.cuda.set_device(self.place)
        mine = [(number, job) for number, job in enumerate(self.plan.jobs) if self.place in job.processes]
        self.next = iter([*cells_of([job for _, job in mine])[1:], None])
        for number, job in mine:
            recipes = list(job.recipes)
            while recipes:
                recipes = self._in_new_groups(number, job, recipes)

    def _in_new_groups(self, number: int, job: Job, recipes: list[str]) -> list[str]:
        """Cells up to the first that fails; those that are left."""
        rank, ranks, layout = job.processes.index(self.place), len(job.processes), job.layout
        os.environ.update(
            RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(self.place), LOCAL_WORLD_SIZE=str(ranks)
        )
        self._now_in(Cell(layout.name, recipes[0]))
        dist.init_process_group(
            "nccl" if self.plan.device == "cuda" else "gloo",
            init_method=f"file://{self.folder}/groups_{self.generation}_{number}_{len(recipes)}",
            rank=rank,
            world_size=ranks,
            timeout=timedelta(minutes=10),  # others may still be in cells before this one; `driver` sees what hangs
        )
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=layout.tp,
            pipeline_model_parallel_size=layout.pp,
            context_parallel_size=layout.cp,
        )
        try:
            while recipes:
                if not self._cell(job, Cell(layout.name, recipes.pop(0)), rank):
                    break
            return recipes
        finally:
            parallel_state.destroy_model_parallel()
            dist.destroy_process_group()

    def _cell(self, job: Job, cell: Cell, rank: int) -> bool:
        """Whether it went well on every rank."""
        self._now_in(cell)
        began, error = time.monotonic(), ""
        try:
            if job.broken == ONE_RANK_FAILS and rank == 1:
                raise RuntimeError(ONE_RANK_FAILS)
            with _broken(job.broken):
                found = model.measure(job.layout, cell.recipe, self.plan.model, self.plan.steps)
            found["seconds"] = time.monotonic() - began
            torch.save(found, self.folder / f"{cell.file}.{rank}.found")
        except Exception:
            error = traceback.format_exc()
        harness.free()
        _write(self.folder / f"{cell.file}.{rank}.status", error)
        if error and self.plan.device == "cuda":
            _leave_unless_the_gpu_answers()
        statuses = [self.folder / f"{cell.file}.{other}.status" for other in range(len(job.processes))]
        while not all(status.exists() for status in statuses):
            time.sleep(0.005)
        if cell_after := next(self.next):  # leaving groups that a failure spoiled may hang: the next cell's time
            self._now_in(cell_after)
        return not any(status.read_text() for status in statuses)

    def _now_in(self, cell: Cell) -> None:
        _write(self.folder / f"now_{self.place}", json.dumps([cell.layout, cell.recipe]))


def _write(file: Path, text: str) -> None:
    """At once or not at all."""
    partial = file.with_name(f"{file.name}_partial")
    partial.write_text(text)
    partial.rename(file)


def _leave_unless_the_gpu_answers() -> None:
    try:
        torch.cuda.synchronize()
    except Exception:
        traceback.print_exc()
        os._exit(GPU_LOST)


class _broken:
    """Inside, a remedy is taken out (`tests.parallel.compare`)."""

    def __init__(self, what: str) -> None:
        self.what = what

    def __enter__(self) -> None:
        self.modules: list[Any] = [compare.gated_delta_net, compare.norms, compare.loss]
        self.before = [dict(vars(module)) for module in self.modules]
        compare._break(self.what)

    def __exit__(self, *unused: Any) -> None:
        for module, before in zip(self.modules, self.before, strict=True):
            vars(module).update(before)


def main() -> None:
    logging.disable(logging.WARNING)
    faulthandler.register(signal.SIGUSR1)  # where a hanging process stands
    with suppress(KeyboardInterrupt):
        Worker(Path(sys.argv[1]), int(sys.argv[2])).run()


if __name__ == "__main__":
    main()
