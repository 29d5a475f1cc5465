"""One large .gz or .zst file is read by several workers where it is made of several frames, and loses no line."""

import gzip
import itertools
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard

from megatron_hybrid.tools.cli import ToolError
from megatron_hybrid.tools.corpus.calibrate import describe_plan
from megatron_hybrid.tools.corpus.frames import find_cuts
from megatron_hybrid.tools.corpus.inputs import find_inputs
from megatron_hybrid.tools.corpus.plan import Options, Segment, make_plan
from megatron_hybrid.tools.corpus.tokenizer_file import load_tokenizer_file
from megatron_hybrid.tools.corpus.worker import Settings
from megatron_hybrid.tools.preprocess import parser, run

SKIPPABLE = b"\x50\x2a\x4d\x18\x04\x00\x00\x00skip"  # what pzstd and seekable files put between frames
COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "gz": lambda data: gzip.compress(data, 1) + b"\0" * (len(data) % 3),  # tapes pad with zeros
    "zst": lambda data: SKIPPABLE + zstandard.compress(data, 1),
}


def text_lines(seed: int) -> bytes:
    """JSONL of random length, with blank and bad lines and some that are longer than a frame."""
    source = random.Random(seed)
    lines = []
    for number in range(300):
        size = source.choice([0, 3, 40, 40, 400, 4000 if number % 50 == 0 else 40])
        text = "".join(source.choices("abcdefgh \n", k=size))
        lines.append(json.dumps({"text": f"{number} {text}"}).encode() if size else source.choice([b"", b"not json"]))
    return b"\n".join(lines) + (b"\n" if seed % 2 else b"")


def in_frames(data: bytes, kind: str, seed: int) -> bytes:
    """`data` in frames that end anywhere, also just before and just after a newline."""
    source = random.Random(seed)
    newlines = [at for at, byte in enumerate(data) if byte == 10]
    cuts = {0, len(data), *source.sample(range(len(data)), 12)}
    cuts |= {at + source.choice([0, 1]) for at in source.sample(newlines, 12)}
    bounds = sorted(cuts)
    return b"".join(COMPRESS[kind](data[a:b]) for a, b in itertools.pairwise(bounds))


def preprocess(tokenizer_json: Path, source: Path, prefix: Path, *options: str) -> dict[str, Any]:
    words = ["--tokenizer-model", str(tokenizer_json), "--append-eod", "--output-prefix", str(prefix), *options]
    return run(parser().parse_args([*words, "--max-rejected", "1000", "--input", str(source)]))


@pytest.mark.parametrize("kind", COMPRESS)
def test_file_of_many_frames_is_cut_and_loses_no_line(tmp_path: Path, tokenizer_json: Path, kind: str) -> None:
    for seed in range(2):
        data = text_lines(seed)
        (tmp_path / "in.jsonl").write_bytes(data)
        path = tmp_path / f"in.jsonl.{kind}"
        path.write_bytes(in_frames(data, kind, seed))
        skip = ["--on-error", "skip"]
        whole = preprocess(tokenizer_json, tmp_path / "in.jsonl", tmp_path / f"whole{seed}", *skip)
        cut = preprocess(tokenizer_json, path, tmp_path / f"cut{seed}", *skip, "--shard-bytes", "1500")
        assert len(cut["datasets"][0]["bin"]["parts"]) > 3
        for key in ("lines", "documents", "rejected", "tokens"):
            assert cut[key] == whole[key]
        for suffix in ("bin", "idx"):
            written = (tmp_path / f"cut{seed}.{suffix}").read_bytes()
            assert written == (tmp_path / f"whole{seed}.{suffix}").read_bytes()
        rejects = [json.loads(line) for line in (tmp_path / f"cut{seed}.rejects.jsonl").read_text().splitlines()]
        stored = path.read_bytes()
        for reject in rejects:  # the offset leads back to the line
            rest = stored[reject.get("stored_offset", 0) :]
            text = gzip.decompress(rest) if kind == "gz" else _unzstd(rest)
            assert text[reject["offset"] :].startswith(b"not json")


def _unzstd(data: bytes) -> bytes:
    return zstandard.ZstdDecompressor().stream_reader(data, read_across_frames=True).read()


@pytest.mark.parametrize("kind", COMPRESS)
def test_one_frame_is_not_cut_and_the_plan_says_so(tmp_path: Path, tokenizer_json: Path, kind: str) -> None:
    path = tmp_path / f"in.jsonl.{kind}"
    path.write_bytes(COMPRESS[kind](text_lines(1)))
    plan = make_plan(find_inputs([str(path)])[0], load_tokenizer_file(tokenizer_json), Options(shard_bytes=2000))
    assert [shard.segments for shard in plan.shards] == [(Segment(0),)]
    assert "one frame each, or of very large ones, which one worker must read alone" in describe_plan(
        plan, tmp_path, Settings(), 1, 0
    )


@pytest.mark.parametrize("kind", COMPRESS)
def test_frame_inside_a_frame_is_an_error_and_no_lost_line(tmp_path: Path, tokenizer_json: Path, kind: str) -> None:
    noise, more = random.Random(0).randbytes(30_000), random.Random(1).randbytes(29_500)  # stored as they are
    frame = COMPRESS[kind](b'{"text": "inner"}\n').removeprefix(SKIPPABLE)
    path = tmp_path / f"in.jsonl.{kind}"
    for number, tail in enumerate((b"", COMPRESS[kind](b"another line\n"))):
        path.write_bytes(COMPRESS[kind](noise + frame + more) + tail)
        with pytest.raises(ToolError, match=r"no frame starts at byte \d+, where the plan cut it"):
            preprocess(tokenizer_json, path, tmp_path / f"{number}", "--on-error", "skip", "--shard-bytes", "31K")


def test_bytes_that_only_look_like_a_frame_are_no_cut(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl.gz"
    path.write_bytes(b"\x1f\x8b\x08\x00 not a member " * 50)
    assert find_cuts(str(path), path.stat().st_size, 4) == []
