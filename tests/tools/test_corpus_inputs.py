"""Finding inputs and cutting them into work shards: every line exactly once, in an order fixed by the names."""

import gzip
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import zstandard

from megatron_hybrid.tools.cli import ToolError
from megatron_hybrid.tools.corpus.inputs import find_inputs, source_name
from megatron_hybrid.tools.corpus.lines import LineBlock, LineCutter, LongLine
from megatron_hybrid.tools.corpus.plan import Options, load_plan, make_plan, save_plan
from megatron_hybrid.tools.corpus.tokenizer_file import load_tokenizer_file
from megatron_hybrid.tools.indexed_dataset import IndexedDatasetReader
from megatron_hybrid.tools.preprocess import main, parse_bytes, parser, run


def jsonl(texts: list[str]) -> bytes:
    return b"".join(json.dumps({"text": text, "id": f"id-{text[:8]}"}).encode() + b"\n" for text in texts)


def preprocess(tokenizer_json: Path, inputs: list[str], *options: str) -> dict[str, Any]:
    command = ["--tokenizer-model", str(tokenizer_json), "--append-eod", *options, "--input", *inputs]
    return run(parser().parse_args(command))


def decoded(prefix: Path, tokenizer_json: Path) -> list[str]:
    library = tokenizers.Tokenizer.from_file(str(tokenizer_json))
    reader = IndexedDatasetReader(prefix)
    return [library.decode(reader[index].tolist()[:-1]) for index in range(len(reader))]


# ---- lines ----


@pytest.mark.parametrize("seed", range(6))
def test_every_line_belongs_to_exactly_one_segment(seed: int) -> None:
    source = random.Random(seed)
    lines = [b"x" * source.choice([0, 0, 1, 5, 60]) for _ in range(200)]
    data = b"\n".join(lines) + (b"\n" if seed % 2 else b"")
    expected = lines if lines[-1] or seed % 2 else lines[:-1]
    cuts = sorted({0, len(data), *source.sample(range(len(data)), 25)})
    found: list[tuple[int, bytes]] = []
    for start, end in zip(cuts, [*cuts[1:-1], None], strict=False):
        begin = max(start - 1, 0)
        size = source.randint(1, 40)
        chunks = [data[at : at + size] for at in range(begin, len(data), size)]
        for block in LineCutter(chunks, start, end):
            assert isinstance(block, LineBlock)
            at = block.offset
            for line in block.lines:
                found.append((at, line))
                at += len(line) + 1
    assert [line for _, line in found] == expected
    assert all(data[at : at + len(line)] == line for at, line in found)


def test_long_lines_arrive_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_hybrid.tools.corpus import lines as module

    monkeypatch.setattr(module, "MAX_LINE_BYTES", 10)
    data = b"ab\n" + b"c" * 50 + b"\nde\n" + b"f" * 30
    for size in range(1, 60):
        found: list[tuple[int, bytes]] = []
        for block in LineCutter([data[at : at + size] for at in range(0, len(data), size)]):
            if isinstance(block, LongLine):
                found.append((block.offset, b"".join(block.pieces)))
            else:
                starts = accumulate((len(line) + 1 for line in block.lines), initial=block.offset)
                found += zip(starts, block.lines, strict=False)
        assert found == [(0, b"ab"), (3, b"c" * 50), (54, b"de"), (57, b"f" * 30)]


def test_long_line_left_unread_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_hybrid.tools.corpus import lines as module

    monkeypatch.setattr(module, "MAX_LINE_BYTES", 10)
    data = b"ab\n" + b"c" * 50 + b"\nde"
    blocks = list(LineCutter([data[at : at + 7] for at in range(0, len(data), 7)]))
    assert [block.lines for block in blocks if isinstance(block, LineBlock)] == [[b"ab"], [b"de"]]


# ---- files ----


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/data/web.jsonl.zst", "web"),
        ("/data/code/*.jsonl.gz", "code"),
        ("/data/wiki/", "wiki"),
        ("/data/**/*.parquet", "data"),
        ("s3://bucket/pes2o/part.json.gz", "part"),
        ("/data/a b.jsonl", "a-b"),
    ],
)
def test_source_is_named_after_the_path(path: str, name: str) -> None:
    assert source_name(path) == name


def test_folders_and_globs_are_sorted_and_other_files_are_counted(tmp_path: Path) -> None:
    for name in ("b/2.jsonl.gz", "b/1.jsonl", "a/9.json.zst", "a/notes.txt", ".hidden/x.jsonl", "c.parquet"):
        path = tmp_path / "corpus" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    files, ignored = find_inputs([str(tmp_path / "corpus")])
    names = [os.path.relpath(file.path, tmp_path / "corpus") for file in files]
    assert (names, ignored) == (["a/9.json.zst", "b/1.jsonl", "b/2.jsonl.gz", "c.parquet"], 1)
    files, _ = find_inputs([f"mine={tmp_path}/corpus/b/*"])
    assert [(file.source, Path(file.path).name) for file in files] == [("mine", "1.jsonl"), ("mine", "2.jsonl.gz")]


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("{}/absent.jsonl", r"--input \S*absent\.jsonl: no such file"),
        ("{}/*.jsonl", r"--input \S*\*\.jsonl: matches no file"),
        ("{}", r"--input \S*: a folder without \.jsonl"),
    ],
)
def test_input_that_is_not_there_is_named(tmp_path: Path, argument: str, message: str) -> None:
    with pytest.raises(ToolError, match=message):
        find_inputs([argument.format(tmp_path)])


@pytest.mark.parametrize(("text", "size"), [("5", 5), ("1K", 1024), ("1.5m", 3 << 19), ("2G", 2 << 30)])
def test_sizes_are_read_with_their_units(text: str, size: int) -> None:
    assert parse_bytes(text) == size


# ---- plans ----


def corpus(tmp_path: Path) -> list[str]:
    """Texts in a plain, a gzip and a zstd file and many tiny ones; returns them in the order of the paths."""
    texts = [f"document {number} " + "of words " * (number % 30) for number in range(600)]
    folder = tmp_path / "corpus"
    (folder / "tiny").mkdir(parents=True)
    (folder / "a.jsonl").write_bytes(jsonl(texts[:300]))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(jsonl(texts[300:400])))
    (folder / "c.jsonl.zst").write_bytes(zstandard.compress(jsonl(texts[400:500])))
    for number in range(100):
        (folder / "tiny" / f"{number:03}.jsonl").write_bytes(jsonl([texts[500 + number]]))
    return texts


@pytest.mark.parametrize(("shard_bytes", "workers"), [("2K", "1"), ("8K", "3"), ("1G", "3")])
def test_output_depends_on_neither_shards_nor_workers(
    tmp_path: Path, tokenizer_json: Path, shard_bytes: str, workers: str
) -> None:
    texts = corpus(tmp_path)
    options = ["--shard-bytes", shard_bytes, "--workers", workers, "--output-prefix", str(tmp_path / "data")]
    result = preprocess(tokenizer_json, [str(tmp_path / "corpus")], *options)
    assert decoded(tmp_path / "data", tokenizer_json) == texts
    assert (result["lines"], result["documents"]) == (600, 600)
    assert not (tmp_path / "data.work").exists()


def test_plan_is_the_same_in_any_order_of_the_disk_and_is_read_back(tmp_path: Path, tokenizer_json: Path) -> None:
    corpus(tmp_path)
    tokenizer = load_tokenizer_file(tokenizer_json)
    plans = [make_plan(find_inputs([str(tmp_path / "corpus")])[0], tokenizer, Options(shard_bytes=4096)) for _ in "ab"]
    assert plans[0] == plans[1]
    save_plan(plans[0], tmp_path)
    assert load_plan(tmp_path) == plans[0]
    cut = [shard for shard in plans[0].shards if shard.segments[0].end is not None]
    assert len(cut) > 5  # the plain file is read by several shards
    (tmp_path / "plan.json").write_text(
        (tmp_path / "plan.json").read_text().replace('"text_key": "text"', '"text_key": "x"')
    )
    with pytest.raises(ToolError, match=r"plan\.json: edited or damaged"):
        load_plan(tmp_path)


def test_sources_never_share_a_dataset_and_names_follow_the_content(tmp_path: Path, tokenizer_json: Path) -> None:
    for name, word in (("web", "page"), ("code", "line")):
        (tmp_path / f"{name}.jsonl").write_bytes(jsonl([f"{word} {number}" for number in range(50)]))
    inputs = [f"web={tmp_path}/web.jsonl", f"code={tmp_path}/code.jsonl"]
    first = preprocess(tokenizer_json, inputs, "--output-dir", str(tmp_path / "one"), "--shard-bytes", "1K")
    again = preprocess(tokenizer_json, inputs, "--output-dir", str(tmp_path / "two"), "--shard-bytes", "1K")
    assert [entry["source"] for entry in first["datasets"]] == ["web", "code"]
    assert [entry["prefix"] for entry in first["datasets"]] == [entry["prefix"] for entry in again["datasets"]]
    assert first["sources"]["web"]["documents"] == first["sources"]["code"]["documents"] == 50
    assert sum(entry["tokens"] for entry in first["datasets"]) == first["tokens"]
    assert [path.name for path in (tmp_path / "one" / "work").iterdir() if path.name == "shards"] == []
    with open(tmp_path / "web.jsonl", "ab") as handle:
        handle.write(jsonl(["one more"]))
    changed = preprocess(tokenizer_json, inputs, "--output-dir", str(tmp_path / "three"), "--shard-bytes", "1K")
    assert changed["datasets"][0]["prefix"] != first["datasets"][0]["prefix"]
    assert changed["datasets"][1]["prefix"] == first["datasets"][1]["prefix"]


def test_datasets_are_cut_at_the_size_asked_for_but_never_over_the_limit(
    tmp_path: Path, tokenizer_json: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_hybrid.tools.corpus import finish

    texts = [f"document {number}" for number in range(400)]
    (tmp_path / "in.jsonl").write_bytes(jsonl(texts))
    options = ["--shard-bytes", "1K", "--prefix-bytes", "1K", "--output-dir"]
    many = preprocess(tokenizer_json, [str(tmp_path / "in.jsonl")], *options, str(tmp_path / "many"))
    assert len(many["datasets"]) > 5
    monkeypatch.setattr(finish, "MAX_PREFIXES", 3)
    few = preprocess(tokenizer_json, [str(tmp_path / "in.jsonl")], *options, str(tmp_path / "few"))
    assert len(few["datasets"]) <= 3
    for result, folder in ((many, "many"), (few, "few")):
        found = [decoded(tmp_path / folder / entry["prefix"], tokenizer_json) for entry in result["datasets"]]
        assert list(chain(*found)) == texts


def test_metadata_keeps_step_with_the_documents(tmp_path: Path, tokenizer_json: Path) -> None:
    lines = [
        *(json.dumps({"text": f"document {number}", "id": number, "meta": {"a": [1]}}) for number in range(5)),
        '{"text": 5, "id": "rejected"}',
        '{"text": "no id"}',
        '{"text": "odd \\ud800", "id": "rejected"}',
        '{"text": "slow path", "id": NaN}',
    ]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    options = ["--on-error", "skip", "--max-rejected", "9", "--metadata-keys", "id", "meta", "--shard-bytes", "1K"]
    preprocess(tokenizer_json, [str(tmp_path / "in.jsonl")], *options, "--output-prefix", str(tmp_path / "data"))
    with zstandard.open(tmp_path / "data.meta.jsonl.zst", "rt", encoding="utf-8") as handle:
        entries = [json.loads(line) for line in handle]
    assert [entry["id"] for entry in entries[:6]] == [0, 1, 2, 3, 4, None]
    assert entries[0] == {"id": 0, "meta": {"a": [1]}}
    assert len(entries) == len(IndexedDatasetReader(tmp_path / "data")) == 7


def test_parquet_is_cut_by_row_groups(tmp_path: Path, tokenizer_json: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is in the extra `data`")
    pytest.importorskip("pyarrow.parquet")

    texts = [f"document {number} " * 20 for number in range(200)]
    table = pyarrow.table({"id": list(range(200)), "text": texts})
    pyarrow.parquet.write_table(table, tmp_path / "in.parquet", row_group_size=10, compression="zstd")
    options = ["--shard-bytes", "2K", "--metadata-keys", "id", "--output-prefix", str(tmp_path / "data")]
    result = preprocess(tokenizer_json, [str(tmp_path / "in.parquet")], *options)
    assert decoded(tmp_path / "data", tokenizer_json) == texts
    assert len(result["datasets"][0]["bin"]["parts"]) > 3
    with zstandard.open(tmp_path / "data.meta.jsonl.zst", "rt", encoding="utf-8") as handle:
        assert [json.loads(line)["id"] for line in handle] == list(range(200))


# ---- object storage ----


@pytest.fixture(scope="module")
def object_storage() -> Iterator[Callable[[str, bytes], str]]:
    """Starts an S3-compatible server; yields a function that stores an object and returns its URL."""
    pytest.importorskip("s3fs", reason="s3fs is in the extra `data`")
    server_module = pytest.importorskip("moto.server", reason="moto is in the extra `dev`")
    import boto3
    import s3fs

    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
    patch = pytest.MonkeyPatch()
    for name, value in {**keys, "AWS_ENDPOINT_URL": f"http://{host}:{port}"}.items():
        patch.setenv(name, value)
    client = boto3.client("s3")
    client.create_bucket(Bucket="corpus")

    def store(name: str, content: bytes) -> str:
        client.put_object(Bucket="corpus", Key=name, Body=content)
        s3fs.S3FileSystem.clear_instance_cache()
        return f"s3://corpus/{name}"

    yield store
    patch.undo()
    server.stop()


def test_object_storage_is_read_like_files(
    tmp_path: Path, tokenizer_json: Path, object_storage: Callable[[str, bytes], str]
) -> None:
    texts = [f"document {number} " * 5 for number in range(300)]
    object_storage("web/a.jsonl", jsonl(texts[:100]))
    object_storage("web/b.jsonl.zst", zstandard.compress(jsonl(texts[100:200])))
    object_storage("web/c.jsonl.gz", gzip.compress(jsonl(texts[200:])))
    object_storage("web/readme.txt", b"not text data")
    for number, url in enumerate(["s3://corpus/web/", "s3://corpus/web/*.jsonl*"]):
        prefix = tmp_path / f"data{number}"
        result = preprocess(tokenizer_json, [url], "--shard-bytes", "2K", "--output-prefix", str(prefix))
        assert (result["lines"], list(result["sources"])) == (300, ["web"])
        assert decoded(prefix, tokenizer_json) == texts


def test_datasets_are_copied_to_object_storage(
    tmp_path: Path,
    tokenizer_json: Path,
    object_storage: Callable[[str, bytes], str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import s3fs

    (tmp_path / "in.jsonl").write_bytes(jsonl(["a text", "another"]) + b"not json\n")
    words = ["--input", str(tmp_path / "in.jsonl"), "--output-dir", str(tmp_path / "out"), "--on-error", "skip"]
    words += ["--tokenizer-model", str(tokenizer_json), "--max-rejected", "9", "--metadata-keys", "id"]

    def command(url: str) -> str:
        monkeypatch.setattr("sys.argv", ["preprocess", *words, "--upload-to", url])
        main()
        return capsys.readouterr().out

    with pytest.raises(ToolError, match=r"--upload-to /there: not a URL"):
        command("/there")
    assert not (tmp_path / "out").exists()
    command("s3://corpus/tokens")
    files = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.is_file()}
    assert {name.rpartition(".")[2] for name in files} == {"bin", "idx", "zst", "jsonl", "json"}
    store = s3fs.S3FileSystem()
    assert {path.rpartition("/")[2]: store.cat(path) for path in store.ls("corpus/tokens")} == files
    changed = next(name for name in files if name.endswith(".bin"))
    object_storage(f"tokens/{changed}", bytes(len(files[changed])))  # a copy of the right size, and wrong
    assert "s3://corpus/tokens: 0.0 MB copied" in command("s3://corpus/tokens")
    assert s3fs.S3FileSystem().cat(f"corpus/tokens/{changed}") == files[changed]
    with pytest.raises(ToolError, match=r"--upload-to s3://absent/x: \S+\.bin: "):
        command("s3://absent/x")


def test_faults_of_object_storage_are_named(
    tmp_path: Path, tokenizer_json: Path, object_storage: Callable[[str, bytes], str]
) -> None:
    with pytest.raises(ToolError, match=r"--input s3://corpus/absent: nothing there"):
        find_inputs(["s3://corpus/absent"])
    cut = object_storage("cut.jsonl.gz", gzip.compress(jsonl(["text"] * 5000))[:-20])
    with pytest.raises(ToolError, match=r"s3://corpus/cut\.jsonl\.gz: truncated or corrupt"):
        preprocess(tokenizer_json, [cut], "--on-error", "skip", "--output-prefix", str(tmp_path / "data"))
    with pytest.raises(ToolError, match=r"--input nothing://x: .*install the driver"):
        find_inputs(["nothing://x"])


# ---- the command line ----


def test_plan_run_status_and_finish(
    tmp_path: Path, tokenizer_json: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus(tmp_path)

    def command(*words: str) -> str:
        monkeypatch.setattr("sys.argv", ["preprocess", *words, "--output-dir", str(tmp_path / "out")])
        main()
        return capsys.readouterr().out

    options = ["--input", str(tmp_path / "corpus"), "--tokenizer-model", str(tokenizer_json), "--shard-bytes", "8K"]
    plan = command("plan", *options, "--append-eod", "--calibrate-seconds", "0.1")
    assert "103 files" in plan and "core-hours" in plan
    assert "0/" in command("status")
    with pytest.raises(ToolError, match="shards are not done"):
        command("finish")
    command("work", "--run-id", "job")
    assert "600 lines = 600 documents + 0 rejected" in command("finish")
    assert "600 lines = 600 documents" in command()  # nothing left to do


def test_planning_imports_neither_torch_nor_megatron_nor_encoders(tmp_path: Path, tokenizer_json: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(jsonl(["a text"]))
    script = (
        "import sys\n"
        "from megatron_hybrid.tools import preprocess\n"
        "preprocess.main()\n"
        "heavy = {'torch', 'megatron', 'transformers', 'tokenizers', 'fastokens', 'pyarrow'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    words = ["plan", "--input", str(tmp_path / "in.jsonl"), "--output-dir", str(tmp_path / "out")]
    words += ["--tokenizer-model", str(tokenizer_json), "--calibrate-seconds", "0"]
    result = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"
