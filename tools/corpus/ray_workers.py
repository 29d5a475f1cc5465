"""The workers of a run as Ray actors, on any node of a cluster that sees the folder of the run.

Each runs the same Worker as a local process does: it takes shards by leases, so who does what needs no scheduler.
"""

import os
import queue
import threading
import time
from pathlib import Path
from typing import Any

from megatron_hybrid.tools.cli import ToolError
from megatron_hybrid.tools.corpus.pool import WORKER_ENVIRONMENT, PoolEvents
from megatron_hybrid.tools.corpus.worker import Settings, Worker

POLL_SECONDS = 0.5


class Host:
    """What runs inside an actor: a Worker in one thread, and its events asked for in others."""

    def __init__(self, folder: str, settings: Settings) -> None:
        self._folder, self._settings = Path(folder), settings
        self._events: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._worker: Worker | None = None
        self._draining = False

    def run(self) -> int:
        """Works until nothing is left; returns what a process would exit with."""
        try:
            self._worker = Worker(self._folder, self._settings, self._events.put)
            self._worker.draining = self._draining
            self._worker.run()
        except (ToolError, OSError) as error:
            self._events.put({"event": "failed", "shard": None, "error": str(error), "stop": True})
            return 1
        return 0

    def events(self) -> list[dict[str, Any]]:
        """What was reported since the last call."""
        found = []
        while not self._events.empty():
            found.append(self._events.get())
        return found

    def drain(self) -> None:
        """Lets the shard at work be the last."""
        self._draining = True
        if self._worker is not None:
            self._worker.draining = True


def connect(workers: int) -> None:
    """Joins the cluster that RAY_ADDRESS names, or starts one here for `workers`; raises ToolError if that fails."""
    try:
        import ray
    except ImportError:
        raise ToolError("--engine ray: Ray is not installed; pip install -e '.[ray]'") from None
    here = {} if os.environ.get("RAY_ADDRESS") else {"num_cpus": workers}
    try:
        ray.init(
            **here,
            ignore_reinit_error=True,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="error",
            runtime_env={"env_vars": WORKER_ENVIRONMENT},
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ToolError(f"--engine ray: no cluster ({error}); check RAY_ADDRESS, or unset it to start one") from error


class RayWorker:
    """One actor, seen by the pool as a process is."""

    def __init__(self, folder: Path, settings: Settings, events: PoolEvents) -> None:
        import ray

        self.shard: int | None = None
        self.heard = time.monotonic()
        self.silent = False
        # run(), events() and drain() at the same time; a dead actor is replaced by the pool, which counts
        options = {"num_cpus": 1, "max_concurrency": 3, "max_restarts": 0}
        self._actor = ray.remote(**options)(Host).remote(str(folder.resolve()), settings)
        self._run = self._actor.run.remote()
        self._thread = threading.Thread(target=self._listen, args=(events,), daemon=True)
        self._thread.start()

    def _listen(self, events: PoolEvents) -> None:
        import ray

        status: int | str = 0
        try:
            while True:
                finished, _ = ray.wait([self._run], timeout=POLL_SECONDS)
                for event in ray.get(self._actor.events.remote()):
                    events.put((self, event))
                if finished:
                    status = ray.get(self._run)
                    break
        except ray.exceptions.RayError as error:
            status = f"of Ray: {str(error).splitlines()[0]}"
        events.put((self, {"event": "gone", "status": status}))
        ray.kill(self._actor)

    def drain(self) -> None:
        """Lets the shard at work be the last."""
        self._actor.drain.remote()

    def kill(self) -> None:
        """Ends the actor at once."""
        import ray

        ray.kill(self._actor)

    def wait(self) -> None:
        """Returns when the actor is gone."""
        self._thread.join()
