"""Thirty-odd kinds of bad input: each ends with the expected counts, or with an error that names it; none hangs."""

import base64
import gzip
import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import zstandard

from megatron_hybrid.tools.cli import ToolError
from megatron_hybrid.tools.corpus import documents, encoders, lines
from megatron_hybrid.tools.indexed_dataset import IndexedDatasetReader
from megatron_hybrid.tools.preprocess import parser, run

GOOD = [f"document {number} of the quick brown fox" for number in range(10)]
TIME_LIMIT_S = 60


@pytest.fixture(autouse=True)
def no_hang() -> Iterator[None]:
    """A run that hangs is killed by the alarm, which fails the test session loudly."""
    signal.alarm(TIME_LIMIT_S)
    yield
    signal.alarm(0)


def line(text: Any) -> bytes:
    return json.dumps({"text": text}).encode()


def with_fault(fault: bytes) -> bytes:
    """Ten good documents, `fault` as the sixth line."""
    return b"\n".join([*map(line, GOOD[:5]), fault, *map(line, GOOD[5:])]) + b"\n"


def preprocess(tmp_path: Path, tokenizer_json: Path, inputs: list[Path], *options: str) -> dict[str, Any]:
    command = ["--tokenizer-model", str(tokenizer_json), "--output-prefix", str(tmp_path / "data"), "--append-eod"]
    return run(parser().parse_args([*command, *options, "--input", *map(str, inputs)]))


def decoded(tmp_path: Path, tokenizer_json: Path) -> list[str]:
    """The texts in the dataset; every document must end with the end-of-document token."""
    library = tokenizers.Tokenizer.from_file(str(tokenizer_json))
    reader = IndexedDatasetReader(tmp_path / "data")
    all_ids = [reader[index].tolist() for index in range(len(reader))]
    assert {ids[-1] for ids in all_ids} == {library.token_to_id("<|endoftext|>")}
    return [library.decode(ids[:-1], skip_special_tokens=False) for ids in all_ids]


LINE_FAULTS = {
    "cut-json": (b'{"text": "cut', "malformed_json"),
    "two-objects-on-a-line": (b'{"text": "a"} {"text": "b"}', "malformed_json"),
    "trailing-comma": (b'{"text": "a",}', "malformed_json"),
    "single-quotes": (b"{'text': 'a'}", "malformed_json"),
    "raw-control-character": (b'{"text": "a\x01b"}', "malformed_json"),
    "raw-nul": (b'{"text": "a\x00b"}', "malformed_json"),
    "bad-escape": (b'{"text": "\\q"}', "malformed_json"),
    "nesting-too-deep": (b'{"x": ' + b"[" * 100_000 + b'], "text": "a"}', "malformed_json"),
    "byte-order-mark-inside": (b'\xef\xbb\xbf{"text": "a"}', "malformed_json"),
    "nuls-of-a-hole": (b"\0" * 4096, "malformed_json"),
    "array": (b'["a"]', "not_an_object"),
    "bare-string": (b'"a"', "not_an_object"),
    "null-line": (b"null", "not_an_object"),
    "missing-key": (b'{"content": "a"}', "missing_key"),
    "null-text": (b'{"text": null}', "wrong_type"),
    "number-text": (b'{"text": 5}', "wrong_type"),
    "list-text": (b'{"text": ["a"]}', "wrong_type"),
    "object-text": (b'{"text": {"text": "a"}}', "wrong_type"),
    "invalid-utf8": (b'{"text": "\xff"}', "invalid_utf8"),
    "surrogate-as-bytes": (b'{"text": "\xed\xa0\x80"}', "invalid_utf8"),
    "latin-1": ('{"text": "\u00fcber"}'.encode("latin-1"), "invalid_utf8"),
    "overlong-utf8": (b'{"text": "\xc0\xaf"}', "invalid_utf8"),
    "utf16": ('{"text": "a"}'.encode("utf-16-be").replace(b"\n", b""), "malformed_json"),
    "lone-surrogate": (b'{"text": "a\\ud800b"}', "lone_surrogate"),
    "surrogates-swapped": (b'{"text": "\\udf89\\ud83c"}', "lone_surrogate"),
    "empty-text": (b'{"text": ""}', "empty_text"),
    "blank-line": (b"", "blank_line"),
    "white-space-line": (b" \t\r", "blank_line"),
}


@pytest.mark.parametrize("kind", LINE_FAULTS)
def test_bad_line_costs_itself_alone_and_is_listed(tmp_path: Path, tokenizer_json: Path, kind: str) -> None:
    fault, reason = LINE_FAULTS[kind]
    source = tmp_path / "in.jsonl"
    source.write_bytes(with_fault(fault))
    result = preprocess(tmp_path, tokenizer_json, [source], "--on-error", "quarantine", "--max-rejected", "1")
    assert (result["lines"], result["documents"], result["rejected"]) == (11, 10, {reason: 1})
    assert decoded(tmp_path, tokenizer_json) == GOOD
    rejects = tmp_path / "data.rejects.jsonl"
    if reason == "blank_line":
        assert not rejects.exists()
    else:
        (entry,) = map(json.loads, rejects.read_text().splitlines())
        place = source.read_bytes()[entry["offset"] :]
        assert place.startswith(fault + b"\n") and base64.b64decode(entry["base64"]) == fault
        assert (entry["source"], entry["line"], entry["reason"]) == ("in", 6, reason)


@pytest.mark.parametrize("kind", [kind for kind, (_, reason) in LINE_FAULTS.items() if reason != "blank_line"])
def test_bad_line_ends_the_run_by_default(tmp_path: Path, tokenizer_json: Path, kind: str) -> None:
    source = tmp_path / "in.jsonl"
    source.write_bytes(with_fault(LINE_FAULTS[kind][0]))
    with pytest.raises(ToolError, match=rf"in\.jsonl:6: {LINE_FAULTS[kind][1]}: .*--on-error skip"):
        preprocess(tmp_path, tokenizer_json, [source])
    assert not list(tmp_path.glob("data*"))


STRANGE_BUT_GOOD = {
    "nul-escape": (b'{"text": "a\\u0000b"}', "a\0b"),
    "surrogate-pair": (b'{"text": "\\ud83c\\udf89"}', "\U0001f389"),
    "carriage-return-at-the-end": (b'{"text": "a"}\r', "a"),
    "not-a-number-beside-it": (b'{"score": NaN, "text": "a"}', "a"),
    "bad-surrogate-beside-it": (b'{"title": "\\ud800", "text": "a"}', "a"),
    "key-twice": (b'{"text": "first", "text": "a"}', "a"),
    "escaped-key": (b'{"te\\u0078t": "a"}', "a"),
    "one-space": (b'{"text": " "}', " "),
    "special-literal": (b'{"text": "<|endoftext|>"}', "<|endoftext|>"),
}


@pytest.mark.parametrize("kind", STRANGE_BUT_GOOD)
def test_strange_line_is_a_document(tmp_path: Path, tokenizer_json: Path, kind: str) -> None:
    raw, text = STRANGE_BUT_GOOD[kind]
    source = tmp_path / "in.jsonl"
    source.write_bytes(with_fault(raw))
    result = preprocess(tmp_path, tokenizer_json, [source])
    assert (result["lines"], result["documents"], result["rejected"]) == (11, 11, {})
    assert decoded(tmp_path, tokenizer_json) == [*GOOD[:5], text, *GOOD[5:]]
    assert result["sources"]["in"]["special_literals"] == (1 if kind == "special-literal" else 0)


def test_special_literals_can_be_kept(tmp_path: Path, tokenizer_json: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_bytes(line("a<|endoftext|>b"))
    preprocess(tmp_path, tokenizer_json, [source], "--special-tokens", "keep")
    end = tokenizers.Tokenizer.from_file(str(tokenizer_json)).token_to_id("<|endoftext|>")
    assert IndexedDatasetReader(tmp_path / "data")[0].tolist().count(end) == 2


@pytest.mark.parametrize("newline", [b"\n", b""], ids=["newline-at-the-end", "no-newline-at-the-end"])
@pytest.mark.parametrize("mark", [b"\xef\xbb\xbf", b""], ids=["byte-order-mark", "no-mark"])
def test_start_and_end_of_a_file(tmp_path: Path, tokenizer_json: Path, newline: bytes, mark: bytes) -> None:
    source = tmp_path / "in.jsonl"
    source.write_bytes(mark + b"\n".join(map(line, GOOD)) + newline)
    assert preprocess(tmp_path, tokenizer_json, [source])["lines"] == 10
    assert decoded(tmp_path, tokenizer_json) == GOOD


# ---- files ----


def compressed(suffix: str, content: bytes) -> bytes:
    if suffix == ".gz":
        return gzip.compress(content)
    return zstandard.ZstdCompressor(write_checksum=True).compress(content)


def parquet(path: Path, texts: list[Any], name: str = "text", kind: Any = None) -> Path:
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is in the extra `data`")
    pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({name: pyarrow.array(texts, type=kind), "id": list(range(len(texts)))})
    pyarrow.parquet.write_table(table, path, row_group_size=4)
    return path


MANY = [f"{text} {number}" for number in range(300) for text in GOOD]


@pytest.mark.parametrize("on_error", ["fail", "skip", "quarantine"])
@pytest.mark.parametrize("damage", ["truncated", "corrupt"])
@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_damaged_compressed_file_fails_under_every_policy(
    tmp_path: Path, tokenizer_json: Path, suffix: str, damage: str, on_error: str
) -> None:
    source = tmp_path / f"in.jsonl{suffix}"
    content = bytearray(compressed(suffix, b"\n".join(map(line, MANY)) + b"\n"))
    if damage == "truncated":
        del content[-len(content) // 3 :]
    else:
        content[len(content) // 2 : len(content) // 2 + 40] = b"\xa5" * 40
    source.write_bytes(content)
    with pytest.raises(ToolError, match=r"in\.jsonl\.\w+: truncated or corrupt after line \d+"):
        preprocess(tmp_path, tokenizer_json, [source], "--on-error", on_error)
    assert not list(tmp_path.glob("data.[bij]*"))


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_salvage_keeps_the_whole_lines_and_says_so(tmp_path: Path, tokenizer_json: Path, suffix: str) -> None:
    source = tmp_path / f"in.jsonl{suffix}"
    content = b"".join(compressed(suffix, b"\n".join(map(line, part)) + b"\n") for part in (MANY[:1000], MANY[1000:]))
    source.write_bytes(content[:-30])
    result = preprocess(tmp_path, tokenizer_json, [source], "--on-error", "skip", "--salvage-truncated")
    assert result["rejected"] == {"truncated_stream": 1}
    assert result["lines"] == result["documents"] + 1
    assert result["documents"] >= 1000
    assert decoded(tmp_path, tokenizer_json) == MANY[: result["documents"]]


def test_zeros_after_a_gzip_member_are_padding(tmp_path: Path, tokenizer_json: Path) -> None:
    source = tmp_path / "in.jsonl.gz"
    source.write_bytes(gzip.compress(b"\n".join(map(line, GOOD))) + b"\0" * 512)
    assert preprocess(tmp_path, tokenizer_json, [source])["documents"] == 10


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize(("content", "message"), [(b"", "is empty"), (b'{"text": "a"}\n', "starts with")])
def test_content_that_belies_the_suffix_fails(
    tmp_path: Path, tokenizer_json: Path, suffix: str, content: bytes, message: str
) -> None:
    source = tmp_path / f"in.jsonl{suffix}"
    source.write_bytes(content)
    with pytest.raises(ToolError, match=rf"in\.jsonl\{suffix}: named \{suffix}, but the file {message}"):
        preprocess(tmp_path, tokenizer_json, [source], "--on-error", "skip")


def test_compressed_content_without_the_suffix_is_recognised(tmp_path: Path, tokenizer_json: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_bytes(gzip.compress(b"\n".join(map(line, MANY))))
    assert preprocess(tmp_path, tokenizer_json, [source], "--shard-bytes", "1K")["documents"] == len(MANY)


def test_empty_files_among_others_hold_no_lines(tmp_path: Path, tokenizer_json: Path) -> None:
    empty, good = tmp_path / "empty.jsonl", tmp_path / "good.jsonl"
    empty.write_bytes(b"")
    good.write_bytes(b"\n".join(map(line, GOOD)))
    packed = tmp_path / "packed.jsonl.zst"
    packed.write_bytes(compressed(".zst", b""))
    result = preprocess(tmp_path, tokenizer_json, [empty, good, packed], "--shard-bytes", "1K")
    assert (result["lines"], result["documents"]) == (10, 10)
    assert [entry["lines"] for entry in result["files"]] == [0, 10, 0]
    assert decoded(tmp_path, tokenizer_json) == GOOD


def test_one_bad_file_does_not_stop_the_others(tmp_path: Path, tokenizer_json: Path) -> None:
    bad, good = tmp_path / "bad.jsonl.gz", tmp_path / "good.jsonl"
    bad.write_bytes(compressed(".gz", b"\n".join(map(line, MANY)))[:-50])
    good.write_bytes(b"\n".join(map(line, GOOD)))
    with pytest.raises(ToolError, match=r"bad\.jsonl\.gz: truncated"):
        preprocess(tmp_path, tokenizer_json, [bad, good], "--on-error", "skip")
    events = [
        json.loads(entry.partition(" ")[2])
        for path in (tmp_path / "data.work" / "ledger").iterdir()
        for entry in path.read_text().splitlines()
    ]
    assert sorted((event["event"], event["shard"]) for event in events) == [("done", 1), ("failed", 0)]


def test_file_changed_since_it_was_planned_fails(tmp_path: Path, tokenizer_json: Path) -> None:
    from megatron_hybrid.tools import preprocess as tool

    source = tmp_path / "in.jsonl"
    source.write_bytes(b"\n".join(map(line, GOOD)))
    command = ["--tokenizer-model", str(tokenizer_json), "--output-dir", str(tmp_path / "out"), "--input", str(source)]
    tool.make_or_load_plan(parser("plan").parse_args(command))
    source.write_bytes(b"\n".join(map(line, GOOD[:9])))
    with pytest.raises(ToolError, match=r"in\.jsonl: changed since it was planned"):
        run(parser().parse_args(["--output-dir", str(tmp_path / "out")]))
    with pytest.raises(ToolError, match=r"planned otherwise: \S*in\.jsonl differs .*choose another output"):
        run(parser().parse_args(command))


# ---- Parquet ----


def test_parquet_rows_are_lines(tmp_path: Path, tokenizer_json: Path) -> None:
    source = parquet(tmp_path / "in.parquet", [*GOOD[:5], None, "", *GOOD[5:]])
    result = preprocess(tmp_path, tokenizer_json, [source], "--on-error", "skip", "--max-rejected", "2")
    assert (result["lines"], result["rejected"]) == (12, {"empty_text": 1, "wrong_type": 1})
    assert decoded(tmp_path, tokenizer_json) == GOOD
    rejects = [json.loads(entry) for entry in (tmp_path / "data.rejects.jsonl").read_text().splitlines()]
    assert [(entry["offset"], entry["reason"]) for entry in rejects] == [(5, "wrong_type"), (6, "empty_text")]


def test_parquet_string_that_is_no_utf8_is_rejected(tmp_path: Path, tokenizer_json: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is in the extra `data`")
    raw = pyarrow.array([*(text.encode() for text in GOOD), b"\xff\xfe"], type=pyarrow.binary())
    source = tmp_path / "in.parquet"
    pytest.importorskip("pyarrow.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"text": raw.view(pyarrow.string())}), source)
    result = preprocess(tmp_path, tokenizer_json, [source], "--on-error", "skip", "--max-rejected", "1")
    assert (result["documents"], result["rejected"]) == (10, {"invalid_utf8": 1})


def test_parquet_faults_of_the_file_fail(tmp_path: Path, tokenizer_json: Path) -> None:
    whole = parquet(tmp_path / "whole.parquet", GOOD)
    cut = tmp_path / "cut.parquet"
    cut.write_bytes(whole.read_bytes()[:-40])
    with pytest.raises(ToolError, match=r"cut\.parquet: truncated or not a Parquet file"):
        preprocess(tmp_path, tokenizer_json, [cut], "--on-error", "skip")
    other = parquet(tmp_path / "other.parquet", GOOD, name="content")
    with pytest.raises(ToolError, match=r"other\.parquet: no column 'text'; it has 'content', 'id'"):
        preprocess(tmp_path, tokenizer_json, [other], "--on-error", "skip", "--output-prefix", str(tmp_path / "b"))
    numbers = parquet(tmp_path / "numbers.parquet", list(range(10)))
    with pytest.raises(ToolError, match=r"10 of 10 lines rejected .wrong_type 10., more than --max-rejected"):
        preprocess(tmp_path, tokenizer_json, [numbers], "--on-error", "skip", "--output-prefix", str(tmp_path / "c"))


def test_corrupt_parquet_page_fails(tmp_path: Path, tokenizer_json: Path) -> None:
    source = parquet(tmp_path / "in.parquet", MANY)
    content = bytearray(source.read_bytes())
    content[200:1200] = b"\xa5" * 1000
    source.write_bytes(content)
    with pytest.raises(ToolError, match=r"in\.parquet: "):
        preprocess(tmp_path, tokenizer_json, [source], "--on-error", "skip")


# ---- long lines ----


@pytest.fixture
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines over 4 kB are long, so that the path for long lines is tested on short ones."""
    from megatron_hybrid.tools.corpus import long_lines, shard, streams

    monkeypatch.setattr(lines, "MAX_LINE_BYTES", 4000)
    monkeypatch.setattr(streams, "CHUNK_BYTES", 1000)
    monkeypatch.setattr(long_lines, "PIECE_BYTES", 700)
    monkeypatch.setattr(shard, "PIECE_CHARACTERS", 500)
    monkeypatch.setattr(encoders, "PIECE_CHARACTERS", 500)
    monkeypatch.setattr(long_lines, "SKELETON_BYTES", 6000)


LONG_WORDS = 'some words, a \\ "quote" \n and \t tabs é 漢字 🎉 ' * 700
LONG_LINES = {
    "words": line(LONG_WORDS),
    "raw-utf8": json.dumps({"text": LONG_WORDS}, ensure_ascii=False).encode(),
    "key-last": b'{"id": [1, {"text": "x"}], "other": "text", ' + line(LONG_WORDS)[1:],
    "key-first": line(LONG_WORDS)[:-1] + b', "text2": {"text": [1, "text"]}}',
    "number-before-it": b'{"n": 5, "s": "text", "t": null, ' + line(LONG_WORDS)[1:],
    "escapes-all-along": line(("\U0001f389" * 300 + "\n" + "漢" * 300 + "\\\n" * 40 + "a b ") * 20),
}


@pytest.mark.usefixtures("small_limits")
@pytest.mark.parametrize("kind", LONG_LINES)
def test_long_line_gives_the_same_document_as_a_short_one(tmp_path: Path, tokenizer_json: Path, kind: str) -> None:
    source = tmp_path / "in.jsonl"
    source.write_bytes(with_fault(LONG_LINES[kind]))
    result = preprocess(tmp_path, tokenizer_json, [source])
    assert (result["lines"], result["documents"], result["rejected"]) == (11, 11, {})
    text = json.loads(LONG_LINES[kind])["text"]
    library = tokenizers.Tokenizer.from_file(str(tokenizer_json))
    assert IndexedDatasetReader(tmp_path / "data")[5].tolist()[:-1] == library.encode(text).ids
    assert decoded(tmp_path, tokenizer_json)[6:] == GOOD[5:]


LONG_FAULTS = {
    "no-object": (b'"' + b"x" * 30_000 + b'"', "document_too_long"),
    "brace-missing": (line(LONG_WORDS)[:-1], "malformed_json"),
    "string-not-closed": (line(LONG_WORDS)[:-2], "document_too_long"),
    "garbage-after-it": (line(LONG_WORDS) + b" x", "malformed_json"),
    "invalid-utf8": (line(LONG_WORDS)[:-3] + b'\xff"}', "invalid_utf8"),
    "lone-surrogate": (line(LONG_WORDS)[:-3] + b'\\ud800"}', "lone_surrogate"),
    "control-character": (line(LONG_WORDS)[:-3] + b'\x01"}', "malformed_json"),
    "other-key": (b'{"tex": ' + line("a b " * 9000)[9:], "document_too_long"),
    "wrong-type": (b'{"text": [' + b"1," * 9000 + b"1]}", "document_too_long"),
    "two-values": (line(LONG_WORDS)[:-1] + b', "text": null}', "wrong_type"),
}


@pytest.mark.usefixtures("small_limits")
@pytest.mark.parametrize("kind", LONG_FAULTS)
def test_long_line_that_is_no_document_is_rejected(tmp_path: Path, tokenizer_json: Path, kind: str) -> None:
    fault, reason = LONG_FAULTS[kind]
    source = tmp_path / "in.jsonl"
    source.write_bytes(with_fault(fault))
    result = preprocess(tmp_path, tokenizer_json, [source], "--on-error", "skip", "--max-rejected", "1")
    assert (result["lines"], result["documents"], result["rejected"]) == (11, 10, {reason: 1})
    assert decoded(tmp_path, tokenizer_json) == GOOD


@pytest.mark.usefixtures("small_limits")
def test_long_text_that_cannot_be_cut_is_rejected(
    tmp_path: Path, tokenizer_json: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_hybrid.tools.corpus import shard

    monkeypatch.setattr(encoders, "MAX_WHOLE_CHARACTERS", 3000)
    monkeypatch.setattr(shard, "MAX_WHOLE_CHARACTERS", 3000)
    source = tmp_path / "in.jsonl"
    source.write_bytes(with_fault(line("words and " * 500 + "x" * 20_000)))
    result = preprocess(tmp_path, tokenizer_json, [source], "--on-error", "skip", "--max-rejected", "1")
    assert (result["lines"], result["documents"], result["rejected"]) == (11, 10, {"document_too_long": 1})
    assert decoded(tmp_path, tokenizer_json) == GOOD


# ---- the threshold ----


@pytest.mark.parametrize(("limit", "passes"), [("3", True), ("2", False), ("0.3", True), ("0.2", False), ("0", False)])
def test_threshold_of_rejected_lines(tmp_path: Path, tokenizer_json: Path, limit: str, passes: bool) -> None:
    source = tmp_path / "in.jsonl"
    source.write_bytes(b"\n".join([*map(line, GOOD[:7]), b"x", b"y", b"z", b""]) + b"\n")
    options = ["--on-error", "skip", "--max-rejected"]
    if passes:
        assert preprocess(tmp_path, tokenizer_json, [source], *options, limit)["documents"] == 7
        return
    with pytest.raises(ToolError, match=r"source in: 3 of 11 lines rejected \(blank_line 1, malformed_json 3\)"):
        preprocess(tmp_path, tokenizer_json, [source], *options, limit)
    assert not (tmp_path / "data.bin").exists()
    assert preprocess(tmp_path, tokenizer_json, [source], *options, "3")["documents"] == 7  # nothing done twice


def test_parser_judges_a_line_alike_in_any_block(tokenizer_json: Path) -> None:
    from megatron_hybrid.tools.corpus.plan import Options

    parse = documents.LineParser(Options())
    odd = b'{"text": "a", "other": "\xff"}'  # only the text must be valid
    for others in ([], [b"malformed"], [b""]):
        block = lines.LineBlock([odd, *others], 1, 0)
        assert parse.block(block, lambda *ignored: None).texts == ["a"]
