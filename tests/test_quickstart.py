"""examples/quickstart.sh from end to end, shortened; its set-up where Python 3.12 is missing."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
SHORT = {"ITERATIONS": "12", "STOP": "9", "CORPUS_MB": "1"}  # more than the preset's 10 of warm-up


def _quickstart(folder: Path) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(ROOT / "examples" / "quickstart.sh"), str(folder)]
    return subprocess.run(command, env={**os.environ, **SHORT}, capture_output=True, text=True, timeout=600)


def test_quickstart(tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = _quickstart(run)
    assert done.returncode == 0, done.stderr[-3000:]
    for step in range(1, 9):
        assert f"[{step}/8]" in done.stderr
    rows = dict(line.split("  ", 1) for line in (run / "summary.txt").read_text().splitlines())
    assert float(rows["loss at end"]) < float(rows["loss at start"]) - 1.0
    assert rows["iterations"].strip().startswith("12 ") and rows["iterations"].endswith("resumed at 9")
    assert float(rows["logits vs transformers"].split()[-1]) <= 1e-4
    for name in ("corpus.jsonl.zst", "tokenizer.model", "data.bin", "data.idx", "huggingface/model.safetensors"):
        assert (run / name).stat().st_size > 0, name
    assert Image.open(run / "loss.png").size[0] > 400
    assert "def main(" in (run / "generated.txt").read_text()


def test_a_folder_with_other_things_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    (tmp_path / "settings.json").write_text("{}")  # a name the quickstart uses too
    done = _quickstart(tmp_path)
    assert done.returncode == 2 and "is not a quickstart run" in done.stderr
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


SCRIPTS = [path for folder in ("tests", "tools", "examples") for path in sorted((ROOT / folder).rglob("*.sh"))]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_script_parses(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)


def test_set_up_says_what_is_missing_without_python_3_12(tmp_path: Path) -> None:
    """With a PATH and a home that hold no Python 3.12."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("bash", "dirname", "cksum", "cut", "cat"):
        (tools / name).symlink_to(subprocess.check_output(["which", name], text=True).strip())
    copy = tmp_path / "repository" / "tools"
    copy.mkdir(parents=True)
    (copy / "environment.sh").write_text((ROOT / "tools" / "environment.sh").read_text())
    (copy.parent / "setup.py").touch()
    done = subprocess.run(
        [str(tools / "bash"), "-c", f"source {copy}/environment.sh; prepare_environment"],
        env={"PATH": str(tools), "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    if done.returncode == 0:
        pytest.skip("a Python 3.12 is installed where the set-up looks besides PATH and home")
    assert "error: no Python 3.12" in done.stderr and "MEGATRON_HYBRID_PYTHON" in done.stderr
