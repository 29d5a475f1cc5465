"""Ray runs the same worker: the same bytes, and a dead actor is replaced. Needs the extra `ray`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("ray", reason="ray is in the extra `ray` (240 MB), which is not part of the test environment")

KILL_ONE = (  # in every process of the run: the first one that comes to shard 1 dies there
    "import os\n"
    "import megatron_hybrid.tools.corpus.shard as shard\n"
    "old = shard.ShardWork.run\n"
    "def run(work):\n"
    "    if work.shard.index == 1 and not os.path.exists({mark!r}):\n"
    "        open({mark!r}, 'w').close()\n"
    "        os._exit(1)\n"
    "    return old(work)\n"
    "shard.ShardWork.run = run\n"
)


def test_actors_make_the_bytes_of_local_workers_though_one_dies(tmp_path: Path, tokenizer_json: Path) -> None:
    texts = [f"document {number} " + "of words " * (number % 30) for number in range(900)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (tmp_path / "sitecustomize.py").write_text(KILL_ONE.format(mark=str(tmp_path / "mark")))
    words = [sys.executable, "-m", "megatron_hybrid.tools.preprocess", "--input", str(tmp_path / "in.jsonl")]
    words += ["--tokenizer-model", str(tokenizer_json), "--append-eod", "--shard-bytes", "20K", "--workers"]
    path = f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    ray = subprocess.run(
        [*words, "2", "--engine", "ray", "--output-prefix", str(tmp_path / "ray")],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"} | {"PYTHONPATH": path},
    )
    assert ray.returncode == 0, ray.stderr
    assert "a worker died (status of Ray: " in ray.stderr and "another takes over" in ray.stderr
    subprocess.run([*words, "1", "--output-prefix", str(tmp_path / "here")], check=True, capture_output=True)
    for suffix in ("bin", "idx"):
        assert (tmp_path / f"ray.{suffix}").read_bytes() == (tmp_path / f"here.{suffix}").read_bytes()
