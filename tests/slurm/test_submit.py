"""What submit.sh prints and refuses, without a Slurm; env files of the examples against Megatron's parser; nodes."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_hybrid.flags import KNOWN
from tests.slurm import known_flags
from tests.slurm.runs import ROOT, make_site, submit, training, write_env

SLURM = ROOT / "examples" / "slurm"
ENV_FILES = sorted(path for path in (SLURM / "env").glob("*.env") if path.name != "site.env")
SCRIPTS = [*SLURM.glob("*.sh"), SLURM / "train.sbatch", ROOT / "examples" / "quickstart.sh", ROOT / ".ci" / "run"]
SCRIPTS += [ROOT / "tools" / "environment.sh", *(ROOT / "tests").glob("*.sh")]
CHAIN = [SLURM / "env" / f"{name}.env" for name in ("7b-h100", "midtrain-1", "midtrain-2", "soup", "long-context")]


def test_scripts_are_clean() -> None:
    for script in SCRIPTS:
        subprocess.run(["bash", "-n", str(script)], check=True)
    if not shutil.which("shellcheck"):
        pytest.skip("shellcheck not found: install the package shellcheck")
    done = subprocess.run(["shellcheck", "-x", *map(str, SCRIPTS)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cluster's settings, and everything that the example env files expect to find."""
    folder = tmp_path_factory.mktemp("site")
    make_site(folder)
    tokens = folder / "tokens"
    for name in ("pretrain", "midtrain", "long-context"):
        for suffix in (".bin", ".idx"):
            shutil.copy(tokens / f"text{suffix}", tokens / f"{name}{suffix}")
    for name in ("tokens/sft-think", "tokens/raw/web", "tokens/raw/code", "tokenizer"):
        (folder / name).mkdir(parents=True)
    (folder / "tokenizer" / "tokenizer.json").touch()
    text = (SLURM / "env" / "site.env").read_text()
    path = folder / "big.env"
    path.write_text(re.sub("/path/to", str(folder), text) + f"PYTHON={sys.executable} LOGIN_PYTHON={sys.executable}\n")
    return path


def _commands(text: str, word: str) -> list[list[str]]:
    """The commands that a dry run printed, of a program."""
    return [shlex.split(line) for line in text.replace("\\\n", " ").splitlines() if line.startswith(word + " ")]


def test_env_files_pass_and_their_flags_are_megatrons(
    site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole list in one command, with torch out of reach; then each command's flags validated by Megatron."""
    (tmp_path / "torch.py").write_text("raise ImportError('a login node has no torch')\n")
    files = [*CHAIN, *(path for path in ENV_FILES if path not in CHAIN)]
    done = submit("--dry-run", "--site", site, *files, environment=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 0, done.stdout + done.stderr
    names = {line.removeprefix("== ") for line in done.stdout.splitlines() if line.startswith("== ")}
    assert len(names) == len(ENV_FILES) and done.stdout.count("plan: fits") == 13
    warned = [line for line in done.stderr.splitlines() if line.startswith("warning: ")]
    assert len(warned) == 1 and "7b-b200: --gdn-backend auto: no checked kernels" in warned[0]
    (pretrain,) = [words for words in _commands(done.stdout, "sbatch") if "--job-name=7b" in words]
    assert "--nodes=65" in pretrain and "--signal=B:USR1@900" in pretrain
    steps = [words for words in _commands(done.stdout, "srun") if "megatron_hybrid.pretrain" in words]
    assert len(steps) == 13
    assert not [word for words in steps for word in words if word.startswith("NCCL_")]
    assert all("OMP_NUM_THREADS=8" in words for words in steps)
    monkeypatch.setenv("RANK", "0")
    for words in steps:
        ranks = [int(word.split("=")[1]) for word in words if re.match("--(nnodes|nproc-per-node)=", word)]
        monkeypatch.setenv("WORLD_SIZE", str(ranks[0] * ranks[1]))
        _validate(words[words.index("megatron_hybrid.pretrain") + 1 :], ranks[0] * ranks[1])


def _validate(words: list[str], ranks: int) -> None:
    from megatron.training.arguments import parse_args, validate_args

    from megatron_hybrid import compat, pretrain
    from megatron_hybrid.config import HybridConfig
    from megatron_hybrid.flags import compose

    compat.start_backend()
    own, rest = pretrain.own_arguments(words)
    flags = compose(own.preset, rest, own.without)
    sys.argv = ["pretrain", *flags, *compat.backend_flags(flags)]
    args = validate_args(parse_args(HybridConfig.add_to), {})
    assert args.world_size == ranks and args.save and args.hidden_size


REFUSED = [
    (["NODE=3"], "NODE=3: NODE: no such setting; nearest: NODES"),
    (["TIME=24h"], r"TIME=24h: must be \[DAYS-\]HH:MM:SS"),
    (["SIGNAL_SECONDS=15m"], "SIGNAL_SECONDS=15m: must be a whole number of at least 1, without a unit"),
    (["TIME=00:10:00"], "SIGNAL_SECONDS=900: must be less than TIME=00:10:00; nearest legal: 599"),
    (["GPU=A100"], "GPU=A100: legal: H100, H200, B200, GB200, none"),
    (["RUN=/elsewhere"], "RUN=/elsewhere: must be in RUNS="),
    (["RUNS=/no/such/folder"], "RUNS=/no/such/folder: does not exist"),
    (["TOKENIZER=/no/tokenizer"], "TOKENIZER=/no/tokenizer: does not exist"),
    (["TOKENIZER=/usr"], "TOKENIZER=/usr: holds no tokenizer.json"),
    (["OMP_THREADS=13"], "OMP_THREADS=13: 8 processes .* have CPUS_PER_TASK=96 cores; nearest legal: 12"),
    (["START=continue"], "START=continue: .*/7b has no complete checkpoint; START=scratch or from"),
    (["CONTAINER_IMAGE=/no/image.sqsh"], "CONTAINER_IMAGE=/no/image.sqsh: does not exist"),
    (["CONTAINER_IMAGE=nvcr.io#nvidia/x"], "tokenizer: no mount of the container holds it"),
    (["--", "--tensor-model-paralel-size", "4"], "no such flag; nearest: --tensor-model-parallel-size"),
    (["--", "--lr", "3e-4x"], "FLAGS: --lr 3e-4x: must be a number"),
    (["--", "--fp8-format", "e5m2"], "FLAGS: --fp8-format e5m2: legal: e4m3, hybrid"),
    (["--", "--save", "/x"], "FLAGS: --save: set by the launcher; use RUN"),
    (["NODES=63"], "--global-batch-size 512: must be a multiple of 252 .* nearest legal: 504"),
    (["NODES=1", "--", "--pipeline-model-parallel-size", "3"], "--pipeline-model-parallel-size 3: "),
    (["--", "--tensor-model-parallel-size", "32"], "--tensor-model-parallel-size 32: .*nearest legal: 30"),
    (["--", "--context-parallel-size", "3"], "--seq-length 8192: .* times --context-parallel-size 3; nearest legal"),
    (["--", "--tensor-model-parallel-size", "1"], "--gpu H100: .* do not fit in"),
    (["PRESET=olmo-hybrid-7"], "--preset olmo-hybrid-7: unknown; nearest: olmo-hybrid-7b"),
]


@pytest.mark.parametrize(("words", "said"), REFUSED, ids=[" ".join(words) for words, _ in REFUSED])
def test_refused_before_submission(words: list[str], said: str, site: Path) -> None:
    done = submit("--site", site, CHAIN[0], *words)
    assert done.returncode == 2, done.stdout
    assert re.search(f"^error: .*{said}", done.stderr, re.M), done.stderr


FILES = [
    ("NODESS=3", "NODESS: no such setting; nearest: NODES"),
    ("NODES=3\r", "has Windows line ends"),
    ("NODES = 3", "line 3: runs a command: NODES = 3; a setting is NAME=VALUE"),
    ("touch RAN", "line 3: runs a command: touch RAN"),
    ('NAME="$(touch RAN)"', "line 3: runs a command: "),
    ("FLAGS=(a `touch RAN`)", "line 3: runs a command: "),
    ("NAME=x touch RAN", "line 3: runs a command: "),
    ("NAME=x >RAN", "line 3: runs a command: "),
    ("source <(echo touch RAN)", "line 3: runs a command: "),
    ("exit 0", "line 3: runs a command: exit 0"),
    ("fail() { touch RAN; }", "defines a function"),
    ("FROM=$RUNZ/x", "line 3: RUNZ: unbound variable"),
    ('NAME="x', "unexpected EOF"),
    ("NODES=(3)", "NODES: is one value: NODES=VALUE"),
    ("NCCL=(NCCL_DEBUG=INFO)", "NCCL: 'NCCL_DEBUG=INFO': must be 'NCCL_NAME=VALUE because REASON'"),
    ("PASS_ENV=(SURELY_NOT_SET)", "PASS_ENV: SURELY_NOT_SET: not set where the run is submitted"),
    ("FLAGS=(7)", "FLAGS: 7: a value without a flag before it"),
    ("DATA=(/no/such/prefix)", "DATA: /no/such/prefix.bin: does not exist"),
    ("START=from FROM=/no/such/run", "FROM=/no/such/run: does not exist"),
    ("COMMAND=(python -m x --input=/no/such --output $RUN/y) MAKES=($RUN/y)", "COMMAND: /no/such: does not exist"),
    ("COMMAND=(python -m x --output /no/such)", "COMMAND: /no/such: does not exist"),
    ('COMMAND=(python -m x "$ACCOUNT")', "COMMAND: an empty word after x"),
    ("CONTAINER_MOUNTS=(/x:/x)", "CONTAINER_MOUNTS: given without CONTAINER_IMAGE"),
]


@pytest.mark.parametrize(("line", "said"), FILES, ids=[line for line, _ in FILES])
def test_a_slip_in_an_env_file_is_named(line: str, said: str, site: Path, tmp_path: Path) -> None:
    path = write_env(
        tmp_path / "a.env", ["NAME=a RUN=$RUNS/a TIME=01:00:00 PRESET=olmo-hybrid-7b", "GPU=H100", line], {}
    )
    done = submit("--dry-run", "--site", site, path)
    assert done.returncode == 2 and said in done.stderr, done.stderr
    assert not Path("RAN").exists()


def test_what_shells_files_of_settings_begin_with_is_taken(site: Path, tmp_path: Path) -> None:
    lines = [
        "set -euo pipefail # as everywhere",
        f"source {CHAIN[0]}",
        'export EXCLUDE_NODES="n7,n 8"',
        "export NAME=b",
    ]
    done = submit("--dry-run", "--site", site, write_env(tmp_path / "a.env", lines, {}))
    assert done.returncode == 0 and "--job-name=b" in done.stdout, done.stdout + done.stderr


def test_a_stage_needs_what_is_before_it(site: Path) -> None:
    done = submit("--dry-run", "--site", site, CHAIN[1])
    assert done.returncode == 2 and "no run of AFTER=(7b) in this command makes it" in done.stderr
    for name, missing in (("soup", "midtrain-2/checkpoints"), ("convert", "long-context/checkpoints")):
        done = submit("--dry-run", "--site", site, SLURM / "env" / f"{name}.env")
        assert done.returncode == 2 and f"{missing}: does not exist, no run of AFTER" in done.stderr
    (site.parent / "runs" / "7b" / "checkpoints").mkdir(parents=True)
    done = submit("--dry-run", "--site", site, CHAIN[1], CHAIN[0])
    assert done.returncode == 2 and "midtrain-1 follows 7b; name 7b's env file before its" in done.stderr
    shutil.rmtree(site.parent / "runs" / "7b")


def test_data_that_a_run_before_makes_and_those_of_a_mix(site: Path, tmp_path: Path) -> None:
    """docs/launching.md's env file; a file of tools.mix in the place of DATA; not both."""
    text = (ROOT / "docs" / "launching.md").read_text().split("my-7b.env\n")[1]
    lines = [
        f"source {CHAIN[0]}",
        *(line.strip() for line in text.split("\n\n")[0].splitlines() if "source" not in line),
    ]
    made = write_env(tmp_path / "made.env", lines, {})
    done = submit("--dry-run", "--site", site, SLURM / "env" / "data.env", made)
    assert done.returncode == 0, done.stderr
    (step,) = [words for words in _commands(done.stdout, "srun") if "megatron_hybrid.pretrain" in words]
    assert step[step.index("--instance-data") + 1] == f"{site.parent}/tokens/data" and "--data-path" not in step
    assert step[step.index("--data-cache-path") + 1] == f"{site.parent}/runs/7b/cache"
    done = submit("--dry-run", "--site", site, made, "--", "--lr", "1e-4")
    assert done.returncode == 2 and "tokens/data: does not exist" in done.stderr
    (tmp_path / "pretrain.data_args.json").touch()
    lines = [f"source {CHAIN[0]}", "DATA=()", f"FLAGS+=(--per-split-data-args-path {tmp_path}/pretrain.data_args.json)"]
    assert submit("--dry-run", "--site", site, write_env(tmp_path / "mix.env", lines, {})).returncode == 0
    done = submit("--dry-run", "--site", site, write_env(tmp_path / "both.env", [lines[0], lines[2]], {}))
    assert done.returncode == 2 and "DATA: FLAGS names data too (--per-split-data-args-path)" in done.stderr


def test_settings_do_not_come_from_the_environment(site: Path) -> None:
    environment = os.environ | {"EXCLUDE_NODES": "n7", "RANKS_PER_NODE": "4", "NCCL": "NCCL_DEBUG=INFO"}
    done = submit("--dry-run", "--site", site, CHAIN[0], environment=environment)
    assert done.returncode == 0 and not re.search("n7|NCCL", done.stdout), done.stdout + done.stderr


def test_nodes_that_failed_lately_are_left_out(tmp_path: Path) -> None:
    site = make_site(tmp_path / "s")
    now = int(time.time())
    listed = f"{now - 90000} n1 hot\n{now - 80000} n2 hot\n{now - 10} n3 hot\n{now - 5} n3 again\n"
    (tmp_path / "s" / "runs" / "excluded_nodes").write_text(listed)
    done = submit("--dry-run", "--site", site, training(tmp_path, "late", 4, 10), "EXCLUDE_NODES=n[7-9]")
    (words,) = _commands(done.stdout, "sbatch")
    assert "--exclude=n[7-9],n2,n3" in words, done.stderr
    (step,) = _commands(done.stdout, "srun")
    assert "CUDA_VISIBLE_DEVICES=" in step  # GPU=none: also on a node that has some


def test_container_and_nccl_are_in_the_command(site: Path, tmp_path: Path) -> None:
    mounts = f"CONTAINER_MOUNTS=({site.parent}:{site.parent}:ro)"
    lines = [f"source {CHAIN[0]}", "CONTAINER_IMAGE=registry#nemo:1", mounts, "NAME=boxed PYTHON="]
    lines += ['NCCL=("NCCL_IB_HCA=mlx5 because storage has another name")']
    done = submit("--dry-run", "--site", site, write_env(tmp_path / "boxed.env", lines, {}))
    assert done.returncode == 0, done.stderr
    (step,) = _commands(done.stdout, "srun")
    assert {"--container-image=registry#nemo:1", "NCCL_IB_HCA=mlx5", "python3"} <= set(step)
    assert (
        f"--container-mounts={ROOT}:{ROOT},{site.parent}/runs:{site.parent}/runs,{site.parent}:{site.parent}:ro" in step
    )


def test_lead_time_is_judged_by_the_settings_or_the_last_log(tmp_path: Path) -> None:
    site = make_site(tmp_path / "s")
    path = training(tmp_path, "lead", 4, 10)
    logs = tmp_path / "s" / "runs" / "lead" / "logs"
    logs.mkdir(parents=True)
    said = submit("--dry-run", "--site", site, path).stderr
    assert "SIGNAL_SECONDS=60 is not checked" in said
    (logs / "lead-1.log").write_text(
        " iteration 2/ 4 | elapsed time per iteration (ms): 9000.0 | lm loss\n"
        "iteration 2 is durable: 9 files, 1.0 GB in 31.5 s from the start of the save (0.1 GB/s), the last 1 s\n"
    )
    said = submit("--dry-run", "--site", site, path).stderr
    assert "warning: lead: SIGNAL_SECONDS=60 is less than 1.5 times a step (9 s) and a save (31.5 s)" in said
    assert not submit("--dry-run", "--site", site, path, "SAVE_SECONDS=30").stderr


def test_known_flags_are_megatrons() -> None:
    assert KNOWN.read_text().split("\n") == [*known_flags.lines(), ""]


#: What nvidia-smi prints for a query; in its place where there is no GPU.
NVIDIA_SMI = """#!/usr/bin/env bash
case $1 in
--query-gpu=*) printf '%s' "$GPUS" ;;
--query-remapped-rows=*) printf '%s' "$ROWS" ;;
--query-compute-apps=*) printf '%s' "$PROCESSES" ;;
esac
"""
GOOD = "0, 4, 31, 0, 580.65\n1, 4, 33, [N/A], 580.65\n"

NODES = [
    ("good", GOOD, "0, 0\n", "", {}, None),
    ("too few", "0, 4, 31, 0, 580.65\n", "", "", {}, "1 GPUs, 2 wanted"),
    ("memory", GOOD.replace("1, 4,", "1, 901,"), "", "", {}, "GPU 1: 901 MiB in use, at most 500"),
    ("hot", GOOD.replace("33", "61"), "", "", {}, "GPU 1: 61 degrees idle, at most 55"),
    ("ecc", GOOD.replace("31, 0", "31, 2"), "", "", {}, "GPU 0: 2 uncorrected ECC errors"),
    ("rows", GOOD, "1, 0\n", "", {}, "memory rows to be remapped"),
    ("foreign", GOOD, "0, 0\n", "4242, 70000\n", {}, "another program is on the GPUs (pid,MiB): 4242,70000"),
    ("shm", GOOD, "", "", {"MIN_SHM_GIB": "999999"}, "/dev/shm: "),
    ("local", GOOD, "", "", {"NODE_LOCAL": "/no/such/disk"}, "NODE_LOCAL /no/such/disk: missing, not a disk"),
    ("hook", GOOD, "", "", {"PRECHECK_HOOK": "/no/such/hook"}, "PRECHECK_HOOK (status 127): "),
    ("python", GOOD, "", "", {"PYTHON": "/no/python"}, "PYTHON /no/python: "),
]


@pytest.mark.parametrize(("name", "gpus", "rows", "processes", "more", "said"), NODES, ids=[case[0] for case in NODES])
def test_node_is_looked_at(
    name: str, gpus: str, rows: str, processes: str, more: dict[str, str], said: str | None, tmp_path: Path
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(NVIDIA_SMI)
    program.chmod(0o755)
    limits = {"GPUS_PER_NODE": "2", "MAX_USED_MIB": "500", "MAX_IDLE_CELSIUS": "55", "MIN_SHM_GIB": "0"}
    limits |= {"NODE_LOCAL": str(tmp_path), "RUNS": str(tmp_path), "PYTHON": sys.executable, "PRECHECK_HOOK": ""}
    limits |= {"GPUS": gpus, "ROWS": rows, "PROCESSES": processes, "SLURMD_NODENAME": "n1"} | more
    environment = os.environ | limits | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = ["bash", str(SLURM / "node.sh"), "check"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=True)
    lines = [line.split("\t") for line in done.stdout.splitlines()]
    bad = [text for _, _, kind, text in lines if kind in ("bad", "wrong")]
    assert len(bad) == (said is not None) and (said is None or bad[0].startswith(said)), done.stdout
    assert [kind for _, _, kind, _ in lines][-1] == "time" and all(line[:2] == ["precheck", "n1"] for line in lines)
    if said is None:
        (versions,) = [text for _, _, kind, text in lines if kind == "versions"]
        assert "torch=2.11" in versions and versions.endswith("driver=580.65 driver=580.65")


def test_readme_section_runs(site: Path, tmp_path: Path) -> None:
    """As printed, in a folder where examples/ is; the submission itself as a dry run, since it asks for 512 GPUs."""
    section = (ROOT / "README.md").read_text().split("## Launching on Slurm")[1].split("\n## ")[0]
    copy, look, chain = [line.strip() for line in section.splitlines() if line.startswith("    ")]
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    edit = f"sed -i 's#/path/to#{site.parent}#' my-site.env; echo {{LOGIN_,}}PYTHON={sys.executable} >>my-site.env"
    script = "\n".join(["set -e", copy, edit, look, chain.replace("submit.sh ", "submit.sh --dry-run ")])
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (
        done.stdout.count("== 7b\n") == 2 and "--dependency=afterok:JOB-OF-midtrain-1:JOB-OF-midtrain-2" in done.stdout
    )
