"""Token files become datasets by link; every fault of theirs is named."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megatron_hybrid.tools import import_tokens, inspect_data
from megatron_hybrid.tools.cli import ToolError
from megatron_hybrid.tools.corpus.mixture import load_datasets
from megatron_hybrid.tools.indexed_dataset import IndexedDatasetReader, IndexedDatasetWriter

EOD, VOCAB = 100_257, 100_278
DOCUMENTS = [[5, 4, EOD], [EOD], [7, 100_277, 8, EOD], [1, EOD]]
Command = Callable[..., str]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    def run(*words: object, module: object = import_tokens) -> str:
        monkeypatch.setattr("sys.argv", ["tool", *map(str, words)])
        module.main()  # type: ignore[attr-defined]
        return capsys.readouterr().out

    return run


def flags(tmp_path: Path) -> list[object]:
    return ["--output-dir", tmp_path / "out", "--vocab-size", VOCAB, "--eod-id", EOD]


def write(path: Path, documents: list[list[int]] = DOCUMENTS, dtype: str = "<u4") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.array([token for document in documents for token in document], dtype=dtype).tofile(path)
    return path


def test_import_equals_building_and_copies_nothing(tmp_path: Path, command: Command) -> None:
    path = write(tmp_path / "tokens" / "dclm" / "part-00.npy")
    text = command("--input", tmp_path / "tokens", *flags(tmp_path))
    assert "1 files, 4 documents, 10 tokens" in text
    prefix = tmp_path / "out" / "dclm" / "part-00"
    assert Path(f"{prefix}.bin").samefile(path)
    with IndexedDatasetWriter(tmp_path / "built", VOCAB) as writer:
        for document in DOCUMENTS:
            writer.add_document(document)
        writer.commit()
    for suffix in (".bin", ".idx"):
        assert Path(f"{prefix}{suffix}").read_bytes() == (tmp_path / f"built{suffix}").read_bytes()
    assert "whole" in command("verify", prefix, module=inspect_data)
    (dataset,) = load_datasets([str(prefix)])["dclm"]
    assert (dataset.tokens, dataset.documents, dataset.vocab_size) == (10, 4, VOCAB)


def test_megatron_reads_an_imported_file(tmp_path: Path, command: Command) -> None:
    from megatron.core.datasets import indexed_dataset as megatron

    write(tmp_path / "a.npy")
    command("--input", tmp_path / "a.npy", *flags(tmp_path))
    dataset = megatron.IndexedDataset(str(tmp_path / "out" / "a"))
    assert [document.tolist() for document in dataset[0:4]] == DOCUMENTS


@pytest.mark.parametrize("block", [1, 3, 1 << 18])
def test_blocks_do_not_matter(tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(import_tokens, "BLOCK_TOKENS", block if block > 1 else 2)
    write(tmp_path / "a.npy")
    command("--input", tmp_path / "a.npy", *flags(tmp_path))
    reader = IndexedDatasetReader(tmp_path / "out" / "a")
    assert [reader[index].tolist() for index in range(len(reader))] == DOCUMENTS


def test_last_document_without_its_end_is_kept_and_announced(tmp_path: Path, command: Command) -> None:
    write(tmp_path / "a.npy", [*DOCUMENTS, [3, 3]])
    assert "do not end with the end-of-document id" in command("--input", tmp_path / "a.npy", *flags(tmp_path))
    assert IndexedDatasetReader(tmp_path / "out" / "a")[4].tolist() == [3, 3]


def test_table_of_spans_decides_where_documents_end(tmp_path: Path, command: Command) -> None:
    write(tmp_path / "a.npy", [[1, EOD, 2, EOD], [3, EOD]])  # an end-of-document id inside the first one
    with gzip.open(tmp_path / "a.csv.gz", "wt") as handle:
        handle.write("0,4,id-0,file,0\n4,6,id-1,file,1\n")
    command("--input", tmp_path / "a.npy", *flags(tmp_path))
    assert [IndexedDatasetReader(tmp_path / "out" / "a")[index].size for index in range(2)] == [4, 2]
    command("--input", tmp_path / "a.npy", *flags(tmp_path), "--ignore-spans", "--overwrite")
    assert len(IndexedDatasetReader(tmp_path / "out" / "a")) == 3


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("0,4\n5,6\n", "line 2 spans 5 to 6, after a document that ends at 4"),
        ("0,4\n", "end at 4, the file has 10"),
        ("a,b\n", "line 1 does not begin with start,end"),
    ],
)
def test_table_that_does_not_fit_is_refused(tmp_path: Path, command: Command, table: str, message: str) -> None:
    write(tmp_path / "a.npy")
    with gzip.open(tmp_path / "a.csv.gz", "wt") as handle:
        handle.write(table)
    with pytest.raises(ToolError, match=message):
        command("--input", tmp_path / "a.npy", *flags(tmp_path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"a\.npy: 0 bytes"),
        (b"\1\0\0\0\1\0", r"a\.npy: 6 bytes, no whole number"),
        (np.array([1, VOCAB, 5], dtype="<u4").tobytes(), rf"a\.npy: id {VOCAB} near token 1, outside the vocabulary"),
        (b"\x93NUMPY\1\0" + b"\0" * 8, r"a\.npy: has a header of numpy"),
    ],
)
def test_damaged_file_is_named(tmp_path: Path, command: Command, content: bytes, message: str) -> None:
    (tmp_path / "a.npy").write_bytes(content)
    with pytest.raises(ToolError, match=message):
        command("--input", tmp_path / "a.npy", *flags(tmp_path))
    assert not list(tmp_path.glob("out/*"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--vocab-size", "65530", "--eod-id", "5"], "reads vocabularies up to 65,536 as uint16"),
        (["--vocab-size", "65530", "--eod-id", "5", "--dtype", "uint16"], "must be 1 to 65499"),
        (["--vocab-size", "100278", "--eod-id", "100278"], "--eod-id 100278: must be 0 to 100277"),
        (["--vocab-size", "100278", "--eod-id", "5"], "no such file, and no folder"),
    ],
)
def test_bad_flag_is_named(tmp_path: Path, command: Command, words: list[str], message: str) -> None:
    with pytest.raises(ToolError, match=message):
        command("--input", tmp_path / "none.npy", "--output-dir", tmp_path / "out", *words)


def test_small_ids_stay_uint16(tmp_path: Path, command: Command) -> None:
    write(tmp_path / "a.npy", [[1, 2, 9], [3, 9]], dtype="<u2")
    words = ["--vocab-size", 10, "--eod-id", 9, "--dtype", "uint16"]
    command("--input", tmp_path / "a.npy", "--output-dir", tmp_path / "out", *words)
    assert IndexedDatasetReader(tmp_path / "out" / "a")[1].tolist() == [3, 9]
    assert json.loads((tmp_path / "out" / "a.json").read_text())["datasets"][0]["dtype"] == "uint16"
