"""The token files: the same bytes as Megatron's builder, nothing half-written, every damage named."""

import os
import re
import signal
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_hybrid.tools import indexed_dataset
from megatron_hybrid.tools.indexed_dataset import (
    DatasetError,
    IndexedDatasetReader,
    IndexedDatasetWriter,
    require_dataset,
    token_dtype,
)

DOCUMENTS = [[5, 4, 3, 2, 1], [], [7], list(range(400)), [0, 0, 0]]


def write(prefix: Path, documents: list[list[int]] = DOCUMENTS, vocab_size: int = 1000) -> Path:
    """Writes a dataset of `documents` at `prefix` and returns the prefix."""
    with IndexedDatasetWriter(prefix, vocab_size) as writer:
        for document in documents:
            writer.add_document(document)
        writer.commit()
    return prefix


@pytest.mark.parametrize("vocab_size", [1000, 65499, 65500, 100352], ids="vocab{}".format)
def test_files_are_byte_identical_to_megatrons_builder(tmp_path: Path, vocab_size: int) -> None:
    import torch
    from megatron.core.datasets import indexed_dataset as megatron

    documents = [*DOCUMENTS, [vocab_size - 1, 0]]
    builder = megatron.IndexedDatasetBuilder(
        str(tmp_path / "megatron.bin"), dtype=megatron.DType.optimal_dtype(vocab_size)
    )
    for document in documents:
        builder.add_document(torch.tensor(document, dtype=torch.int64), [len(document)])
    builder.finalize(str(tmp_path / "megatron.idx"))
    write(tmp_path / "ours", documents, vocab_size)
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"ours{suffix}").read_bytes() == (tmp_path / f"megatron{suffix}").read_bytes()


def test_megatrons_dataset_reads_what_the_writer_wrote(tmp_path: Path) -> None:
    from megatron.core.datasets import indexed_dataset as megatron

    dataset = megatron.IndexedDataset(str(write(tmp_path / "data")))
    assert [document.tolist() for document in dataset[0 : len(dataset)]] == DOCUMENTS
    assert dataset.document_indices.tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("vocab_size", [1, 65499, 65500, 65536, 65537, 2**31], ids="vocab{}".format)
def test_dtype_follows_megatrons_rule(vocab_size: int) -> None:
    from megatron.core.datasets import indexed_dataset as megatron

    assert token_dtype(vocab_size) == np.dtype(megatron.DType.optimal_dtype(vocab_size))


def test_documents_added_in_one_batch_equal_documents_added_one_by_one(tmp_path: Path) -> None:
    write(tmp_path / "single")
    with IndexedDatasetWriter(tmp_path / "batch", 1000) as writer:
        ids = np.concatenate([np.array(document, dtype=np.int64) for document in DOCUMENTS])
        writer.add_documents(ids, np.array([len(document) for document in DOCUMENTS]))
        writer.commit()
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"batch{suffix}").read_bytes() == (tmp_path / f"single{suffix}").read_bytes()


def test_index_spanning_several_blocks_is_the_same_as_in_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "one")
    monkeypatch.setattr(indexed_dataset, "BLOCK_SEQUENCES", 2)
    write(tmp_path / "blocks")
    assert (tmp_path / "blocks.idx").read_bytes() == (tmp_path / "one.idx").read_bytes()
    assert IndexedDatasetReader(tmp_path / "blocks")[3].tolist() == DOCUMENTS[3]


def test_reader_gives_back_the_documents(tmp_path: Path) -> None:
    reader = IndexedDatasetReader(write(tmp_path / "data"))
    assert [reader[index].tolist() for index in range(len(reader))] == DOCUMENTS
    assert reader[-1].tolist() == DOCUMENTS[-1]
    with pytest.raises(IndexError, match="sequence 5 of 5"):
        reader[5]


def test_commit_reports_sizes_and_hashes_of_the_files(tmp_path: Path) -> None:
    import xxhash

    with IndexedDatasetWriter(tmp_path / "data", 1000) as writer:
        writer.add_document([1, 2, 3])
        written = writer.commit()
    for path, size, digest in (
        (tmp_path / "data.bin", written.bin_bytes, written.bin_xxh3),
        (tmp_path / "data.idx", written.idx_bytes, written.idx_xxh3),
    ):
        assert (size, digest) == (path.stat().st_size, xxhash.xxh3_128(path.read_bytes()).hexdigest())
    assert (written.documents, written.tokens, written.dtype) == (1, 3, "uint16")


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        pytest.param([1000], "token id 1000 is outside the vocabulary, 0 to 999", id="id-past-the-vocabulary"),
        pytest.param([3, -1], "token id -1 is outside the vocabulary", id="negative-id"),
        pytest.param([1.5], "must be a 1-D array of integers, not 1-D float64", id="fraction"),
    ],
)
def test_writer_refuses(tmp_path: Path, ids: list[int], message: str) -> None:
    with (
        pytest.raises(DatasetError, match=re.escape(message)),
        IndexedDatasetWriter(tmp_path / "data", 1000) as writer,
    ):
        writer.add_document(ids)
    assert list(tmp_path.iterdir()) == []


def test_writer_refuses_lengths_that_do_not_add_up(tmp_path: Path) -> None:
    with IndexedDatasetWriter(tmp_path / "data", 1000) as writer, pytest.raises(DatasetError, match="3 ids for"):
        writer.add_documents(np.array([1, 2, 3]), np.array([2, 2]))


@pytest.mark.parametrize("fault", [KeyError, KeyboardInterrupt], ids=["error", "ctrl-c"])
def test_interrupted_write_leaves_no_file(tmp_path: Path, fault: type[BaseException]) -> None:
    with pytest.raises(fault), IndexedDatasetWriter(tmp_path / "data", 1000) as writer:
        writer.add_document([1, 2, 3])
        raise fault
    assert list(tmp_path.iterdir()) == []


def test_block_left_without_commit_leaves_no_file(tmp_path: Path) -> None:
    with IndexedDatasetWriter(tmp_path / "data", 1000) as writer:
        writer.add_document([1, 2, 3])
    assert list(tmp_path.iterdir()) == []


def test_killed_writer_leaves_nothing_under_the_final_names(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys\n"
        "from megatron_hybrid.tools.indexed_dataset import IndexedDatasetWriter\n"
        "writer = IndexedDatasetWriter(sys.argv[1], 1000)\n"
        "writer.add_document([1] * 100000)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    run = subprocess.run([sys.executable, "-c", script, str(tmp_path / "data")], check=False)
    assert run.returncode == -signal.SIGKILL
    assert not (tmp_path / "data.bin").exists() and not (tmp_path / "data.idx").exists()


def test_crash_between_the_two_renames_cannot_pair_new_tokens_with_an_old_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "data", [[1, 2, 3]])
    rename = os.replace

    def rename_bin_only(source: Path, target: Path) -> None:
        if target.suffix == ".idx":
            raise OSError("crash")
        rename(source, target)

    monkeypatch.setattr(os, "replace", rename_bin_only)
    with pytest.raises(OSError, match="crash"):
        write(tmp_path / "data", [[4, 5, 6]])
    with pytest.raises(DatasetError, match=r"data\.idx: no such file, though data\.bin is there"):
        require_dataset(tmp_path / "data")


# ---- damage: every fault is one line that names the file ----


def patch_index(prefix: Path, offset: int, content: bytes) -> None:
    """Overwrites bytes of the index."""
    with open(f"{prefix}.idx", "r+b") as handle:
        handle.seek(offset)
        handle.write(content)


LENGTHS, POINTERS, BOUNDARIES = 34, 34 + 4 * 5, 34 + 12 * 5  # of the five sequences of DOCUMENTS


@pytest.mark.parametrize(
    ("offset", "content", "message"),
    [
        pytest.param(0, b"PARQUET", r"data\.idx: not a Megatron index", id="magic"),
        pytest.param(9, struct.pack("<Q", 2), r"data\.idx: version 2 of the format; only version 1", id="version"),
        pytest.param(17, b"\x07", r"data\.idx: dtype code 7; token ids have one of 1 \(uint8\)", id="dtype-float"),
        pytest.param(17, b"\x63", r"data\.idx: dtype code 99", id="dtype-unknown"),
        pytest.param(17, b"\x04", r"data\.bin: 818 bytes where data\.idx describes", id="dtype-of-another-width"),
        pytest.param(18, struct.pack("<Q", 6), r"data\.idx: 142 bytes where 6 sequences take", id="sequence-count"),
        pytest.param(LENGTHS + 8, struct.pack("<i", -1), r"data\.idx: sequence 2 has length -1", id="negative-length"),
        pytest.param(
            LENGTHS + 8, struct.pack("<i", 2), r"data\.idx: sequence 3 starts at byte 12 where byte 14", id="length"
        ),
        pytest.param(
            POINTERS + 16, struct.pack("<q", 2), r"data\.idx: sequence 2 starts at byte 2 where byte 10", id="pointer"
        ),
        pytest.param(
            BOUNDARIES + 8, struct.pack("<q", 4), r"data\.idx: document boundaries do not rise", id="boundary-falls"
        ),
        pytest.param(
            BOUNDARIES + 40, struct.pack("<q", 9), r"data\.idx: document boundaries do not rise", id="boundary-past-end"
        ),
    ],
)
def test_reader_names_a_damaged_index(tmp_path: Path, offset: int, content: bytes, message: str) -> None:
    prefix = write(tmp_path / "data")
    patch_index(prefix, offset, content)
    with pytest.raises(DatasetError, match=message) as error:
        IndexedDatasetReader(prefix)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
@pytest.mark.parametrize("lost_bytes", [1, 8, 120])
def test_require_dataset_names_a_truncated_file(tmp_path: Path, suffix: str, lost_bytes: int) -> None:
    path = Path(f"{write(tmp_path / 'data')}{suffix}")
    os.truncate(path, path.stat().st_size - lost_bytes)
    with pytest.raises(DatasetError, match=re.escape(path.name)):
        require_dataset(tmp_path / "data")


def test_require_dataset_refuses_a_longer_bin(tmp_path: Path) -> None:
    write(tmp_path / "data")
    with open(tmp_path / "data.bin", "ab") as handle:
        handle.write(b"\0\0")
    with pytest.raises(DatasetError, match=r"data\.bin: 820 bytes where data\.idx describes 818"):
        require_dataset(tmp_path / "data")


@pytest.mark.parametrize("documents", [[], [[]]], ids=["no-documents", "one-empty-document"])
def test_require_dataset_refuses_a_dataset_without_tokens(tmp_path: Path, documents: list[list[int]]) -> None:
    write(tmp_path / "data", documents)
    with pytest.raises(DatasetError, match=r"data\.bin: no tokens"):
        require_dataset(tmp_path / "data")


@pytest.mark.parametrize(
    ("present", "prefix", "message"),
    [
        pytest.param([], "data", r"data\.idx: no such file, nor data\.bin; correct the prefix", id="both-missing"),
        pytest.param([".bin"], "data", r"data\.idx: no such file, though data\.bin is there", id="idx-missing"),
        pytest.param([".idx"], "data", r"data\.bin: no such file, though data\.idx is there", id="bin-missing"),
        pytest.param([".bin", ".idx"], "data.bin", r"without its suffix: \S*data$", id="given-with-suffix"),
        pytest.param([".bin", ".idx"], "", r"a folder; give the prefix .*such as \S*data$", id="given-a-folder"),
    ],
)
def test_require_dataset_says_what_is_missing(tmp_path: Path, present: list[str], prefix: str, message: str) -> None:
    write(tmp_path / "data")
    for suffix in {".bin", ".idx"} - set(present):
        (tmp_path / f"data{suffix}").unlink()
    with pytest.raises(DatasetError, match=message):
        require_dataset(tmp_path / prefix if prefix else tmp_path)


def test_require_dataset_returns_the_size_of_a_whole_dataset(tmp_path: Path) -> None:
    summary = require_dataset(str(write(tmp_path / "data")))
    assert summary is not None
    assert (summary.documents, summary.sequences, summary.tokens, summary.dtype) == (5, 5, 409, "uint16")


def test_require_dataset_leaves_object_storage_alone() -> None:
    assert require_dataset("s3://bucket/data") is None
