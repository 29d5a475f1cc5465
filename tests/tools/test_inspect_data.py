"""Looking into datasets: every damage is one line that names the file, and merging equals building at once."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megatron_hybrid.tools import inspect_data, preprocess
from megatron_hybrid.tools.cli import ToolError
from megatron_hybrid.tools.corpus.concatenate import concatenate
from megatron_hybrid.tools.corpus.verify import Expectations, expectations_of, verify_dataset
from megatron_hybrid.tools.indexed_dataset import DatasetError, IndexedDatasetReader, IndexedDatasetWriter

EOD = 9
DOCUMENTS = [[5, 4, 3, EOD], [EOD], [7, 8, EOD], [*range(10, 400), EOD], [1, EOD]]
Command = Callable[..., str]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs a command line of inspect_data and returns what it printed."""

    def run(*words: object) -> str:
        monkeypatch.setattr("sys.argv", ["inspect_data", *map(str, words)])
        inspect_data.main()
        return capsys.readouterr().out

    return run


def write(prefix: Path, documents: list[list[int]] = DOCUMENTS, vocab_size: int = 1000) -> Path:
    with IndexedDatasetWriter(prefix, vocab_size) as writer:
        for document in documents:
            writer.add_document(document)
        writer.commit()
    return prefix


@pytest.fixture
def preprocessed(tmp_path: Path, tokenizer_json: Path) -> Path:
    """A folder of two datasets with their manifest."""
    for name in ("web", "code"):
        lines = [json.dumps({"text": f"{name} document {number} of words"}) for number in range(200)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    words = [
        "--input",
        str(tmp_path / "web.jsonl"),
        str(tmp_path / "code.jsonl"),
        "--output-dir",
        str(tmp_path / "out"),
    ]
    words += ["--tokenizer-model", str(tokenizer_json), "--append-eod", "--shard-bytes", "2K"]
    preprocess.run(preprocess.parser().parse_args(words))
    return tmp_path / "out"


def test_info_of_datasets_and_folders(tmp_path: Path, command: Command) -> None:
    write(tmp_path / "a")
    write(tmp_path / "b", vocab_size=100_000)
    assert "a: 5 documents, 5 sequences, 401 tokens (uint16)" in command("info", tmp_path / "a")
    text = command("info", tmp_path)
    assert "401 tokens (int32)" in text and "all: 10 documents, 802 tokens" in text


def test_verify_uses_the_manifest(preprocessed: Path, command: Command) -> None:
    text = command("verify", preprocessed)
    assert text.count("whole;") == 2 and text.count("hashes of .bin") == 2
    assert "end-of-document id" in text and "ids below" in text


DAMAGE = {
    "bit-flip-in-bin": (".bin", lambda data: data[:50] + bytes([data[50] ^ 1]) + data[51:], "do not have the hash"),
    "bit-flip-in-idx": (".idx", lambda data: data[:36] + bytes([data[36] ^ 1]) + data[37:], "starts at byte"),
    "bin-cut": (".bin", lambda data: data[:-2], "bytes where"),
    "bin-longer": (".bin", lambda data: data + b"\0\0", "bytes where"),
    "idx-cut": (".idx", lambda data: data[:-8], "bytes where"),
    "header-only": (".idx", lambda data: data[:20], "truncated"),
    "zeros": (".bin", lambda data: bytes(len(data)), "do not have the hash"),
    "bytes-swapped": (".bin", lambda data: np.frombuffer(data, "<u2").byteswap().tobytes(), "outside the vocabulary"),
    "wrong-dtype": (".idx", lambda data: data[:17] + b"\x04" + data[18:], "bytes where"),
    "signed-dtype": (".idx", lambda data: data[:17] + b"\x03" + data[18:], "hash is not that of the manifest"),
    "empty": (".bin", lambda data: b"", "bytes where"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_verify_names_the_damaged_file_in_one_line(
    preprocessed: Path, command: Command, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    suffix, damage, message = DAMAGE[kind]
    path = sorted(preprocessed.glob(f"*{suffix}"))[1]
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ToolError, match="1 of 2 datasets are damaged"):
        command("verify", preprocessed)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert str(path.with_suffix("")) in line and message in line


def test_verify_finds_swapped_files(preprocessed: Path) -> None:
    one, other = sorted(preprocessed.glob("*.bin"))
    if one.stat().st_size != other.stat().st_size:
        os.truncate(one, min(one.stat().st_size, other.stat().st_size))
    one_bytes = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(one_bytes)
    for path in (one, other):
        prefix = str(path.with_suffix(""))
        with pytest.raises(DatasetError, match=path.name.replace(".bin", r"\.\w+")):
            verify_dataset(prefix, expectations_of(prefix, Expectations()))


def test_verify_without_a_manifest_checks_ids_and_ends(tmp_path: Path) -> None:
    prefix = str(write(tmp_path / "a"))
    assert verify_dataset(prefix, Expectations(400, EOD)).max_id == 399
    with pytest.raises(
        DatasetError, match=r"a\.bin: id 399 at token 397 \(document 3\), outside the vocabulary of 399"
    ):
        verify_dataset(prefix, Expectations(399, EOD))
    with pytest.raises(DatasetError, match=r"a\.bin: document 0 does not end with the end-of-document id 8"):
        verify_dataset(prefix, Expectations(400, 8))
    missing = str(write(tmp_path / "b", [*DOCUMENTS, [3], [EOD]]))
    with pytest.raises(DatasetError, match=r"b\.bin: document 5 does not end"):
        verify_dataset(missing, Expectations(400, EOD))
    empty = str(write(tmp_path / "c", [*DOCUMENTS, [], [EOD]]))
    with pytest.raises(DatasetError, match=r"c\.bin: document 5 does not end"):
        verify_dataset(empty, Expectations(400, EOD))


def test_show_marks_the_boundaries(preprocessed: Path, tokenizer_json: Path, command: Command) -> None:
    prefix = sorted(preprocessed.glob("web*.idx"))[0].with_suffix("")
    text = command("show", prefix, "--tokenizer-model", tokenizer_json, "--documents", "3", "-1")
    assert "web document 3 of words\n---- end-of-document token ----" in text
    assert "---- document 199:" in text and "web document 199 of words" in text
    with pytest.raises(ToolError, match=r"--documents 200: \S+ has 200 documents, 0 to 199"):
        command("show", prefix, "--tokenizer-model", tokenizer_json, "--documents", "200")


def test_stats_count_documents_by_length(tmp_path: Path, command: Command) -> None:
    text = command("stats", write(tmp_path / "a"), write(tmp_path / "b", [[1, 2, 3]]), "--png", tmp_path / "a.png")
    rows = [row.split() for row in text.splitlines() if " documents " in row]
    assert [(row[0], row[2], int(row[4])) for row in rows if int(row[4])] == [
        ("1", "1", 1),
        ("2", "3", 3),
        ("4", "7", 1),
        ("256", "511", 1),
    ]
    assert f"{tmp_path / 'a'}: 401 tokens, 99.26%" in text
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        pytest.param(DOCUMENTS, None, id="same"),
        pytest.param(
            [*DOCUMENTS[:3], [*range(10, 399), 5, EOD], [1, EOD]], r"document 3 differs at its token 389", id="token"
        ),
        pytest.param([*DOCUMENTS[:2], [7, EOD], *DOCUMENTS[3:]], "document 2 has 3 tokens in .*, 2 in", id="length"),
        pytest.param(DOCUMENTS[:4], "has 5 documents, .* 4; the first 4 are the same", id="fewer"),
    ],
)
def test_diff_finds_the_first_difference(
    tmp_path: Path, command: Command, documents: list[list[int]], message: str | None
) -> None:
    write(tmp_path / "a")
    write(tmp_path / "b", documents, vocab_size=100_000)
    if message is None:
        assert "hold the same documents" in command("diff", tmp_path / "a", tmp_path / "b")
    else:
        with pytest.raises(ToolError, match=message):
            command("diff", tmp_path / "a", tmp_path / "b")


def test_merge_equals_building_at_once(tmp_path: Path, command: Command) -> None:
    write(tmp_path / "a", DOCUMENTS[:2])
    write(tmp_path / "b", DOCUMENTS[2:4])
    write(tmp_path / "c", DOCUMENTS[4:])
    write(tmp_path / "all")
    command("merge", tmp_path / "a", tmp_path / "b", tmp_path / "c", "--output-prefix", tmp_path / "merged")
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"merged{suffix}").read_bytes() == (tmp_path / f"all{suffix}").read_bytes()
    with pytest.raises(ToolError, match=r"merged\.bin exists"):
        command("merge", tmp_path / "a", "--output-prefix", tmp_path / "merged")


def test_merge_equals_megatrons_builder_with_many_sequences_per_document(tmp_path: Path) -> None:
    import torch
    from megatron.core.datasets import indexed_dataset as megatron

    for name in ("a", "b"):
        builder = megatron.IndexedDatasetBuilder(str(tmp_path / f"{name}.bin"), dtype=np.uint16)
        for size in ((3, 2), (4,), (1, 1, 1)):
            builder.add_document(torch.arange(sum(size)), list(size))
        builder.finalize(str(tmp_path / f"{name}.idx"))
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "all.bin"), dtype=np.uint16)
    builder.add_index(str(tmp_path / "a"))
    builder.add_index(str(tmp_path / "b"))
    builder.finalize(str(tmp_path / "all.idx"))
    concatenate([tmp_path / "a", tmp_path / "b"], tmp_path / "merged")
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"merged{suffix}").read_bytes() == (tmp_path / f"all{suffix}").read_bytes()


def test_merge_refuses_different_dtypes_and_damaged_parts(tmp_path: Path) -> None:
    write(tmp_path / "a")
    write(tmp_path / "b", vocab_size=100_000)
    with pytest.raises(DatasetError, match=r"b\.idx: int32, but \S*a\.idx is uint16"):
        concatenate([tmp_path / "a", tmp_path / "b"], tmp_path / "c")
    os.truncate(tmp_path / "a.bin", 10)
    with pytest.raises(DatasetError, match=r"a\.bin: 10 bytes where"):
        concatenate([tmp_path / "a", tmp_path / "a"], tmp_path / "c")
    assert not list(tmp_path.glob("c*"))


def test_merge_holds_few_bytes_per_document(tmp_path: Path) -> None:
    """3 M documents: 40 bytes each would be 120 MB; a hard limit leaves the interpreter and 60 MB."""
    documents = 1_500_000
    with IndexedDatasetWriter(tmp_path / "a", 1000) as writer:
        writer.add_documents(np.full(2 * documents, 5), np.full(documents, 2))
        writer.commit()
    script = (
        "import resource, sys\n"
        "from megatron_hybrid.tools.corpus.concatenate import concatenate\n"
        "used = int(open('/proc/self/statm').read().split()[5]) * 4096\n"
        "resource.setrlimit(resource.RLIMIT_DATA, (used + 60_000_000,) * 2)\n"
        "assert concatenate([sys.argv[1]] * 2, sys.argv[2]).documents == 3_000_000\n"
    )
    words = [sys.executable, "-c", script, str(tmp_path / "a"), str(tmp_path / "b")]
    subprocess.run(words, check=True, env=os.environ | {"OPENBLAS_NUM_THREADS": "1"})
    assert len(IndexedDatasetReader(tmp_path / "b")) == 2 * documents


def test_unknown_command_is_named(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        command("look")
    assert stop.value.code == 2 and "error: look: choose one of info, verify" in capsys.readouterr().err
