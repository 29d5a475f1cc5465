"""Killed at any moment and started again, a run ends with the bytes of an undisturbed one; two runs never mix."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_hybrid.tools.cli import ToolError
from megatron_hybrid.tools.corpus import ledger as ledger_module
from megatron_hybrid.tools.corpus.ledger import Leases, Ledger, enter_run
from megatron_hybrid.tools.preprocess import parser, run

KILLS = int(os.environ.get("MEGATRON_HYBRID_TEST_KILLS", "6"))  # 50 takes minutes; see docs/data.md
TOOL = [sys.executable, "-m", "megatron_hybrid.tools.preprocess"]


def write_corpus(folder: Path) -> Path:
    """Files with good and bad lines, enough for some seconds of work in many shards."""
    folder.mkdir()
    source = random.Random(3)
    words = ["quick", "brown", "fox", "lazy", "dog", "sleeps", "漢字", "\n", "12345"]
    for number in range(6):
        lines = [json.dumps({"id": at, "text": " ".join(source.choices(words, k=60))}).encode() for at in range(800)]
        lines[700] = b'{"text": null}'
        (folder / f"{number}.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    return folder


def command(corpus: Path, tokenizer: Path, output: list[str], workers: int) -> list[str]:
    options = ["--append-eod", "--on-error", "quarantine", "--metadata-keys", "id", "--shard-bytes", "64K"]
    options += ["--backend", "reference"]  # slow enough for the kills to find something to interrupt
    return [
        *TOOL,
        *output,
        "--input",
        str(corpus),
        "--tokenizer-model",
        str(tokenizer),
        *options,
        "--workers",
        str(workers),
    ]


def outputs(folder: Path) -> dict[str, bytes]:
    """All final files: everything but the folder of plan and ledger."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


@pytest.mark.parametrize(("kind", "workers"), [("one-dataset", 2), ("folder", 1)])
def test_killed_runs_end_with_the_same_bytes(tmp_path: Path, tokenizer_json: Path, workers: int, kind: str) -> None:
    corpus = write_corpus(tmp_path / "corpus")
    flag = "--output-prefix" if kind == "one-dataset" else "--output-dir"
    calm, storm = tmp_path / "calm", tmp_path / "storm"
    name = "data" if kind == "one-dataset" else ""
    started = time.monotonic()
    subprocess.run(command(corpus, tokenizer_json, [flag, str(calm / name)], 1), check=True, capture_output=True)
    duration = time.monotonic() - started
    expected = outputs(calm)
    assert any(".bin" in name for name in expected) and any("rejects" in name for name in expected)
    source = random.Random(workers)
    kills = finished = 0
    words = command(corpus, tokenizer_json, [flag, str(storm / name)], workers)
    while not finished or kills < KILLS / 2:
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        moment = source.uniform(0.15, 0.7 * duration) if kills < KILLS / 2 else None
        try:
            _, errors = process.communicate(timeout=moment)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            kills += 1
        else:
            assert process.returncode == 0, errors
            assert outputs(storm) == expected
            shutil.rmtree(storm)
            finished += 1


def test_killed_worker_is_replaced(tmp_path: Path, tokenizer_json: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus")
    output = ["--output-prefix", str(tmp_path / "data")]
    process = subprocess.Popen(
        command(corpus, tokenizer_json, output, 2), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    leases = tmp_path / "data.work" / "leases"
    killed = None
    while killed is None and process.poll() is None:
        for path in leases.glob("s0*") if leases.is_dir() else ():
            holder = path.read_text().split("/") if path.exists() else []
            if len(holder) > 1 and int(holder[1]) != process.pid:
                killed = int(holder[1])
                os.kill(killed, signal.SIGKILL)
                break
        time.sleep(0.01)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "a worker died (status -9) at shard" in errors and "another takes over" in errors


def start_with_fault(folder: Path, corpus: Path, tokenizer: Path, fault: str, workers: int) -> "subprocess.Popen[str]":
    """Starts a run whose workers do `fault` at shard 1, under a watchdog of some seconds."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(
        "import os, sys, time\n"
        "import megatron_hybrid.tools.corpus.shard as shard\n"
        "old = shard.ShardWork.run\n"
        "def run(work):\n"
        "    if work.shard.index == 1:\n"
        f"        {fault}\n"
        "    return old(work)\n"
        "shard.ShardWork.run = run\n"
    )
    environment = os.environ | {"PYTHONPATH": f"{folder}:{os.environ.get('PYTHONPATH', '')}"}
    words = command(corpus, tokenizer, ["--output-prefix", str(folder / "data")], workers)
    return subprocess.Popen(
        [*words, "--stall-seconds", "8"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


def test_workers_that_die_hang_or_end_silently_never_hang_the_run(tmp_path: Path, tokenizer_json: Path) -> None:
    corpus, mark = write_corpus(tmp_path / "corpus"), str(tmp_path / "mark")
    quiet = f"time.sleep(1000) if os.path.exists({mark!r}) else (open({mark!r}, 'w').close(), os._exit(0))"
    faults = {  # workers, what they do, what the run says
        "die": (2, "os.kill(os.getpid(), 9)", ["shard 1 (", "2 workers died at it, the last with status -9"]),
        "end as if all was well, then hang while the heart beats": (
            2,
            quiet,
            [
                "a worker died (status 0) at shard 1; another takes over",
                "2 workers died at it, the last with 8 s without a sign of life",
            ],
        ),
        "hang, alone": (1, "time.sleep(1000)", ["Timeout (0:00:08)", "sitecustomize.py"]),
    }
    runs = [
        start_with_fault(tmp_path / str(number), corpus, tokenizer_json, fault, workers)
        for number, (workers, fault, _) in enumerate(faults.values())
    ]
    for process, (what, (_, _, messages)) in zip(runs, faults.items(), strict=True):
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 1, what
        assert all(message in errors for message in messages), (what, errors)


def test_two_runs_in_one_folder_refuse_each_other(tmp_path: Path, tokenizer_json: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus")
    words = command(corpus, tokenizer_json, ["--output-dir", str(tmp_path / "out")], 1)
    first = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    leases = tmp_path / "out" / "work" / "leases"
    while not (leases.is_dir() and list(leases.glob("run.*"))):
        assert first.poll() is None
        time.sleep(0.01)
    second = subprocess.run(words, capture_output=True, text=True, check=False)
    assert second.returncode == 1 and "another run is at work there (process " in second.stderr
    assert first.wait(timeout=120) == 0
    assert subprocess.run(words, capture_output=True, check=False).returncode == 0


def test_leftovers_of_dead_workers_go_and_files_of_live_ones_stay(tmp_path: Path) -> None:
    from megatron_hybrid.tools.corpus.pool import _remove_leftovers

    leases = Leases(tmp_path)
    leases.take("s000001")
    (tmp_path / "leases" / "s000002").write_text(dead_process())
    (tmp_path / "shards").mkdir()
    names = [f"s00000{number}.bin.tmp.host.{number}" for number in range(3)]
    for name in (*names, "s000000.bin"):
        (tmp_path / "shards" / name).touch()
    _remove_leftovers(tmp_path, leases)
    assert sorted(path.name for path in (tmp_path / "shards").iterdir()) == ["s000000.bin", names[1]]


# ---- the ledger ----


def test_ledger_ignores_lines_cut_short_and_damaged(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, "plan")
    for shard in range(3):
        ledger.append({"event": "done", "shard": shard, "id": str(shard), "reference": True, "encoder": "x"})
    (path,) = (tmp_path / "ledger").iterdir()
    content = path.read_bytes()
    lines = content.splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[1].replace(b'"shard":1', b'"shard":7') + lines[2][:-5])
    state = Ledger(tmp_path, "plan").read()
    assert (sorted(state.done), state.bad_lines) == ([0], 1)
    assert Ledger(tmp_path, "another plan").read().done == {}


def test_ledger_is_read_on_as_others_write(tmp_path: Path) -> None:
    reader, one, other = (Ledger(tmp_path, "plan") for _ in range(3))
    one.append({"event": "done", "shard": 0, "id": "a", "reference": False, "encoder": "fast 1"})
    assert sorted(reader.read().done) == [0]
    other.append({"event": "backend_stopped", "encoder": "fast 1", "difference": "d"})
    assert reader.read().done == {}
    one.append({"event": "done", "shard": 0, "id": "b", "reference": True, "encoder": "slow 1"})
    assert reader.read().done[0]["id"] == "b"
    other.append({"event": "lost", "id": "b"})
    assert reader.read().done == {}


def test_recorded_shard_whose_file_is_gone_is_done_again(tmp_path: Path, tokenizer_json: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus")
    words = command(corpus, tokenizer_json, ["--output-prefix", str(tmp_path / "data")], 1)[3:]
    args = parser().parse_args(words)
    from megatron_hybrid.tools import preprocess as tool

    args.on_error = "skip"
    tool.make_or_load_plan(args)
    from megatron_hybrid.tools.corpus.pool import run_plan
    from megatron_hybrid.tools.corpus.worker import Settings

    state = run_plan(tmp_path / "data.work", Settings("skip", "auto"), 1, "here")
    ids = {shard: record["id"] for shard, record in state.done.items()}
    (tmp_path / "data.work" / "shards" / "s000002.bin").unlink()
    again = run_plan(tmp_path / "data.work", Settings("skip", "auto"), 1, "here")
    assert {shard for shard, record in again.done.items() if record["id"] != ids[shard]} == {2}
    assert run(args)["lines"] == 4800


# ---- leases ----


def dead_process() -> str:
    """The identity of a process of this host that is gone."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    identity = ledger_module.process_identity(process.pid)
    process.communicate(b"\n")
    return identity


def test_lease_excludes_a_live_process_and_not_a_dead_one(tmp_path: Path) -> None:
    one, other = Leases(tmp_path), Leases(tmp_path)
    assert one.take("s1") and not other.take("s1")
    one.give_back("s1")
    assert other.take("s1")
    (tmp_path / "leases" / "s2").write_text(dead_process())
    assert one.take("s2")
    host, pid, started = ledger_module.process_identity().split("/")
    (tmp_path / "leases" / "s3").write_text(f"{host}/{pid}/{int(started) - 1}")  # the number is used again
    assert one.take("s3")


@pytest.mark.parametrize(("age_s", "free"), [(5, False), (1000, True)])
def test_lease_of_another_host_is_free_once_it_is_not_renewed(tmp_path: Path, age_s: int, free: bool) -> None:
    leases = Leases(tmp_path)
    path = tmp_path / "leases" / "s1"
    path.write_text("elsewhere/1/1")
    os.utime(path, (time.time() - age_s,) * 2)
    assert leases.take("s1") == free


def test_renewed_lease_stays(tmp_path: Path) -> None:
    leases = Leases(tmp_path)
    leases.take("s1")
    os.utime(tmp_path / "leases" / "s1", (0, 0))
    leases.renew()
    assert time.time() - (tmp_path / "leases" / "s1").stat().st_mtime < 60


def test_processes_of_one_run_join_and_others_are_refused(tmp_path: Path) -> None:
    enter_run(Leases(tmp_path), "job-1")
    (tmp_path / "leases" / "run.job-1.elsewhere.1").write_text("elsewhere/1/1")
    enter_run(Leases(tmp_path), "job-1")
    with pytest.raises(ToolError, match="another run is at work there"):
        enter_run(Leases(tmp_path), "job-2")


def test_progress_line_says_speed_time_left_and_rejects(tmp_path: Path, tokenizer_json: Path) -> None:
    from megatron_hybrid.tools.corpus.inputs import find_inputs
    from megatron_hybrid.tools.corpus.plan import Options, make_plan
    from megatron_hybrid.tools.corpus.pool import ProgressLine
    from megatron_hybrid.tools.corpus.tokenizer_file import load_tokenizer_file

    (tmp_path / "in.jsonl").write_bytes(b'{"text": "a"}\n' * 10_000)
    tokenizer = load_tokenizer_file(tokenizer_json)
    plan = make_plan(find_inputs([str(tmp_path / "in.jsonl")])[0], tokenizer, Options(shard_bytes=50_000))
    line = ProgressLine(plan, ledger_module.LedgerState())
    event: dict[str, Any] = {"shard": 0, "tokens": 10**6, "text_bytes": 70_000, "documents": 5}
    line.take({"event": "progress", **event, "rejected": {"empty_text": 2}})
    text = line.line(2.0)
    assert "0.0 MB/s of text, 0.50 M tokens/s, 0.0 min left, rejected: empty_text 2" in text
    line.take({"event": "done", **event})
    assert "shards 1/3" in line.line(2.0) and "empty_text 2" in line.line(2.0)
