"""What is set for the machine that a run starts on."""

import os
from pathlib import Path

import pytest

from megatron_hybrid import compat

NAME = "CUDA_DEVICE_MAX_CONNECTIONS"


@pytest.mark.parametrize(
    ("answer", "flags", "before", "after"),
    [
        ("9.0\n9.0\n", [], None, "1"),
        ("10.0\n", [], None, None),
        ("9.0\n", ["--use-megatron-fsdp"], None, None),
        ("9.0\n", [], "8", "8"),
        ("No devices were found\n", [], None, None),
        (None, [], None, None),
    ],
    ids=["Hopper", "Blackwell", "FSDP", "set before", "no GPU", "no nvidia-smi"],
)
def test_connections_are_limited_before_blackwell(
    answer: str | None, flags: list[str], before: str | None, after: str | None,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    if answer is not None:
        program = tmp_path / "nvidia-smi"
        program.write_text(f"#!/bin/sh\nprintf '{answer}'\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv(NAME, before or "")
    if before is None:
        del os.environ[NAME]  # given back by monkeypatch
    said = compat.limit_connections(flags)
    assert os.environ.get(NAME) == after
    assert said == (f"{NAME}=1" if after != before else None)
