"""Many nodes: the rendered jobs run on a real Slurm of two nodes on this machine, where its programs are installed."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron_hybrid.tools import preprocess
from megatron_hybrid.tools.cli import ToolError
from megatron_hybrid.tools.indexed_dataset import IndexedDatasetReader

NEEDED = ("slurmctld", "slurmd", "sbatch", "munged")
PORTS = (16817, 16821, 16822)
Command = Callable[..., str]

CONFIGURATION = """
ClusterName=t
SlurmctldHost={host}(127.0.0.1)
AuthType=auth/munge
CryptoType=crypto/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/ctld.pid
SlurmdPidFile={folder}/d-%n.pid
SlurmctldLogFile={folder}/ctld.log
SlurmdLogFile={folder}/d-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
SlurmctldPort={ports[0]}
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
KillWait=5
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 State=UNKNOWN
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=60 State=UP
"""


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    def run(*words: object) -> str:
        monkeypatch.setattr("sys.argv", ["preprocess", *map(str, words)])
        preprocess.main()
        return capsys.readouterr().out

    return run


def planned(tmp_path: Path, tokenizer_json: Path, command: Command, documents: int = 300) -> Path:
    """A plan of 36 shards over documents of 3 kB; its folder."""
    lines = [json.dumps({"text": f"document {number} " + "of words " * 330}) for number in range(documents)]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    out = tmp_path / "out"
    words = ["plan", "--input", tmp_path / "in.jsonl", "--output-dir", out, "--tokenizer-model", tokenizer_json]
    command(*words, "--append-eod", "--shard-bytes", str(documents * 3000 // 36), "--calibrate-seconds", "0")
    return out


def test_rendered_scripts_are_shell_and_say_what_was_asked(
    tmp_path: Path, tokenizer_json: Path, command: Command
) -> None:
    out = planned(tmp_path, tokenizer_json, command)
    words = ["slurm", "--output-dir", out, "--tasks", 4, "--workers", 2, "--time", "01:00:00", "--partition", "cpu"]
    assert "start: bash" in command(*words, "--on-error", "skip")
    folder = out / "work" / "slurm"
    text = (folder / "array.sbatch").read_text()
    for line in (
        "--array=0-3",
        "--cpus-per-task=2",
        "--time=01:00:00",
        "--partition=cpu",
        "--requeue",
        "--signal=B:USR1@300",
    ):
        assert f"#SBATCH {line}\n" in text
    assert "--on-error skip" in text and "finish --output-dir" in (folder / "finish.sbatch").read_text()
    for name in ("array.sbatch", "finish.sbatch", "submit.sh"):
        subprocess.run(["bash", "-n", str(folder / name)], check=True)
    with pytest.raises(ToolError, match=r"no plan\.json; make one with"):
        command("slurm", "--output-dir", tmp_path / "none", "--tasks", 4, "--time", "1")


@pytest.mark.parametrize("workers", [1, 2])
def test_signal_drains_and_the_next_start_goes_on(
    tmp_path: Path, tokenizer_json: Path, command: Command, workers: int
) -> None:
    out = planned(tmp_path, tokenizer_json, command, documents=2000)
    words = [sys.executable, "-m", "megatron_hybrid.tools.preprocess", "work", "--output-dir", str(out)]
    words += ["--workers", str(workers), "--backend", "reference"]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    ledger = out / "work" / "ledger"
    while not (ledger.is_dir() and any(path.stat().st_size for path in ledger.iterdir())):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGUSR1)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    assert "stopped as asked" in errors
    state = command("status", "--output-dir", out)
    assert "in: 0/" not in state and not list((out / "work" / "leases").glob("[!.]*"))
    command("work", "--output-dir", out)
    assert "2,000 lines = 2,000 documents" in command("finish", "--output-dir", out)


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[dict[str, str]]:
    """A cluster of two nodes on this machine; the environment its clients need."""
    missing = [name for name in NEEDED if not shutil.which(name)]
    if missing or os.geteuid() != 0:
        pytest.skip(f"needs root and {', '.join(missing) or 'nothing more'}: packages slurm-wlm and munge")
    host = socket.gethostname().split(".")[0]
    folder = tmp_path / "slurm"
    for name in ("state", "spool-n1", "spool-n2"):
        (folder / name).mkdir(parents=True)
    configuration = folder / "slurm.conf"
    configuration.write_text(CONFIGURATION.format(host=host, folder=folder, ports=PORTS))
    environment = os.environ | {"SLURM_CONF": str(configuration)}
    started_munge = not Path("/run/munge/munged.pid").exists()
    Path("/run/munge").mkdir(exist_ok=True)
    shutil.chown("/run/munge", "munge", "munge")
    subprocess.run(["munged", "--force"], check=False, capture_output=True)
    subprocess.run(["slurmctld", "-f", str(configuration)], check=True, env=environment)
    for node in ("n1", "n2"):
        subprocess.run(["slurmd", "-N", node, "-f", str(configuration)], check=True, env=environment)
    try:
        deadline = time.monotonic() + 60
        while "idle" not in (text := _output(["sinfo", "-h", "-o", "%T %D"], environment)) or "idle 2" not in text:
            assert time.monotonic() < deadline, text
            time.sleep(0.3)
        yield environment
    finally:
        pid_files = [folder / "ctld.pid", folder / "d-n1.pid", folder / "d-n2.pid"]
        for path in [*pid_files, *([Path("/run/munge/munged.pid")] if started_munge else [])]:
            if path.exists():
                os.kill(int(path.read_text()), signal.SIGTERM)
        time.sleep(1)


def _output(words: list[str], environment: dict[str, str]) -> str:
    return subprocess.run(words, capture_output=True, text=True, env=environment, check=False).stdout


def test_array_is_drained_requeued_and_finished_on_a_real_slurm(
    tmp_path: Path, tokenizer_json: Path, command: Command, slurm: dict[str, str]
) -> None:
    out = planned(tmp_path, tokenizer_json, command, documents=4000)
    words = ["slurm", "--output-dir", out, "--tasks", 2, "--workers", 1, "--time", "00:10:00"]
    command(*words, "--backend", "reference")
    text = subprocess.run(
        ["bash", str(out / "work" / "slurm" / "submit.sh")], capture_output=True, text=True, env=slurm, check=True
    ).stdout
    array = text.split()[1].rstrip(",")
    ledger = out / "work" / "ledger"
    deadline = time.monotonic() + 90
    while not (ledger.is_dir() and any(path.stat().st_size for path in ledger.iterdir())):
        assert time.monotonic() < deadline, _output(["squeue"], slurm)
        time.sleep(0.2)
    subprocess.run(["scancel", "--batch", "--signal=USR1", f"{array}_0"], check=True, env=slurm)
    requeued = False
    while not (out / "manifest.json").exists():
        assert time.monotonic() < deadline, _output(["squeue"], slurm) + _logs(out)
        if not requeued and "queued again" in _logs(out):
            requeued = True
            # A requeued job waits for two minutes otherwise.
            subprocess.run(["scontrol", "update", f"jobid={array}_0", "StartTime=now"], check=False, env=slurm)
        time.sleep(0.3)
    assert requeued, _logs(out)
    content = json.loads((out / "manifest.json").read_text())
    assert (content["lines"], content["documents"]) == (4000, 4000)
    while "whole;" not in _logs(out):
        assert time.monotonic() < deadline, _logs(out)
        time.sleep(0.3)
    total = sum(len(IndexedDatasetReader(out / entry["prefix"])) for entry in content["datasets"])
    assert total == 4000


def _logs(out: Path) -> str:
    return "\n".join(path.read_text() for path in sorted((out / "work" / "slurm").glob("*.log")))
