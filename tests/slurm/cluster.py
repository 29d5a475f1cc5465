"""A real Slurm of four nodes on this machine: one controller, four node daemons told apart by name and port."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

NODES = ("n1", "n2", "n3", "n4")
NEEDED = ("slurmctld", "slurmd", "sbatch", "munged")

_CONFIGURATION = """
ClusterName=t
SlurmctldHost={host}(127.0.0.1)
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CryptoType=crypto/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/ctld.pid
SlurmdPidFile={folder}/d-%n.pid
SlurmctldLogFile={folder}/ctld.log
SlurmdLogFile={folder}/d-%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
SlurmctldPort={ports[0]}
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
KillWait=5
MinJobAge=3600
PartitionName=main Nodes=ALL Default=YES MaxTime=60 State=UP
"""
_NODE = "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=8 State=UNKNOWN\n"


class Cluster:
    """Its clients' environment and the few commands that tests give."""

    def __init__(self, configuration: Path) -> None:
        self.environment = os.environ | {"SLURM_CONF": str(configuration)}

    def output(self, *words: str) -> str:
        """What a client prints, both streams; its exit status does not matter."""
        done = subprocess.run(words, capture_output=True, text=True, env=self.environment, check=False)
        return done.stdout + done.stderr

    def start_now(self, job: str) -> None:
        """A requeued job would wait for two minutes; started within the second of its end, it is refused and fails."""
        time.sleep(2)
        self.output("scontrol", "update", f"jobid={job}", "StartTime=now")

    def wait(self, done: Callable[[], object], seconds: float, what: Callable[[], str]) -> None:
        """Until `done`; AssertionError with the queue and `what` after so many seconds."""
        deadline = time.monotonic() + seconds
        while not done():
            assert time.monotonic() < deadline, self.output("squeue", "-a") + what()
            time.sleep(0.3)


def cannot_run() -> str:
    """Why no cluster can be started here; empty where one can."""
    missing = [name for name in NEEDED if not shutil.which(name)]
    if missing:
        return f"{', '.join(missing)} not found: install the packages slurm-wlm and munge"
    return "" if os.geteuid() == 0 else "a Slurm of one's own is started as root"


@contextlib.contextmanager
def running(folder: Path) -> Iterator[Cluster]:
    """The cluster, its state and logs in `folder`."""
    host = socket.gethostname().split(".")[0]
    ports = _free_ports(1 + len(NODES))
    for name in ("state", *(f"spool-{node}" for node in NODES)):
        (folder / name).mkdir(parents=True)
    configuration = folder / "slurm.conf"
    nodes = [_NODE.format(name=name, host=host, port=port) for name, port in zip(NODES, ports[1:], strict=True)]
    head, tail = _CONFIGURATION.format(host=host, folder=folder, ports=ports).rsplit("PartitionName", 1)
    configuration.write_text(head + "".join(nodes) + "PartitionName" + tail)
    cluster = Cluster(configuration)
    try:
        _start_munge(folder)
        subprocess.run(["slurmctld", "-f", str(configuration)], check=True, env=cluster.environment)
        for node in NODES:
            subprocess.run(["slurmd", "-N", node, "-f", str(configuration)], check=True, env=cluster.environment)
        idle = f"idle {len(NODES)}"
        cluster.wait(lambda: idle in cluster.output("sinfo", "-h", "-o", "%T %D"), 60, lambda: "")
        yield cluster
    finally:
        cluster.output("scancel", "--user=root")
        deadline = time.monotonic() + 15  # KillWait, and then some: a daemon does not end before its jobs
        while cluster.output("squeue", "-h").strip() and time.monotonic() < deadline:
            time.sleep(0.3)
        for path in (folder / name for name in ("ctld.pid", *(f"d-{node}.pid" for node in NODES), "munge.pid")):
            if path.exists():
                os.kill(int(path.read_text()), signal.SIGTERM)
        time.sleep(1)


def _start_munge(folder: Path) -> None:
    """One of this cluster's own: another cluster on the machine may end at any time."""
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    files = [f"--{name}-file={folder}/munge.{name}" for name in ("key", "log", "pid", "seed")]
    subprocess.run(["munged", "--force", f"--socket={folder}/munge.socket", *files], check=True, capture_output=True)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
