"""A worker's memory does not follow the size of files, documents or vocabularies of words: hard limits hold it."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

FULL = os.environ.get("MEGATRON_HYBRID_TEST_MEMORY", "small") == "full"  # 1 GB documents, 2 GB files: minutes
MIB = 1 << 20
LIMIT_BYTES = 400 * MIB
SMALL_MB, LARGE_MB = (20, 2000) if FULL else (20, 80)
DOCUMENT_MB = 1000 if FULL else 24

RUN = (
    "import json, resource, sys\n"
    "limit = int(sys.argv[1])\n"
    "if limit:\n"
    "    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))\n"
    "from megatron_hybrid.tools.preprocess import parser, run\n"
    "from megatron_hybrid.tools.corpus.shard import peak_rss_bytes\n"
    "content = run(parser().parse_args(sys.argv[2:]))\n"
    "peak = peak_rss_bytes()\n"
    "print(json.dumps([peak, content['lines'], content['documents'], content['rejected']]))\n"
)


def peak_memory(
    tokenizer: Path, source: Path, prefix: Path, limit_bytes: int = 0, *options: str
) -> tuple[int, int, int, dict[str, int]]:
    """(peak resident bytes, lines, documents, rejected) of a run under a hard limit on its own data (RLIMIT_DATA)."""
    environment = os.environ | {"RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    words = ["--input", str(source), "--output-prefix", str(prefix), "--tokenizer-model", str(tokenizer), *options]
    result = subprocess.run(
        [sys.executable, "-c", RUN, str(limit_bytes), *words, "--append-eod"],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    peak, lines, documents, rejected = json.loads(result.stdout.splitlines()[-1])
    return peak, lines, documents, rejected


LETTERS = bytes(97 + value % 26 for value in range(256))


def novel_words(source: random.Random, size: int) -> str:
    """Random words of eleven letters, no two of them equal: what fills caches."""
    letters = source.randbytes(size).translate(LETTERS).decode()
    return " ".join(letters[at : at + 11] for at in range(0, size, 12))


def write_file(path: Path, megabytes: int) -> Path:
    """1 MB of novel words, over and over: caches hold the same however large the file is."""
    source = random.Random(0)
    lines = [json.dumps({"text": novel_words(source, 100_000)}) + "\n" for _ in range(10)]
    with open(path, "w") as handle:
        for _ in range(megabytes):
            handle.writelines(lines)
    return path


def test_memory_does_not_grow_with_the_file(tmp_path: Path, tokenizer_json: Path) -> None:
    small = peak_memory(tokenizer_json, write_file(tmp_path / "small.jsonl", SMALL_MB), tmp_path / "a")
    large = peak_memory(tokenizer_json, write_file(tmp_path / "large.jsonl", LARGE_MB), tmp_path / "b", LIMIT_BYTES)
    assert large[2] == large[1] == LARGE_MB * 10
    assert large[0] <= 1.1 * small[0]
    assert large[0] <= LIMIT_BYTES


@pytest.mark.parametrize("kind", ["novel-words", "non-latin", "one-run-of-letters"])
def test_document_of_any_length_stays_below_the_limit(tmp_path: Path, tokenizer_json: Path, kind: str) -> None:
    source = random.Random(1)
    path = tmp_path / "in.jsonl"
    with open(path, "w", encoding="utf-8") as handle:
        handle.write('{"id": 1, "text": "')
        for _ in range(DOCUMENT_MB):
            if kind == "novel-words":
                handle.write(novel_words(source, MIB))
            elif kind == "non-latin":
                handle.write(("漢字🎉" * 20 + "\\n") * (MIB // 202))
            else:
                handle.write("x" * MIB)
        handle.write('"}\n{"text": "the last"}\n')
    options = ["--on-error", "skip", "--max-rejected", "1"]
    peak, lines, documents, rejected = peak_memory(tokenizer_json, path, tmp_path / "data", LIMIT_BYTES, *options)
    expected = (1, {"document_too_long": 1}) if kind == "one-run-of-letters" else (2, {})
    assert (lines, documents, rejected) == (2, *expected)
    assert peak <= LIMIT_BYTES


def test_bomb_of_zeros_stays_below_the_limit(tmp_path: Path, tokenizer_json: Path) -> None:
    import zstandard

    path = tmp_path / "in.jsonl.zst"
    with open(path, "wb") as handle, zstandard.ZstdCompressor(level=19).stream_writer(handle) as stream:
        stream.write(b'{"text": "the first"}\n')
        for _ in range(DOCUMENT_MB * 4):
            stream.write(b"\0" * MIB)
        stream.write(b'\n{"text": "the last"}\n')
    assert path.stat().st_size < MIB
    options = ["--on-error", "skip", "--max-rejected", "1"]
    peak, lines, documents, rejected = peak_memory(tokenizer_json, path, tmp_path / "data", LIMIT_BYTES, *options)
    assert (lines, documents, rejected) == (3, 2, {"document_too_long": 1})
    assert peak <= LIMIT_BYTES
