"""Many nodes: the rendered jobs run on a real Slurm, where its programs are installed."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_hybrid.tools import preprocess
from megatron_hybrid.tools.cli import ToolError
from megatron_hybrid.tools.indexed_dataset import IndexedDatasetReader
from tests.slurm.cluster import Cluster
from tests.slurm.runs import make_site, submit, write_env

Command = Callable[..., str]


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


def test_array_is_drained_requeued_and_finished_on_a_real_slurm(
    tmp_path: Path, tokenizer_json: Path, command: Command, slurm: Cluster
) -> None:
    out = planned(tmp_path, tokenizer_json, command, documents=4000)
    words = ["slurm", "--output-dir", out, "--tasks", 2, "--workers", 1, "--time", "00:10:00"]
    command(*words, "--backend", "reference")
    text = subprocess.run(
        ["bash", str(out / "work" / "slurm" / "submit.sh")],
        capture_output=True,
        text=True,
        env=slurm.environment,
        check=True,
    ).stdout
    array = text.split()[1].rstrip(",")
    ledger = out / "work" / "ledger"
    deadline = time.monotonic() + 300
    while not (ledger.is_dir() and any(path.stat().st_size for path in ledger.iterdir())):
        assert time.monotonic() < deadline, slurm.output("squeue")
        time.sleep(0.2)
    subprocess.run(["scancel", "--batch", "--signal=USR1", f"{array}_0"], check=True, env=slurm.environment)
    requeued = False
    while not (out / "manifest.json").exists():
        assert time.monotonic() < deadline, slurm.output("squeue") + _logs(out)
        if not requeued and "queued again" in _logs(out):
            requeued = True
            slurm.start_now(f"{array}_0")
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


def test_an_env_file_prepares_data_on_a_real_slurm(tmp_path: Path, tokenizer_json: Path, slurm: Cluster) -> None:
    site = make_site(tmp_path / "site")
    lines = [json.dumps({"text": f"document {number}"}) for number in range(50)]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    words = f"--input {tmp_path}/in.jsonl --tokenizer-model {tokenizer_json} --append-eod --calibrate-seconds 0"
    env = write_env(tmp_path / "data.env", ["NAME=data", f"PREPROCESS=({words})"], {})
    done = submit("--site", site, env, environment=slurm.environment)
    assert done.returncode == 0 and "data: array " in done.stdout, done.stderr
    out = tmp_path / "site" / "tokens" / "data"
    slurm.wait(lambda: "whole;" in _logs(out), 300, lambda: _logs(out))
    assert json.loads((out / "manifest.json").read_text())["documents"] == 50
