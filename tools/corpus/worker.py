"""A worker: takes one work shard after another until none is left. It lives long, for loading a tokenizer is slow.

Run as a program it is one process of a pool: events go to stdout as lines of JSON, and it ends when its
stdin closes, so that no worker outlives the process that started it.
"""

import hashlib
import json
import os
import sys
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_hybrid.tools.cli import ToolError
from megatron_hybrid.tools.corpus.documents import LineParser
from megatron_hybrid.tools.corpus.encoders import (
    Encoder,
    fast_encoder,
    first_difference,
    probe_texts,
    reference_encoder,
)
from megatron_hybrid.tools.corpus.ledger import HEARTBEAT_SECONDS, Leases, Ledger, now_utc, process_identity
from megatron_hybrid.tools.corpus.plan import Plan, WorkShard, load_plan
from megatron_hybrid.tools.corpus.shard import BackendMismatch, Progress, RejectedUnderFail, ShardWork, stem
from megatron_hybrid.tools.corpus.streams import InputFault
from megatron_hybrid.tools.corpus.tokenizer_file import TokenizerFile

SHARD_FOLDER = "shards"
IDLE_SECONDS = 0.2  # between looks at the ledger while other workers do the last shards
REPORT_SECONDS = 0.5
Report = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Settings:
    """How a worker works; none of it changes a byte of the output."""

    on_error: str = "fail"
    backend: str = "auto"
    stall_seconds: float = 600.0  # a worker that reports nothing for so long is ended; 0: never


def plan_tokenizer(plan: Plan) -> TokenizerFile:
    """The tokenizer of a plan, read again; raises ToolError if the file is another one now."""
    recorded = plan.tokenizer
    path = Path(recorded["path"])
    content = path.read_bytes() if path.is_file() else b""
    file = TokenizerFile(**{**recorded, "special": tuple(recorded["special"]), "content": content})
    if hashlib.sha256(content).hexdigest() != file.sha256:
        raise ToolError(f"{path}: {'changed since the plan was made' if content else 'no such file'}; restore it")
    return file


def make_encoders(file: TokenizerFile, keep_special: bool, backend: str) -> tuple[Encoder, Encoder, str | None]:
    """(encoder to use, reference, what the fast one did wrong on the probe texts or None).

    A fast encoder that differs on a probe text is not used.
    """
    reference = reference_encoder(file, keep_special)
    fast = fast_encoder(file, keep_special, backend)
    if fast is None:
        return reference, reference, None
    difference = first_difference(fast, reference, probe_texts(file))
    return (reference if difference else fast), reference, difference


class Worker:
    """Does the shards of a plan that nobody else does."""

    def __init__(self, folder: Path, settings: Settings, report: Report) -> None:
        self.folder, self.settings, self.report = folder, settings, report
        self.plan = load_plan(folder)
        self.ledger = Ledger(folder, self.plan.fingerprint)
        self.leases = Leases(folder)
        self.tokenizer = plan_tokenizer(self.plan)
        keep = self.plan.options.special_tokens == "keep"
        self.encoder, self.reference, difference = make_encoders(self.tokenizer, keep, settings.backend)
        if difference:
            report({"event": "notice", "text": f"{difference}; the reference encoder is used instead"})
        self.parser = LineParser(self.plan.options)
        self.draining = False
        self._failed: set[int] = set()
        self._reported = 0.0
        # Large shards first, so that none of them is left alone at the end.
        self._order = sorted(self.plan.shards, key=lambda shard: (-shard.estimated_bytes, shard.index))
        (folder / SHARD_FOLDER).mkdir(exist_ok=True)

    def run(self) -> None:
        """Works until every shard is done or has failed here, or until told to drain."""
        heart = threading.Thread(target=self._beat, daemon=True)
        heart.start()
        while not self.draining:
            state = self.ledger.read()
            if self.encoder.name in state.stopped:
                self.encoder = self.reference
            left = [shard for shard in self._order if shard.index not in state.done]
            todo = [shard for shard in left if shard.index not in self._failed]
            if not todo:
                return
            shard = next((one for one in todo if self.leases.take(one.name)), None)
            if shard is None:
                self._say_often({"event": "idle"})
                time.sleep(IDLE_SECONDS)
                continue
            try:
                if shard.index not in self.ledger.read().done:  # it may have been done a moment ago
                    self._do(shard)
            finally:
                self.leases.give_back(shard.name)

    def _beat(self) -> None:
        while True:
            time.sleep(HEARTBEAT_SECONDS)
            self.leases.renew()

    def _do(self, shard: WorkShard) -> None:
        self.report({"event": "start", "shard": shard.index})
        try:
            record = self._attempt(shard)
        except BackendMismatch as mismatch:
            name = self.encoder.name
            self.ledger.append({"event": "backend_stopped", "encoder": name, "difference": str(mismatch)})
            self.report(
                {
                    "event": "notice",
                    "text": f"{shard.name}: {mismatch}; {name} is stopped, and every shard is done by the reference "
                    "encoder",
                }
            )
            self.encoder = self.reference
            record = self._attempt(shard)
        except RejectedUnderFail as error:
            self._failed.add(shard.index)
            self.report({"event": "failed", "shard": shard.index, "error": str(error), "stop": True})
            return
        except InputFault as error:
            self._failed.add(shard.index)
            self.ledger.append({"event": "failed", "shard": shard.index, "error": str(error), "time": now_utc()})
            stop = self.settings.on_error == "fail"
            self.report({"event": "failed", "shard": shard.index, "error": str(error), "stop": stop})
            return
        identity = {"id": uuid.uuid4().hex, "time": now_utc(), "process": process_identity()}
        self.ledger.append({"event": "done", **identity, **record})
        self.report({"event": "done", **{key: record[key] for key in ("shard", "tokens", "text_bytes", "documents")}})

    def _attempt(self, shard: WorkShard) -> dict[str, Any]:
        folder = self.folder / SHARD_FOLDER
        work = ShardWork(
            self.plan, shard, self.tokenizer, self.encoder, self.reference, self.parser, folder,
            self.settings.on_error, lambda progress: self._progress(shard, progress),
        )  # fmt: skip
        return work.run()

    def _progress(self, shard: WorkShard, progress: Progress) -> None:
        totals = vars(progress) | {"rejected": dict(progress.rejected)}
        self._say_often({"event": "progress", "shard": shard.index, **totals})

    def _say_often(self, event: dict[str, Any]) -> None:
        """Reports `event`, unless one was reported a moment ago."""
        now = time.monotonic()
        if now - self._reported > REPORT_SECONDS:
            self._reported = now
            self.report(event)


def shard_files_exist(folder: Path, shard: WorkShard, record: dict[str, Any]) -> bool:
    """Whether the files a ledger record speaks of are there, with their sizes."""
    prefix = folder / SHARD_FOLDER / stem(shard, record["reference"])
    for suffix in ("bin", "idx"):
        path = Path(f"{prefix}.{suffix}")
        if not path.is_file() or path.stat().st_size != record[suffix]["bytes"]:
            return False
    return True


def _end_with_parent() -> None:
    while os.read(0, 1):  # not sys.stdin: its lock would be held when the process ends
        pass
    os._exit(1)


def main() -> None:
    """One process of a pool: worker.py FOLDER SETTINGS-AS-JSON."""
    folder, settings = Path(sys.argv[1]), Settings(**json.loads(sys.argv[2]))
    threading.Thread(target=_end_with_parent, daemon=True).start()

    def report(event: dict[str, Any]) -> None:
        sys.stdout.write(json.dumps(event) + "\n")
        sys.stdout.flush()

    try:
        worker = Worker(folder, settings, report)
        _drain_on_signal(worker)
        worker.run()
    except (ToolError, OSError) as error:
        report({"event": "failed", "shard": None, "error": str(error), "stop": True})
        sys.exit(1)


def _drain_on_signal(worker: Worker) -> None:
    import signal

    def drain(number: int, frame: object) -> None:
        worker.draining = True

    signal.signal(signal.SIGTERM, drain)
    signal.signal(signal.SIGUSR1, drain)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides


if __name__ == "__main__":
    main()
