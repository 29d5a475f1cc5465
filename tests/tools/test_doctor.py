"""The doctor: bad pairs are red, and it runs where nothing is installed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_hybrid.kernels.configs import TABLE
from megatron_hybrid.tools import doctor

ROOT = Path(__file__).resolve().parents[2]
#: What `nvidia-smi --query-gpu=... --format=csv,noheader,nounits` prints, from its documentation.
SMI = "NVIDIA {name}, 143771, {used}, {driver}, {capability}, {errors}\n"
GOOD = {"name": "H200", "used": "4", "driver": "580.159.04", "capability": "9.0", "errors": "0"}
VERSIONS = {"triton": "3.6.0", "numpy": "2.3.5", "torch": "2.11.0+cu130", "flash-linear-attention": None}


@pytest.mark.parametrize(
    ("gpu", "versions", "red", "advice"),
    [
        ({}, {}, None, ""),
        ({"used": "[N/A]"}, {}, None, ""),
        ({}, {"triton": "3.7.1"}, "triton + GPU 9.0", "no checked kernels"),
        ({}, {"flash-linear-attention": "0.6.0"}, "triton + GPU 9.0", "wrong gate gradients"),
        ({}, {"numpy": "2.4.0"}, "triton + numpy", "numpy below 2.4"),
        ({"capability": "10.0"}, {}, "triton + GPU 10.0", "race"),
        ({"capability": "12.0"}, {"triton": "3.7.1"}, "triton + GPU 12.0", "race"),
        ({"capability": "10.0"}, {"triton": "3.8.0"}, "triton + GPU 10.0", "no checked kernels"),
        ({"capability": "10.3"}, {"triton": "3.8.0"}, "triton + GPU 10.3", "issue 10821"),
        ({"driver": "570.86.10"}, {}, "driver + torch", "driver 580"),
        ({"errors": "3"}, {}, "GPU 0", "3 uncorrected"),
        ({"used": "71000"}, {}, "GPU 0", "another program"),
    ],
)
def test_what_is_red(gpu: dict[str, str], versions: dict[str, str | None], red: str | None, advice: str) -> None:
    devices = doctor.parse_smi(SMI.format(**{**GOOD, **gpu}))
    rows = [*doctor.gpus(devices), *doctor.pairs(devices, {**VERSIONS, **versions})]
    found = [row for row in rows if row.state == "RED"]
    assert [row.name for row in found] == ([red] if red else [])
    assert all(advice in row.advice for row in found)


def test_settings_that_make_a_run_slow() -> None:
    rows = doctor.settings({"NCCL_IB_DISABLE": "1", "NCCL_DEBUG": "INFO", "TRITON_INTERPRET": "1"}, has_gpu=True)
    states = {row.name: row.state for row in rows}
    assert (states["NCCL_IB_DISABLE"], states["NCCL_DEBUG"], states["TRITON_INTERPRET"]) == ("RED", "note", "RED")


def test_it_runs_where_nothing_is_installed() -> None:
    done = subprocess.run(
        [sys._base_executable, "-s", "-m", "megatron_hybrid.tools.doctor"],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stderr
    assert "RED   torch" in done.stdout and "pip install torch==2.11.0" in done.stdout


def test_the_verified_versions_are_the_pins() -> None:
    pins = (ROOT / "setup.py").read_text()
    assert all(f'"{name}=={version}"' in pins for name, version in doctor.VERIFIED.items())


def test_every_checked_head_size_is_named() -> None:
    """Of the kernels' table, not of a copy."""
    row = next(row for row in doctor.pairs(doctor.parse_smi(SMI.format(**GOOD)), VERSIONS) if "GPU" in row.name)
    named = re.findall(r"(\d+)/(\d+)", row.advice)
    assert {("sm_90", "3.6", int(K), int(V)) for K, V in named} == TABLE.keys()
