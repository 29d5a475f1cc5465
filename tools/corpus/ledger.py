"""The append-only record of a run, and the leases that keep two processes off one work shard.

Every process appends to a file of its own, one checksummed line per event, flushed to disk. A line cut
short by a crash is no line. A work shard without a valid line is not done, whatever files there are.
"""

import json
import os
import socket
import time
import uuid
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from megatron_hybrid.tools.atomic_file import flush_to_disk, fsync_folder
from megatron_hybrid.tools.cli import ToolError

LEDGER_FOLDER, LEASE_FOLDER = "ledger", "leases"
HEARTBEAT_SECONDS = 10.0
STALE_SECONDS = 120.0  # a lease of another host that was not renewed for so long is free


def process_identity(pid: int | None = None) -> str:
    """'<host>/<pid>/<start time>': names a process for good, unlike a pid alone."""
    pid = os.getpid() if pid is None else pid
    try:
        started = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        started = "0"
    return f"{socket.gethostname()}/{pid}/{started}"


@dataclass
class LedgerState:
    """What the ledger says, for one plan."""

    done: dict[int, dict[str, Any]] = field(default_factory=dict)
    failed: dict[int, str] = field(default_factory=dict)
    stopped: dict[str, str] = field(default_factory=dict)  # encoder -> in what it differed from the reference
    bad_lines: int = 0


class Ledger:
    """Appends events, and reads those of all processes. Cheap to read often: only what is new is read."""

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self.folder = folder / LEDGER_FOLDER
        self.fingerprint = fingerprint
        self._handle: BinaryIO | None = None
        self._offsets: dict[str, int] = {}
        self._records: dict[int, list[dict[str, Any]]] = {}
        self._lost: set[str] = set()
        self._state = LedgerState()

    def append(self, event: dict[str, Any]) -> None:
        """Adds one event; when this returns, it is on disk."""
        if self._handle is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self.folder / f"{socket.gethostname()}.{os.getpid()}.{uuid.uuid4().hex[:8]}.jsonl"
            self._handle = open(path, "ab", buffering=0)  # noqa: SIM115 - open as long as the process lives
            fsync_folder(self.folder)
        content = json.dumps(event | {"fingerprint": self.fingerprint}, separators=(",", ":")).encode()
        self._handle.write(b"%08x %s\n" % (zlib.crc32(content), content))
        flush_to_disk(self._handle)

    def read(self) -> LedgerState:
        """The state after all events that are whole."""
        names = sorted(os.listdir(self.folder)) if self.folder.is_dir() else []
        for name in names:
            with open(self.folder / name, "rb") as handle:
                handle.seek(self._offsets.get(name, 0))
                data = handle.read()
            whole = data.rfind(b"\n") + 1
            self._offsets[name] = self._offsets.get(name, 0) + whole
            for line in data[:whole].splitlines():
                self._take(line)
        self._settle()
        return self._state

    def _take(self, line: bytes) -> None:
        checksum, _, content = line.partition(b" ")
        if checksum != b"%08x" % zlib.crc32(content):
            self._state.bad_lines += 1
            return
        event = json.loads(content)
        if event["fingerprint"] != self.fingerprint:
            return
        kind = event["event"]
        if kind == "done":
            self._records.setdefault(event["shard"], []).append(event)
        elif kind == "lost":
            self._lost.add(event["id"])
        elif kind == "failed":
            self._state.failed[event["shard"]] = event["error"]
        elif kind == "backend_stopped":
            self._state.stopped[event["encoder"]] = event["difference"]

    def _settle(self) -> None:
        """A shard is done by its first record that no stopped encoder made and whose files are not lost."""
        self._state.done.clear()
        for shard, records in self._records.items():
            valid = [
                one
                for one in records
                if one["id"] not in self._lost and (one["reference"] or one["encoder"] not in self._state.stopped)
            ]
            if valid:
                self._state.done[shard] = valid[0]
                self._state.failed.pop(shard, None)


class Leases:
    """Files that say which process works on what; renewed by `renew`, free once their process is gone."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / LEASE_FOLDER
        self.folder.mkdir(parents=True, exist_ok=True)
        self._mine: set[str] = set()
        self._identity = process_identity()

    def take(self, name: str) -> bool:
        """Takes the lease `name`, from a dead holder too; False if a live process has it."""
        path = self.folder / name
        for _ in range(2):
            try:
                descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
            except FileExistsError:
                if self.is_live(name):
                    return False
                self._remove(path)
                continue
            with os.fdopen(descriptor, "w") as handle:
                handle.write(self._identity)
            self._mine.add(name)
            return True
        return False

    def _remove(self, path: Path) -> None:
        """Takes a stale lease away; of several processes that try, one succeeds."""
        grave = path.with_name(f".{path.name}.{os.getpid()}.stale")
        try:
            os.rename(path, grave)
            os.unlink(grave)
        except FileNotFoundError:
            pass

    def give_back(self, name: str) -> None:
        """Frees a lease of this process."""
        self._mine.discard(name)
        (self.folder / name).unlink(missing_ok=True)

    def renew(self) -> None:
        """Says that this process is alive; to be called every HEARTBEAT_SECONDS."""
        for name in list(self._mine):
            try:
                os.utime(self.folder / name)
            except FileNotFoundError:
                self._mine.discard(name)

    def is_live(self, name: str) -> bool:
        """Whether the process that holds `name` still runs, as far as this host can tell."""
        path = self.folder / name
        try:
            holder = path.read_text()
            age = self._file_system_now() - path.stat().st_mtime
        except FileNotFoundError:
            return False
        host, _, rest = holder.partition("/")
        if host == socket.gethostname() and rest:
            return process_identity(int(rest.partition("/")[0])) == holder
        return age < STALE_SECONDS

    def _file_system_now(self) -> float:
        """The time by the clock of the file system, which need not be this host's."""
        probe = self.folder / f".now.{os.getpid()}"
        probe.touch()
        os.utime(probe)
        now = probe.stat().st_mtime
        probe.unlink(missing_ok=True)
        return now

    def holders(self, prefix: str) -> list[str]:
        """Names of the leases that start with `prefix` and are live, those of this process aside."""
        return [
            name
            for name in sorted(os.listdir(self.folder))
            if name.startswith(prefix) and name not in self._mine and self.is_live(name)
        ]


def enter_run(leases: Leases, run_id: str) -> str:
    """Registers this process as part of run `run_id` in a folder; returns the name of its lease.

    Raises ToolError if processes of another run are at work there. Of two runs that start at the
    same moment at least one is refused.
    """
    name = f"run.{run_id}.{socket.gethostname()}.{os.getpid()}"
    leases.take(name)
    others = [other for other in leases.holders("run.") if not other.startswith(f"run.{run_id}.")]
    if others:
        leases.give_back(name)
        holder = (leases.folder / others[0]).read_text().split("/")
        raise ToolError(
            f"{leases.folder.parent}: another run is at work there (process {holder[1]} on {holder[0]}); wait for it, "
            "stop it, or choose another output"
        )
    return name


def now_utc() -> str:
    """The time for records of the ledger."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
