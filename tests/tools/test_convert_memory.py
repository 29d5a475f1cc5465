"""Conversion under a hard limit of memory, far below the size of the model; and what it leaves when it breaks it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_hybrid.tools.convert.in_order import workers
from tests.tools.synthetic_model import SIZES, write_synthetic
from tests.tools.tiny_model import ROOT

#: The 2 GB model takes a minute and 7 GB of disk.
LARGE = pytest.mark.skipif(not os.environ.get("CONVERT_LARGE"), reason="set CONVERT_LARGE=1: a minute, 7 GB of disk")
LIMITED = """
import resource, runpy, sys
import torch, safetensors.torch  # libraries and their tables are not what is measured
held = int(next(line for line in open("/proc/self/status") if line.startswith("VmData")).split()[1]) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (held + int(sys.argv[1]),) * 2)
sys.argv = sys.argv[1:]
runpy.run_module("megatron_hybrid.tools.convert", run_name="__main__")
"""


#: What is freed goes back at once, so that the limit meets what is held. Without, glibc learns from the first tensor
#: that is freed to take those of up to 32 MB from its heap, and holes between them count: up to 50 MB, as threads meet.
ALLOCATOR = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": str(10**6)}
THREAD_BYTES = 16 * 2**20  # a stack of 8 MB, two buffers of 4


def run_limited(extra_bytes: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    """The command line in a process whose private memory may grow by this much on two cores, which have 4 threads."""
    extra_bytes += THREAD_BYTES * max(0, workers() - 4)
    return subprocess.run(
        [sys.executable, "-c", LIMITED, *map(str, (extra_bytes, *arguments))],
        env=os.environ | ALLOCATOR | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


#: Bytes of the largest file, and of memory beyond the libraries: that file and the largest tensor (21 MB, 63 MB).
CASES = [
    pytest.param("small", 200 * 10**6, 220 * 10**6, id="small"),
    pytest.param("2gb", 500 * 10**6, 560 * 10**6, id="2gb", marks=LARGE),
]


@pytest.mark.parametrize(("size", "shard_bytes", "limit_bytes"), CASES)
def test_memory_is_bounded(size: str, shard_bytes: int, limit_bytes: int, tmp_path: Path) -> None:
    total_bytes = write_synthetic(tmp_path / "hf", SIZES[size], shard_bytes)
    assert total_bytes > 1.5 * limit_bytes
    done = run_limited(limit_bytes, "import", "--model", tmp_path / "hf", "--output", tmp_path / "megatron")
    assert done.returncode == 0, done.stderr
    shards = ["--match-release", "--max-shard-size", shard_bytes]
    checkpoint = ["--checkpoint", tmp_path / "megatron"]
    done = run_limited(limit_bytes, "export", *checkpoint, "--output", tmp_path / "back", *shards)
    assert done.returncode == 0, done.stderr
    for path in (tmp_path / "hf").glob("*.safetensors"):
        assert subprocess.run(["cmp", path, tmp_path / "back" / path.name]).returncode == 0
    done = run_limited(30 * 10**6, "export", *checkpoint, "--output", tmp_path / "too_little", *shards)
    assert done.returncode != 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "hf", "megatron"]
