"""Several ranks on one machine over gloo, forked after one import of Megatron (importing it costs seconds)."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_hybrid import compat, cpu_backend

cpu_backend.enable()
compat.start_backend()

_FORK = multiprocessing.get_context("fork")


def run_ranks(work: Callable[..., Any], ranks: int, *args: Any, timeout_s: float = 180.0) -> list[Any]:
    """Call `work(rank, *args)` on each of `ranks` forked processes in one gloo world; return what each returned.

    Results travel through files, so tensors and plain data only. A rank that fails or hangs ends all of them, with
    its traceback in the AssertionError.
    """
    with tempfile.TemporaryDirectory(prefix="ranks_") as folder:
        processes = [_FORK.Process(target=_rank, args=(Path(folder), rank, ranks, work, args)) for rank in range(ranks)]
        for process in processes:
            process.start()
        deadline = time.monotonic() + timeout_s
        while any(process.is_alive() for process in processes):
            late = time.monotonic() > deadline
            if late or any(process.exitcode not in (None, 0) for process in processes):
                for process in processes:
                    if process.is_alive():
                        os.kill(process.pid, signal.SIGUSR1 if late else signal.SIGKILL)  # type: ignore[arg-type]
                time.sleep(0.5)
                for process in processes:
                    process.kill()
            time.sleep(0.01)
        for process in processes:
            process.join()
        errors = [path.read_text() for path in sorted(Path(folder).glob("error_*"))]
        codes = [process.exitcode for process in processes]
        assert codes == [0] * ranks, f"exit codes {codes}\n" + "\n".join(errors)
        return [torch.load(Path(folder) / f"result_{rank}", weights_only=False) for rank in range(ranks)]


def _rank(folder: Path, rank: int, ranks: int, work: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks))
    torch.set_num_threads(1)
    with open(folder / f"error_{rank}", "w") as errors:
        faulthandler.register(signal.SIGUSR1, file=errors)  # where a hanging rank stands
        try:
            dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=ranks)
            torch.save(work(rank, *args), folder / f"result_{rank}")
            dist.barrier()
            dist.destroy_process_group()
        except BaseException:
            traceback.print_exc(file=errors)
            errors.flush()
            _leave(1)
    _leave(0)


def _leave(status: int) -> None:
    """Exit without the parent's exit handlers, and without leaving processes behind that a run started."""
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(status)
