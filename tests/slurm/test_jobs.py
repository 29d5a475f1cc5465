"""Real jobs on a real Slurm, all at once: a chain (one preempted, one on a bad node, one killed), an array, others."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.runs import make_site, submit, training, write_env

TOKEN = "hf_notASecretButItCouldBe"

#: Refuses the node that it is run on first, whenever it is run there. Says which variables it sees.
HOOK = """
echo "${{HF_TOKEN:+passed}} ${{AWS_SECRET_ACCESS_KEY:+leaked}}" >{seen}.environment
[ -e {seen} ] || echo "$SLURMD_NODENAME" >{seen}
[ "$(cat {seen})" != "$SLURMD_NODENAME" ] || {{ echo "a fan stands still"; exit 1; }}
"""

PRESETS = ("ladder-60m-3to1", "ladder-60m-gdn")


class Jobs:
    """What was submitted, and what it left behind."""

    def __init__(self, slurm: Cluster, folder: Path) -> None:
        self.slurm, self.runs = slurm, folder / "runs"

    def log(self, name: str) -> str:
        return "\n".join(path.read_text() for path in sorted((self.runs / name / "logs").glob("*.log")))

    def checkpoints(self, name: str) -> Path:
        return self.runs / name / "checkpoints"

    def until(self, done: Callable[[], object], seconds: float = 600) -> None:
        """Requeued jobs are not left to wait for two minutes."""

        def look() -> object:
            for line in self.slurm.output("squeue", "-h", "-t", "PD", "-o", "%A %r").splitlines():
                job, reason = line.split(None, 1)
                if reason == "BeginTime":
                    self.slurm.start_now(job)
            return done()

        self.slurm.wait(look, seconds, lambda: "\n".join(f"{p}:\n{p.read_text()}" for p in self.runs.rglob("*.log")))

    def status(self, name: str) -> str:
        """The exit status of the job, as Slurm has it."""
        (job,) = (
            line for line in self.slurm.output("scontrol", "show", "job", "-o").splitlines() if f"={name} " in line
        )
        return job.split("ExitCode=")[1].split()[0]

    def trainers(self, name: str) -> list[int]:
        """Processes of torchrun's workers, not torchrun, srun or the batch script."""
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                words = path.read_bytes().decode().split("\0")
            except OSError:
                continue
            if str(self.checkpoints(name)) in words and words[1:4] == ["-u", "-m", "megatron_hybrid.pretrain"]:
                found.append(int(path.parent.name))
        return found


@pytest.fixture(scope="module")
def jobs(slurm: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    """Submits everything, does to it what clusters do, and returns when all have ended."""
    folder = tmp_path_factory.mktemp("launch")
    site = make_site(folder)
    hook = folder / "hook.sh"
    hook.write_text(HOOK.format(seen=folder / "seen"))
    second = folder / "second.sh"  # of the first three nodes; the trainers are on n1 and n3
    second.write_text('[ "$SLURMD_NODENAME" != n2 ]')
    after = {"START": "from", "FROM": "$RUNS/pretrain/checkpoints", "AFTER": "(pretrain)"}
    average = '(python -m megatron_hybrid.checkpoint.average --checkpoint "$RUNS/one/checkpoints" --checkpoint '
    average += '"$RUNS/two/checkpoints" --output "$RUNS/soup/checkpoints" --without-optimizer)'
    export = '(python -m megatron_hybrid.tools.convert export --checkpoint "$RUNS/soup/checkpoints" --output '
    export += '"$RUNS/convert/huggingface")'
    soup, hf = ({"MAKES": f'("$RUNS/{path}")'} for path in ("soup/checkpoints", "convert/huggingface"))
    chain = [
        training(folder, "pretrain", 4, 10, NODES="2", SPARE_NODES="1", PRECHECK_HOOK=str(second), EXCLUDE_HOURS="0"),
        training(folder, "one", 2, 10, **after, PRECHECK_HOOK=str(hook)),
        training(folder, "two", 40, 4, **after),
        write_env(
            folder / "soup.env", ["NAME=soup", "RUN=$RUNS/soup", "AFTER=(one two)"], {"COMMAND": average, **soup}
        ),
        write_env(
            folder / "convert.env", ["NAME=convert", "RUN=$RUNS/convert", "AFTER=(soup)"], {"COMMAND": export, **hf}
        ),
    ]
    chain[1].write_text(chain[1].read_text() + "PASS_ENV=(HF_TOKEN)\n")
    periods = "--wsds-periods 2 --lr-decay-style WSD --lr-wsd-decay-iters 1"
    array = training(folder, "array", 2, 10, periods, ARRAY=f"({' '.join(PRESETS)})")
    others = [training(folder, "leaves", 4, 10, "--exit-interval 1"), training(folder, "unwanted", 4, 10)]
    gone = folder / "gone.sh"  # after the checks of submission, before the trainer's
    gone.write_text(f"rm -f {folder}/tokens/gone.idx")
    for suffix in ("bin", "idx"):
        shutil.copy(folder / "tokens" / f"text.{suffix}", folder / "tokens" / f"gone.{suffix}")
    others += [training(folder, "fails", 4, 10, DATA='("$DATA_ROOT/gone")', PRECHECK_HOOK=str(gone))]
    unfit = folder / "unfit.sh"
    unfit.write_text("echo unfit; exit 1")
    others += [training(folder, "unfit", 4, 10, MAX_REQUEUES="0", PRECHECK_HOOK=str(unfit))]
    stop = folder / "runs" / "unwanted" / "checkpoints" / "STOP"
    stop.parent.mkdir(parents=True)
    stop.write_text("please, no\n")
    environment = slurm.environment | {"HF_TOKEN": TOKEN, "AWS_SECRET_ACCESS_KEY": TOKEN, "NODES": "7"}
    for files in ([array], others, chain):  # the run that is to be preempted last: it must not be over by then
        done = submit("--site", site, *files, environment=environment)
        assert done.returncode == 0, done.stdout + done.stderr
    jobs = Jobs(slurm, folder)
    jobs.until(lambda: len(jobs.trainers("pretrain")) == 2)  # and seconds from its first step
    (batch,) = slurm.output("squeue", "-h", "--name=pretrain", "-o", "%A").split()
    slurm.output("scancel", "--batch", "--signal=USR1", batch)
    jobs.until(lambda: (jobs.checkpoints("two") / "iter_0000004" / "COMPLETE").exists())
    for process in jobs.trainers("two"):
        os.kill(process, signal.SIGKILL)
    jobs.until(lambda: not slurm.output("squeue", "-h").strip())
    return jobs


def _ended(folder: Path, name: str = "TRAINING_COMPLETE") -> int:
    return int(json.loads((folder / name).read_text())["iteration"])


def test_preempted_by_signal_saved_requeued_and_resumed(jobs: Jobs) -> None:
    log = jobs.log("pretrain")
    assert "stopped with a checkpoint (the stop file); checkpoint 1, -1 at the start; queued again" in log
    assert len(re.findall("pre-check: n2 failed", log)) == 2 and len(re.findall("pre-check: n1,n3 good", log)) == 2
    assert "start 1] on" in log and "this is a restart of it, which continues" in log
    assert log.count("iteration 1 is durable") == 1
    assert _ended(jobs.checkpoints("pretrain")) == 4 and not (jobs.checkpoints("pretrain") / "STOP").exists()


def test_a_bad_node_is_left_out(jobs: Jobs) -> None:
    log = jobs.log("one")
    bad = (jobs.runs.parent / "seen").read_text().strip()
    assert f"pre-check: {bad} failed: PRECHECK_HOOK (status 1): a fan stands still" in log
    assert bad in (jobs.runs / "excluded_nodes").read_text()
    (ran_on,) = [line.split()[-2] for line in log.splitlines() if "good:" in line][-1:]
    assert bad not in ran_on and _ended(jobs.checkpoints("one")) == 2


def test_killed_is_requeued_with_progress(jobs: Jobs) -> None:
    log = jobs.log("two")
    assert "the training step died" in log and "queued again" in log
    assert log.count("iteration 4 is durable") == 1  # the second start went on from it
    assert _ended(jobs.checkpoints("two")) == 40


def test_the_chain_ends_with_a_hugging_face_folder(jobs: Jobs) -> None:
    assert (jobs.runs / "convert" / "huggingface" / "config.json").exists(), jobs.log("soup") + jobs.log("convert")


def test_array_trains_each_preset(jobs: Jobs) -> None:
    for preset in PRESETS:
        assert _ended(jobs.checkpoints(f"array/{preset}")) == 2


@pytest.mark.parametrize(
    ("name", "status", "said"),
    [
        (
            "leaves",
            "6:0",
            "stopped with a checkpoint (an exit flag of Megatron's); START=continue goes on",
        ),
        ("unwanted", "6:0", "STOP: somebody wants no training here; remove it"),
        ("unfit", "4:0", "0 of 1 nodes are good, NODES=1; MAX_REQUEUES=0 are spent"),
        ("fails", "7:0", "the training step died (srun's status 1); no checkpoint newer than at the start (none)"),
    ],
)
def test_not_started_again(name: str, status: str, said: str, jobs: Jobs) -> None:
    log = jobs.log(name)
    assert said in log and "queued again" not in log
    assert jobs.status(name) == status


def test_no_secret_reaches_the_run_folder(jobs: Jobs) -> None:
    assert (jobs.runs.parent / "seen.environment").read_text() == "passed \n"
    snapshots = list(jobs.runs.glob("one/launch/*/start-*.txt"))
    assert len(snapshots) == 1 and "passed by name: HF_TOKEN" in snapshots[0].read_text()
    files = [path for path in jobs.runs.rglob("*") if path.is_file()]
    assert not [path for path in files if TOKEN.encode() in path.read_bytes()]
