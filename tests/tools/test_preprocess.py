"""From JSONL to a dataset: no document lost or invented, no fault silent, no half-written output."""

import argparse
import gzip
import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import xxhash
import zstandard

from megatron_hybrid.tools.cli import ToolError
from megatron_hybrid.tools.corpus import shard as shard_module
from megatron_hybrid.tools.corpus.finish import check_conservation
from megatron_hybrid.tools.indexed_dataset import IndexedDatasetReader, require_dataset
from megatron_hybrid.tools.preprocess import parser
from megatron_hybrid.tools.preprocess import run as preprocess

WriteJsonl = Callable[[str, list[str]], Path]

FAULTS = {
    "malformed_json": b'{"text": "cut',
    "not_an_object": b'"text"',
    "missing_key": b'{"content": "a"}',
    "wrong_type": b'{"text": null}',
    "invalid_utf8": b'{"text": "\xff"}',
    "lone_surrogate": b'{"text": "\\ud800"}',
    "empty_text": b'{"text": ""}',
}


def arguments(model: Path, prefix: Path, inputs: list[Path], *options: str) -> argparse.Namespace:
    """The parsed command line of one run."""
    command = ["--tokenizer-model", str(model), "--output-prefix", str(prefix), *options]
    return parser().parse_args([*command, "--input", *map(str, inputs)])


@pytest.mark.parametrize("append_eod", [True, False], ids=["eod", "no-eod"])
def test_documents_are_the_texts_in_order(
    tmp_path: Path, tokenizer_model: Path, write_jsonl: WriteJsonl, append_eod: bool, texts: list[str]
) -> None:
    options = ["--append-eod"] if append_eod else []
    preprocess(arguments(tokenizer_model, tmp_path / "data", [write_jsonl("in.jsonl", texts)], *options))
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_model))
    reader = IndexedDatasetReader(tmp_path / "data")
    documents = [reader[index].tolist() for index in range(len(reader))]
    if append_eod:
        assert [document[-1] for document in documents] == [processor.eos_id()] * len(texts)
        documents = [document[:-1] for document in documents]
    assert all(processor.eos_id() not in document for document in documents)
    assert [processor.decode(document) for document in documents] == texts


def test_files_are_byte_identical_to_megatrons_tokenizer_and_builder(
    tmp_path: Path, tokenizer_model: Path, write_jsonl: WriteJsonl, texts: list[str]
) -> None:
    import torch
    from megatron.core import tokenizers
    from megatron.core.datasets import indexed_dataset as indexed

    tokenizer = tokenizers.MegatronTokenizer.from_pretrained(
        tokenizer_path=str(tokenizer_model), metadata_path={"library": "sentencepiece"}
    )
    builder = indexed.IndexedDatasetBuilder(
        str(tmp_path / "megatron.bin"), dtype=indexed.DType.optimal_dtype(tokenizer.vocab_size)
    )
    for text in texts:
        ids = [*tokenizer.tokenize(text), tokenizer.eod]
        builder.add_document(torch.tensor(ids, dtype=torch.int32), [len(ids)])
    builder.finalize(str(tmp_path / "megatron.idx"))
    preprocess(arguments(tokenizer_model, tmp_path / "ours", [write_jsonl("in.jsonl", texts)], "--append-eod"))
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"ours{suffix}").read_bytes() == (tmp_path / f"megatron{suffix}").read_bytes()


@pytest.mark.parametrize("batch_characters", [1, 60, 1 << 20])
def test_output_does_not_depend_on_the_batch_size(
    tmp_path: Path,
    tokenizer_model: Path,
    write_jsonl: WriteJsonl,
    monkeypatch: pytest.MonkeyPatch,
    batch_characters: int,
    texts: list[str],
) -> None:
    source = write_jsonl("in.jsonl", texts)
    whole = preprocess(arguments(tokenizer_model, tmp_path / "whole", [source]))
    monkeypatch.setattr(shard_module, "BATCH_CHARACTERS", batch_characters)
    batched = preprocess(arguments(tokenizer_model, tmp_path / "batched", [source]))
    assert batched["datasets"][0] | {"prefix": ""} == whole["datasets"][0] | {"prefix": ""}


def test_several_inputs_plain_gzip_and_zstd_are_read_in_the_order_given(
    tmp_path: Path, tokenizer_model: Path, write_jsonl: WriteJsonl, texts: list[str]
) -> None:
    plain = write_jsonl("a.jsonl", texts[:2])
    zipped, zstd = tmp_path / "b.jsonl.gz", tmp_path / "c.jsonl.zst"
    zipped.write_bytes(gzip.compress(write_jsonl("b", texts[2:4]).read_bytes()))
    zstd.write_bytes(zstandard.compress(write_jsonl("c", texts[4:]).read_bytes()))
    parts = preprocess(arguments(tokenizer_model, tmp_path / "parts", [plain, zipped, zstd]))
    whole = preprocess(arguments(tokenizer_model, tmp_path / "whole", [write_jsonl("in.jsonl", texts)]))
    assert parts["tokens"] == whole["tokens"]
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"parts{suffix}").read_bytes() == (tmp_path / f"whole{suffix}").read_bytes()
    assert [(file["path"], file["documents"]) for file in parts["files"]] == [
        (str(plain), 2),
        (str(zipped), 2),
        (str(zstd), 2),
    ]


def test_manifest_tells_what_is_in_the_files(
    tmp_path: Path, tokenizer_model: Path, write_jsonl: WriteJsonl, texts: list[str], vocab_size: int
) -> None:
    source = write_jsonl("in.jsonl", texts)
    returned = preprocess(arguments(tokenizer_model, tmp_path / "data", [source], "--append-eod"))
    stored = json.loads((tmp_path / "data.json").read_bytes())
    assert stored == returned
    summary = require_dataset(tmp_path / "data")
    assert summary is not None
    (dataset,) = stored["datasets"]
    assert (dataset["documents"], dataset["tokens"], dataset["dtype"]) == (summary.documents, summary.tokens, "uint16")
    content = (tmp_path / "data.bin").read_bytes()
    (part,) = dataset["bin"]["parts"]
    assert (part["offset"], part["bytes"], part["xxh3"]) == (0, len(content), xxhash.xxh3_128(content).hexdigest())
    index = (tmp_path / "data.idx").read_bytes()
    assert dataset["idx"] == {"bytes": len(index), "xxh3": xxhash.xxh3_128(index).hexdigest()}
    assert stored["tokenizer"]["sha256"] == hashlib.sha256(tokenizer_model.read_bytes()).hexdigest()
    assert (stored["tokenizer"]["vocab_size"], stored["tokenizer"]["eod_id"]) == (vocab_size, 1)
    assert (stored["options"]["text_key"], stored["options"]["append_eod"]) == ("text", True)
    assert stored["sources"]["in"]["text_bytes"] == sum(len(text.encode()) for text in texts)


def test_text_key_chooses_the_field(tmp_path: Path, tokenizer_model: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text('{"text": "not this", "content": "but this"}\n')
    preprocess(arguments(tokenizer_model, tmp_path / "data", [source], "--text-key", "content"))
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_model))
    assert processor.decode(IndexedDatasetReader(tmp_path / "data")[0].tolist()) == "but this"


# ---- faults ----


def faulty_corpus(tmp_path: Path, fault: bytes) -> Path:
    """Ten good documents with `fault` as line 6."""
    good = [json.dumps({"text": f"document {number}"}).encode() for number in range(10)]
    source = tmp_path / "in.jsonl"
    source.write_bytes(b"\n".join([*good[:5], fault, *good[5:]]) + b"\n")
    return source


@pytest.mark.parametrize("reason", FAULTS)
def test_fault_ends_the_run_naming_file_line_and_reason(tmp_path: Path, tokenizer_model: Path, reason: str) -> None:
    source = faulty_corpus(tmp_path, FAULTS[reason])
    with pytest.raises(ToolError, match=rf"^{re.escape(str(source))}:6: {reason}: .*--on-error skip") as error:
        preprocess(arguments(tokenizer_model, tmp_path / "data", [source]))
    assert "\n" not in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl"]


@pytest.mark.parametrize("reason", FAULTS)
def test_fault_under_skip_loses_its_own_line_alone(tmp_path: Path, tokenizer_model: Path, reason: str) -> None:
    source = faulty_corpus(tmp_path, FAULTS[reason])
    options = ["--on-error", "skip", "--max-rejected", "1"]
    result = preprocess(arguments(tokenizer_model, tmp_path / "data", [source], *options))
    assert (result["lines"], result["documents"], result["rejected"]) == (11, 10, {reason: 1})
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_model))
    reader = IndexedDatasetReader(tmp_path / "data")
    assert [processor.decode(reader[index].tolist()) for index in range(10)] == [f"document {n}" for n in range(10)]
    (reject,) = map(json.loads, (tmp_path / "data.rejects.jsonl").read_text().splitlines())
    at = source.read_bytes().index(b"\n" + FAULTS[reason] + b"\n") + 1
    assert (reject["path"], reject["line"], reject["offset"], reject["reason"]) == (str(source), 6, at, reason)


def test_blank_lines_are_counted_and_never_an_error(tmp_path: Path, tokenizer_model: Path) -> None:
    result = preprocess(arguments(tokenizer_model, tmp_path / "data", [faulty_corpus(tmp_path, b"\n ")]))
    assert (result["lines"], result["documents"], result["rejected"]) == (12, 10, {"blank_line": 2})


def test_text_without_tokens_is_counted(tmp_path: Path, texts: list[str]) -> None:
    model = tmp_path / "drops-space.model"
    with open(model, "wb") as handle:  # a model that strips white space, unlike train_tokenizer's
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts * 3), model_writer=handle, vocab_size=80, model_type="bpe", minloglevel=2
        )
    source = faulty_corpus(tmp_path, b'{"text": "  "}')
    result = preprocess(
        arguments(model, tmp_path / "data", [source], "--on-error", "skip", "--append-eod", "--max-rejected", "1")
    )
    assert (result["lines"], result["documents"], result["rejected"]) == (11, 10, {"no_tokens": 1})


@pytest.mark.parametrize("on_error", ["fail", "skip"])
@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_truncated_file_ends_the_run_and_leaves_no_output(
    tmp_path: Path, tokenizer_model: Path, write_jsonl: WriteJsonl, suffix: str, on_error: str, texts: list[str]
) -> None:
    compressors: dict[str, Any] = {".gz": gzip.compress, ".zst": zstandard.compress}
    source = tmp_path / f"in.jsonl{suffix}"
    source.write_bytes(compressors[suffix](write_jsonl("plain", texts * 500).read_bytes())[:-20])
    with pytest.raises(ToolError, match=r"truncated or corrupt after line \d+"):
        preprocess(arguments(tokenizer_model, tmp_path / "data", [source], "--on-error", on_error))
    assert [path.name for path in tmp_path.glob("data*")] == ["data.work"]


@pytest.mark.parametrize("lines", [b"", b"\n\n"], ids=["empty-file", "blank-lines"])
def test_input_without_documents_is_an_error(tmp_path: Path, tokenizer_model: Path, lines: bytes) -> None:
    source = tmp_path / "in.jsonl"
    source.write_bytes(lines)
    with pytest.raises(ToolError, match=r"--input: no documents in \S*in\.jsonl"):
        preprocess(arguments(tokenizer_model, tmp_path / "data", [source], "--on-error", "skip"))
    assert not list(tmp_path.glob("data.*[nx]"))


def test_conservation_check_notices_a_loss() -> None:
    with pytest.raises(
        ToolError, match="source web: 10 lines, but 8 documents and 1 rejected: a fault of this program"
    ):
        check_conservation({"web": {"lines": 10, "documents": 8, "rejected": {"empty_text": 1}}})


def test_run_with_a_document_lost_on_the_way_is_refused(
    tmp_path: Path, tokenizer_model: Path, write_jsonl: WriteJsonl, monkeypatch: pytest.MonkeyPatch, texts: list[str]
) -> None:
    add = shard_module.ShardWork._add

    def lose_one(work: Any, batch: Any) -> None:
        batch.texts = batch.texts[1:]
        add(work, batch)

    monkeypatch.setattr(shard_module.ShardWork, "_add", lose_one)
    with pytest.raises(ToolError, match="6 lines, but 5 documents and 0 rejected"):
        preprocess(arguments(tokenizer_model, tmp_path / "data", [write_jsonl("in.jsonl", texts)]))
    assert not list(tmp_path.glob("data*"))


# ---- flags ----


def test_existing_output_is_kept_unless_overwrite_is_given(
    tmp_path: Path, tokenizer_model: Path, write_jsonl: WriteJsonl, texts: list[str]
) -> None:
    source = write_jsonl("in.jsonl", texts)
    (tmp_path / "data.bin").write_bytes(b"precious")
    with pytest.raises(ToolError, match=r"--output-prefix \S*data: \S*data\.bin exists; .*--overwrite"):
        preprocess(arguments(tokenizer_model, tmp_path / "data", [source]))
    assert (tmp_path / "data.bin").read_bytes() == b"precious"
    preprocess(arguments(tokenizer_model, tmp_path / "data", [source], "--overwrite"))
    assert len(IndexedDatasetReader(tmp_path / "data")) == len(texts)


def test_index_cache_of_older_data_is_refused_even_with_overwrite(
    tmp_path: Path, tokenizer_model: Path, write_jsonl: WriteJsonl, texts: list[str]
) -> None:
    (tmp_path / "data" / "cache" / "GPTDataset_indices").mkdir(parents=True)  # where GPTDataset puts it
    with pytest.raises(ToolError, match=r"data/cache is Megatron's index of earlier data .*remove that folder"):
        preprocess(arguments(tokenizer_model, tmp_path / "data", [write_jsonl("in.jsonl", texts)], "--overwrite"))


def test_failed_overwrite_keeps_the_old_dataset(
    tmp_path: Path, tokenizer_model: Path, write_jsonl: WriteJsonl, texts: list[str]
) -> None:
    preprocess(arguments(tokenizer_model, tmp_path / "data", [write_jsonl("good.jsonl", texts)]))
    before = {path.name: path.read_bytes() for path in tmp_path.glob("data*")}
    bad = faulty_corpus(tmp_path, FAULTS["malformed_json"])
    with pytest.raises(ToolError, match="malformed_json"):
        preprocess(arguments(tokenizer_model, tmp_path / "data", [bad], "--overwrite"))
    assert {path.name: path.read_bytes() for path in tmp_path.glob("data.[bij]*")} == before


def test_crash_after_the_dataset_leaves_no_manifest(
    tmp_path: Path, tokenizer_model: Path, write_jsonl: WriteJsonl, monkeypatch: pytest.MonkeyPatch, texts: list[str]
) -> None:
    first = arguments(tokenizer_model, tmp_path / "data", [write_jsonl("in.jsonl", texts)])
    preprocess(first)
    rename = os.replace

    def crash(source: Any, target: Path) -> None:
        if Path(target).name == "data.json":
            raise OSError("crash")
        rename(source, target)

    monkeypatch.setattr(os, "replace", crash)
    first.overwrite = True
    with pytest.raises(OSError, match="crash"):
        preprocess(first)
    assert sorted(path.name for path in tmp_path.glob("data*")) == ["data.bin", "data.idx", "data.work"]
    monkeypatch.undo()
    (tmp_path / "data.bin.tmp.elsewhere.1").write_bytes(b"of an attempt that was killed")
    preprocess(first)  # what was done is taken up, not done again
    assert sorted(path.name for path in tmp_path.glob("data*")) == ["data.bin", "data.idx", "data.json"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"input": ["absent.jsonl"]}, r"--input absent\.jsonl: no such file", id="input-missing"),
        pytest.param({"input": ["/dev/null"]}, r"--input /dev/null: not a file", id="input-is-a-device"),
        pytest.param({"output_prefix": "/"}, r"--output-prefix /: a folder; add a name", id="prefix-is-a-folder"),
        pytest.param({"tokenizer_model": "no.model"}, r"--tokenizer-model no\.model: no such file", id="no-model"),
        pytest.param(
            {"tokenizer_model": __file__}, r"--tokenizer-model \S+: not a SentencePiece model", id="bad-model"
        ),
    ],
)
def test_bad_flag_is_named(
    tmp_path: Path,
    tokenizer_model: Path,
    write_jsonl: WriteJsonl,
    change: dict[str, Any],
    message: str,
    texts: list[str],
) -> None:
    args = arguments(tokenizer_model, tmp_path / "data", [write_jsonl("in.jsonl", texts)])
    for name, value in change.items():
        setattr(args, name, value if name == "input" else type(getattr(args, name))(value))
    with pytest.raises(ToolError, match=message):
        preprocess(args)


def test_input_given_twice_is_refused(
    tmp_path: Path, tokenizer_model: Path, write_jsonl: WriteJsonl, texts: list[str]
) -> None:
    source = write_jsonl("in.jsonl", texts)
    (tmp_path / "link.jsonl").symlink_to(source)
    with pytest.raises(ToolError, match=r"--input \S*link\.jsonl: also found by --input \S*in\.jsonl"):
        preprocess(arguments(tokenizer_model, tmp_path / "data", [source, tmp_path / "link.jsonl"]))


def test_append_eod_needs_an_eos_piece(tmp_path: Path, write_jsonl: WriteJsonl, texts: list[str]) -> None:
    model = tmp_path / "no-eos.model"
    with open(model, "wb") as handle:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts * 3),
            model_writer=handle,
            vocab_size=80,
            model_type="bpe",
            eos_id=-1,
            minloglevel=2,
        )
    with pytest.raises(ToolError, match=r"--append-eod: \S*no-eos\.model has no eos piece"):
        preprocess(arguments(model, tmp_path / "data", [write_jsonl("in.jsonl", texts)], "--append-eod"))


@pytest.mark.parametrize("fault", [None, "malformed_json"], ids=["clean", "malformed"])
def test_command_line_exit_status_and_one_line_of_output(
    tmp_path: Path, tokenizer_model: Path, fault: str | None
) -> None:
    source = faulty_corpus(tmp_path, FAULTS[fault] if fault else b'{"text": "the eleventh"}')
    options = ["--append-eod", "--output-prefix", str(tmp_path / "data"), "--tokenizer-model", str(tokenizer_model)]
    run = subprocess.run(
        [sys.executable, "-m", "megatron_hybrid.tools.preprocess", "--input", str(source), *options],
        capture_output=True,
        text=True,
        check=False,
    )
    if fault:
        assert (run.returncode, run.stdout) == (1, "")
        assert re.fullmatch(rf"error: {re.escape(str(source))}:6: malformed_json: [^\n]*\n", run.stderr)
    else:
        assert (run.returncode, run.stderr) == (0, "")
        assert re.match(r"\S+data: 11 lines = 11 documents \+ 0 rejected; \d+ tokens", run.stdout)
