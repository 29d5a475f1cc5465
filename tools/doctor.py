"""What of this machine's software and hardware would stop a run or make it wrong, one row each, with what to do.

    python -m megatron_hybrid.tools.doctor

Needs no GPU, no torch and no process group. Exit status 1 when a row is red. It looks at versions and settings; whether
the kernels are right on a GPU is what their self-test finds out, at the start of every training run.
"""

from __future__ import annotations

import csv
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import files
from importlib.util import find_spec
from pathlib import Path
from textwrap import shorten

from megatron_hybrid import compat
from megatron_hybrid.fla_backend import refuses_backward
from megatron_hybrid.flags import print_report
from megatron_hybrid.kernels.configs import TABLE, known_bad
from megatron_hybrid.tools.cli import Parser

#: What the project was verified with together; setup.py pins the same.
VERIFIED = {
    "torch": "2.11.0",
    "triton": "3.6.0",
    "megatron-core": "0.19.2",
    "transformers": "5.23.0",
    "numpy": "2.3.5",
    "psutil": "7.2.2",
}

#: Least driver for each major version of CUDA that torch was built with (NVIDIA's compatibility table).
_DRIVERS = {"12": 525, "13": 580}

#: Settings that make collectives slow, or training something else, and are easily left behind.
_SUSPECT = {
    "NCCL_P2P_DISABLE": "GPUs of a node then talk through host memory",
    "NCCL_IB_DISABLE": "nodes then talk over TCP",
    "NCCL_SHM_DISABLE": "GPUs without NVLink then talk through the network",
}

MAX_USED_MIB = 2000
MIN_SHM_GIB = 8
MIN_OPEN_FILES = 65536
_NETWORK_FILE_SYSTEMS = ("nfs", "lustre", "gpfs", "beegfs", "cifs", "fuse.", "wekafs")


@dataclass(frozen=True)
class Row:
    """state: ok, note (worth knowing) or RED (would fail, or could be wrong). advice: what to do."""

    name: str
    found: str
    state: str = "ok"
    advice: str = ""


@dataclass(frozen=True)
class Device:
    """A row of nvidia-smi. capability: "9.0"."""

    name: str
    memory_mib: str
    used_mib: str
    driver: str
    capability: str
    ecc_errors: str


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.split("+")[0])[:3])


def software(has_gpu: bool) -> Iterator[Row]:
    """Versions against those that were verified together."""
    problem = compat.python_problem()
    python = ".".join(map(str, sys.version_info[:3]))
    yield Row("Python", python, "RED" if problem else "ok", problem.partition("; ")[2] if problem else "")
    for name, wanted in VERIFIED.items():
        found = compat.installed(name)
        if found is None:
            yield Row(
                name, "absent", "RED", f"pip install {name}=={wanted}; a login node that only submits does without"
            )
        elif found.split("+")[0] != wanted:
            yield Row(name, found, "note", f"verified: {wanted}")
        else:
            yield Row(name, found)
    if compat.installed("megatron-core") and not any(
        "helpers_cpp" in str(file) for file in files("megatron-core") or ()
    ):
        yield Row("megatron-core's helper", "not compiled", "RED", "install the wheel from PyPI, for Python 3.12")
    yield from _extras(has_gpu)


def _extras(has_gpu: bool) -> Iterator[Row]:
    te = compat.installed("transformer-engine")
    if te is None:
        advice = (
            "pip install -e '.[gpu]'; without it no FP8, and attention by PyTorch" if has_gpu else "no GPU: not needed"
        )
        yield Row("Transformer Engine", "absent", "note", advice)
    else:
        verified = te.split("+")[0] == "2.20.2"
        yield Row("Transformer Engine", te, "ok" if verified else "note", "" if verified else "verified: 2.20.2")
    if (apex := compat.installed("apex")) and find_spec("fused_weight_gradient_mlp_cuda") is None:
        advice = "pip uninstall apex: this is another package of that name, or NVIDIA's without its CUDA extensions"
        yield Row("apex", apex, "RED", advice)
    if fla := compat.installed("flash-linear-attention"):
        advice = "transformers calls its GPU kernels on CPU tensors: remove it where tests or conversions run"
        yield Row("flash-linear-attention", fla, "note", advice)


def pairs(devices: Sequence[Device], versions: Mapping[str, str | None]) -> Iterator[Row]:
    """Versions and GPUs known not to go together. versions: of triton, numpy, torch, flash-linear-attention."""
    triton, numpy = versions.get("triton"), versions.get("numpy")
    if triton and numpy and _numbers(triton)[:2] == (3, 6) and _numbers(numpy) >= (2, 4):
        yield Row(
            "triton + numpy", f"{triton}, {numpy}", "RED", "numpy below 2.4: triton 3.6's interpreter fails on it"
        )
    capabilities = sorted({device.capability for device in devices})
    for capability in capabilities if triton else ():
        architecture, name = f"sm_{capability.replace('.', '')}", f"triton + GPU {capability}"
        found = f"{triton}, {architecture}"
        sizes = [
            f"{K}/{V}"
            for arch, version, K, V in TABLE
            if (arch, version) == (architecture, ".".join(str(triton).split(".")[:2]))
        ]
        if versions.get("flash-linear-attention") and refuses_backward(capability, str(triton)):
            advice = (
                "--gdn-backend fla has wrong gate gradients here (fixed in triton 3.7.1); use triton's, the default"
            )
            yield Row(name, found, "RED", advice)
        elif reason := known_bad(architecture, str(triton)):
            yield Row(name, found, "RED", f"{reason}: take a triton without that fault, or --gdn-backend reference")
        elif sizes:
            advice = f"kernels checked for K/V {', '.join(sizes)}; other sizes: tools.tune_kernels"
            yield Row(name, found, "ok", advice)
        else:
            yield Row(
                name, found, "RED", "no checked kernels for this pair: python -m megatron_hybrid.tools.tune_kernels"
            )
    yield from _driver(devices, versions.get("torch"))


def _driver(devices: Sequence[Device], torch: str | None) -> Iterator[Row]:
    built = re.search(r"\+cu(\d\d)", torch or "")
    for driver in sorted({device.driver for device in devices}) if built else ():
        least = _DRIVERS.get(built.group(1)) if built else None
        if least and _numbers(driver)[0] < least:
            yield Row(
                "driver + torch", f"{driver}, {torch}", "RED", f"driver {least} or later, or torch for older CUDA"
            )
        else:
            yield Row("driver + torch", f"{driver}, {torch}")


def nvidia_smi() -> list[Device] | str:
    """This machine's GPUs, or what went wrong; empty where there is no nvidia-smi."""
    if shutil.which("nvidia-smi") is None:
        return []
    query = "name,memory.total,memory.used,driver_version,compute_cap,ecc.errors.uncorrected.volatile.total"
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=60,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    if done.returncode:
        return (done.stdout + done.stderr).strip().splitlines()[0]
    return parse_smi(done.stdout)


def parse_smi(text: str) -> list[Device]:
    """Devices of nvidia-smi's CSV."""
    return [Device(*(cell.strip() for cell in row)) for row in csv.reader(text.splitlines()) if len(row) == 6]


def gpus(found: list[Device] | str) -> Iterator[Row]:
    if isinstance(found, str):
        yield Row("GPU", "nvidia-smi failed", "RED", f"{found}; reboot, or take the node out of the queue")
        return
    if not found:
        yield Row("GPU", "none", "note", "no nvidia-smi: training runs on CPU, in PyTorch")
    for index, device in enumerate(found):
        said = f"{device.name}, {device.memory_mib} MiB, {device.used_mib} in use"
        if device.ecc_errors not in ("0", "[N/A]"):
            yield Row(f"GPU {index}", said, "RED", f"{device.ecc_errors} uncorrected ECC errors: reset or replace it")
        elif device.used_mib.isdecimal() and int(device.used_mib) > MAX_USED_MIB:
            yield Row(f"GPU {index}", said, "RED", "another program uses it: see nvidia-smi, end it or wait")
        else:
            yield Row(f"GPU {index}", said)
    if len({(device.name, device.driver) for device in found}) > 1:
        yield Row("GPUs", "not alike", "note", "the slowest sets the pace, the smallest the memory")


def settings(environment: Mapping[str, str], has_gpu: bool) -> Iterator[Row]:
    """Environment variables."""
    nccl = compat.installed("nvidia-nccl-cu13") or compat.installed("nvidia-nccl-cu12")
    if nccl:
        yield Row("NCCL", nccl)
    elif has_gpu:
        yield Row("NCCL", "absent", "note", "comes with torch's CUDA wheels; else NCCL must be in torch itself")
    for name, value in sorted(environment.items()):
        if name in _SUSPECT and value not in ("", "0"):
            yield Row(name, value, "RED", f"{_SUSPECT[name]}; unset it unless a test asked for it")
        elif name.startswith("NCCL_"):
            yield Row(name, value, "note", "set on purpose? NCCL's own choice is usually right")
    if environment.get("TRITON_INTERPRET") == "1":
        yield Row("TRITON_INTERPRET", "1", "RED" if has_gpu else "note", "kernels run in Python: unset it for training")
    if has_gpu and environment.get("CUDA_DEVICE_MAX_CONNECTIONS") != "1":
        value = environment.get("CUDA_DEVICE_MAX_CONNECTIONS", "not set")
        yield Row(
            "CUDA_DEVICE_MAX_CONNECTIONS", value, "note", "Megatron wants 1 with sequence parallelism before Blackwell"
        )
    cache = Path(environment.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache")
    kind = _file_system(cache)
    slow = kind.startswith(_NETWORK_FILE_SYSTEMS)
    advice = "all ranks compile into one network folder: set TRITON_CACHE_DIR to node-local disk" if slow else ""
    yield Row("triton's cache", f"{cache} ({kind})", "note" if slow else "ok", advice)


def _file_system(path: Path) -> str:
    """Type of the mount that holds a path, which need not exist."""
    mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    holding = [(point, kind) for point, kind in mounts if path.absolute().is_relative_to(point)]
    return max(holding, key=lambda pair: len(pair[0]), default=("", "unknown"))[1]


def limits() -> Iterator[Row]:
    """Shared memory and open files."""
    free_gib = shutil.disk_usage("/dev/shm").free / 2**30
    advice = "" if free_gib >= MIN_SHM_GIB else "NCCL and data loaders need it: docker --shm-size, or --ipc=host"
    state = "ok" if free_gib >= MIN_SHM_GIB else "RED" if free_gib < 1 else "note"
    yield Row("/dev/shm", f"{free_gib:.1f} GiB free", state, advice)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = soft >= MIN_OPEN_FILES or soft == resource.RLIM_INFINITY
    advice = "" if enough else f"ulimit -n {MIN_OPEN_FILES} in the job script (hard limit {hard})"
    yield Row("open files", str(soft), "ok" if enough else "note", advice)


def slurm() -> Iterator[Row]:
    if shutil.which("sbatch") is None:
        yield Row("Slurm", "absent", "note", "not needed for torchrun; examples/slurm is to be run where sbatch is")
        return
    version = _said("sbatch", "--version")
    answer = _said("scontrol", "ping")
    if "UP" in answer:
        yield Row("Slurm", f"{version}; {answer}")
    else:
        yield Row(
            "Slurm", f"{version}; {answer}", "RED", "the controller does not answer: is munge running? else its admin"
        )


def _said(*command: str) -> str:
    """First line of what a command prints, or why it printed nothing."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return next(iter((done.stdout + done.stderr).strip().splitlines()), "")


def examine(environment: Mapping[str, str]) -> list[Row]:
    """Every row."""
    found = nvidia_smi()
    devices = [] if isinstance(found, str) else found
    names = ("triton", "numpy", "torch", "flash-linear-attention")
    rows = [*software(bool(devices)), *gpus(found), *pairs(devices, {name: compat.installed(name) for name in names})]
    return [*rows, *settings(environment, bool(devices)), *limits(), *slurm()]


def table(rows: Sequence[Row]) -> str:
    rows = [replace(row, found=shorten(row.found, 72)) for row in rows]
    widths = [max(len(getattr(row, name)) for row in rows) for name in ("name", "found")]
    lines = [
        f"{row.state:<4}  {row.name:<{widths[0]}}  {row.found:<{widths[1]}}  {row.advice}".rstrip() for row in rows
    ]
    red = sum(row.state == "RED" for row in rows)
    return "\n".join([*lines, "", f"{red} red" if red else "nothing red"])


def main(argv: Sequence[str] | None = None) -> None:
    Parser(
        prog="python -m megatron_hybrid.tools.doctor",
        description="One table of what would stop a run here or make it wrong; exit status 1 when a row is red.",
        allow_abbrev=False,
    ).parse_args(argv)
    rows = examine(os.environ)
    print_report(table(rows))
    raise SystemExit(any(row.state == "RED" for row in rows))


if __name__ == "__main__":
    main()
