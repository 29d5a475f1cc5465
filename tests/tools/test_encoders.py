"""Fast and reference encoders make the same ids; where they do not, it is found out and the reference is used."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import tokenizers

from megatron_hybrid.tools.cli import ToolError
from megatron_hybrid.tools.corpus import encoders, worker
from megatron_hybrid.tools.corpus.encoders import (
    TextTooLong,
    cut_text,
    encode_long,
    fast_encoder,
    first_difference,
    probe_texts,
    reference_encoder,
)
from megatron_hybrid.tools.corpus.shard import insert_eod
from megatron_hybrid.tools.corpus.tokenizer_file import TIKTOKEN_PATTERNS, load_tokenizer_file
from megatron_hybrid.tools.indexed_dataset import IndexedDatasetReader
from megatron_hybrid.tools.preprocess import parser, run

LITERAL = "a <|endoftext|> b<|pad|>"


def random_texts(count: int, length: int, seed: int = 0) -> list[str]:
    """Words, digits, white space, punctuation and other scripts in random order."""
    source = random.Random(seed)
    parts = [
        "word",
        "Word's",
        " ",
        "  ",
        "\n",
        "\n\n",
        "\r\n",
        "\t",
        "12345",
        "漢字",
        "é",
        "e\u0301",
        "🎉",
        "!?",
        "a b",
        "한",
    ]
    return ["".join(source.choices(parts, k=length)) for _ in range(count)]


@pytest.mark.parametrize("backend", ["fastokens", "gigatoken"])
@pytest.mark.parametrize("keep_special", [False, True], ids=["special-as-text", "special-kept"])
def test_fast_encoder_equals_tokenizers(tokenizer_json: Path, backend: str, keep_special: bool) -> None:
    if backend == "gigatoken":
        pytest.importorskip("gigatoken", reason="gigatoken is in the extra `data`")
    file = load_tokenizer_file(tokenizer_json)
    fast = fast_encoder(file, keep_special, backend)
    assert fast is not None
    texts = [*probe_texts(file), *random_texts(300, 40), LITERAL]
    assert first_difference(fast, reference_encoder(file, keep_special), texts) is None


@pytest.mark.parametrize("keep_special", [False, True], ids=["special-as-text", "special-kept"])
def test_reference_is_the_tokenizers_library(tokenizer_json: Path, keep_special: bool) -> None:
    library = tokenizers.Tokenizer.from_file(str(tokenizer_json))
    library.encode_special_tokens = not keep_special
    ids, lengths = reference_encoder(load_tokenizer_file(tokenizer_json), keep_special).encode([LITERAL, ""])
    assert ids.tolist() == library.encode(LITERAL).ids
    assert lengths.tolist() == [ids.size, 0]
    assert (library.token_to_id("<|endoftext|>") in ids) == keep_special


def test_sentencepiece_is_its_library(tokenizer_model: Path, texts: list[str]) -> None:
    library = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_model))
    ids, lengths = reference_encoder(load_tokenizer_file(tokenizer_model), False).encode(texts)
    expected = [library.encode(text) for text in texts]
    assert ids.tolist() == [one for ids_of_text in expected for one in ids_of_text]
    assert lengths.tolist() == [len(one) for one in expected]


def test_tiktoken_file_is_encoded_by_its_library(tmp_path: Path) -> None:
    tiktoken = pytest.importorskip("tiktoken", reason="tiktoken is in the extra `data`")
    import base64

    ranks = {bytes([value]): value for value in range(256)} | {b"th": 256, b"the": 257, b" the": 258}
    path = tmp_path / "cl100k_small.tiktoken"
    path.write_bytes(b"\n".join(base64.b64encode(token) + b" %d" % rank for token, rank in ranks.items()))
    file = load_tokenizer_file(path, eod_id=300)
    assert (file.vocab_size, file.eod_id) == (301, 300)
    library = tiktoken.Encoding(
        "small", pat_str=TIKTOKEN_PATTERNS["cl100k"], mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 300}
    )
    text = "the cat, the\n\n<|endoftext|> 1234"
    assert reference_encoder(file, False).encode([text])[0].tolist() == library.encode_ordinary(text)


@pytest.mark.parametrize("limit", [1, 7, 50])
def test_text_encoded_in_pieces_has_the_same_ids(tokenizer_json: Path, limit: int) -> None:
    file = load_tokenizer_file(tokenizer_json)
    assert file.cuttable
    reference = reference_encoder(file, False)
    cuts = 0
    for text in random_texts(400, 30, seed=limit):
        pieces = cut_text(text, limit)
        cuts += len(pieces) - 1
        assert "".join(pieces) == text
        whole, _ = reference.encode([text])
        assert np.concatenate([reference.encode([piece])[0] for piece in pieces]).tolist() == whole.tolist(), pieces
    assert cuts > 100


def test_gpt2_pattern_may_be_cut_too(tmp_path: Path, tokenizer_json: Path) -> None:
    data = json.loads(tokenizer_json.read_text())
    data["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(data))
    file = load_tokenizer_file(path)
    assert file.cuttable
    reference = reference_encoder(file, False)
    for text in random_texts(400, 30, seed=5):
        pieces = cut_text(text, 9)
        whole, _ = reference.encode([text])
        assert np.concatenate([reference.encode([piece])[0] for piece in pieces]).tolist() == whole.tolist(), pieces


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"normalizer": {"type": "NFC"}}, id="normalizer"),
        pytest.param({"pre_tokenizer": {"type": "Metaspace", "replacement": "_", "split": False}}, id="metaspace"),
        pytest.param({"pre_tokenizer": None}, id="no-pre-tokenizer"),
    ],
)
def test_tokenizers_that_look_across_words_are_not_cut(
    tmp_path: Path, tokenizer_json: Path, change: dict[str, Any]
) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(json.loads(tokenizer_json.read_text()) | change))
    assert not load_tokenizer_file(path).cuttable


def test_long_text_without_a_place_to_cut_is_refused(tokenizer_json: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoders, "MAX_WHOLE_CHARACTERS", 500)
    with pytest.raises(TextTooLong):
        cut_text("x" * 1000, 100)
    file = load_tokenizer_file(tokenizer_json)
    assert encode_long(reference_encoder(file, False), file, "x" * 400).size


@pytest.mark.parametrize("tokens_per_document", [3, 1000])
def test_end_of_document_follows_every_document(tokens_per_document: int) -> None:
    lengths = np.array([tokens_per_document, 1, 2 * tokens_per_document])
    ids = np.arange(lengths.sum(), dtype=np.int32)
    result, longer = insert_eod(ids, lengths, 99999)
    assert longer.tolist() == (lengths + 1).tolist()
    assert np.flatnonzero(result == 99999).tolist() == (np.cumsum(longer) - 1).tolist()
    assert result[result != 99999].tolist() == ids.tolist()


# ---- a fast encoder that is wrong ----


class Wrong:
    """An encoder right on everything but texts with the word `trap`."""

    name = "wrong 1.0"

    def __init__(self, right: encoders.Encoder) -> None:
        self._right = right

    def encode(self, texts: Sequence[str]) -> tuple[encoders.Ids, encoders.Lengths]:
        ids, lengths = self._right.encode(texts)
        if any("trap" in text for text in texts):
            ids = ids.copy()
            ids[0] += 1
        return ids, lengths


def preprocess_with_wrong_encoder(
    tmp_path: Path, tokenizer_json: Path, texts: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> dict[str, Any]:
    monkeypatch.setattr(worker, "fast_encoder", lambda file, keep, backend: Wrong(reference_encoder(file, keep)))
    paths = []
    for number, part in enumerate(texts):
        path = tmp_path / f"{number}.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in part))
        paths.append(str(path))
    command = ["--tokenizer-model", str(tokenizer_json), "--output-prefix", str(tmp_path / "data"), "--append-eod"]
    return run(parser().parse_args([*command, "--shard-bytes", "4K", "--input", *paths]))


@pytest.mark.parametrize("place", [0, 40, 63], ids="document-{}".format)
def test_mismatch_stops_the_fast_encoder_and_redoes_every_shard(
    tmp_path: Path,
    tokenizer_json: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    place: int,
) -> None:
    good = [f"the quick brown fox number {number}" for number in range(90)]
    bad = [*good]
    bad[place] = "a trap for the fox"
    result = preprocess_with_wrong_encoder(tmp_path, tokenizer_json, [good, bad, good], monkeypatch)
    encoders_used = {part["encoder"] for part in result["datasets"][0]["bin"]["parts"]}
    assert encoders_used == {f"tokenizers {tokenizers.__version__}"}
    assert "wrong 1.0 is stopped, and every shard is done by the reference" in capsys.readouterr().err
    library = tokenizers.Tokenizer.from_file(str(tokenizer_json))
    reader = IndexedDatasetReader(tmp_path / "data")
    assert [reader[index].tolist()[:-1] for index in range(270)] == [
        encoding.ids for encoding in library.encode_batch([*good, *bad, *good])
    ]


def test_shards_without_a_mismatch_keep_the_fast_encoder(
    tmp_path: Path, tokenizer_json: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = preprocess_with_wrong_encoder(tmp_path, tokenizer_json, [["a fox"] * 90], monkeypatch)
    assert {part["encoder"] for part in result["datasets"][0]["bin"]["parts"]} == {"wrong 1.0"}


def test_fast_encoder_wrong_on_the_probe_texts_is_never_used(
    tokenizer_json: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "fast_encoder", lambda file, keep, backend: Wrong(reference_encoder(file, keep)))
    monkeypatch.setattr(worker, "probe_texts", lambda file: ["a trap"])
    encoder, reference, difference = worker.make_encoders(load_tokenizer_file(tokenizer_json), False, "auto")
    assert encoder is reference
    assert difference is not None and "wrong 1.0 makes" in difference


# ---- the tokenizer file ----


@pytest.mark.parametrize("size", [65500, 65536])
def test_vocabulary_that_megatron_reads_two_ways_is_refused(tmp_path: Path, tokenizer_json: Path, size: int) -> None:
    data = json.loads(tokenizer_json.read_text())
    data["added_tokens"].append({**data["added_tokens"][0], "content": "<|last|>", "id": size - 1})
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(data))
    with pytest.raises(ToolError, match=rf"{size:,} ids; for 65,500 to 65,536 .* silent garbage"):
        load_tokenizer_file(path)


def test_end_of_document_token_comes_from_the_configuration_or_the_flag(tmp_path: Path, tokenizer_json: Path) -> None:
    library = tokenizers.Tokenizer.from_file(str(tokenizer_json))
    assert load_tokenizer_file(tokenizer_json).eod_id == library.token_to_id("<|endoftext|>")
    assert load_tokenizer_file(tokenizer_json.parent).eod_id == library.token_to_id("<|endoftext|>")
    assert load_tokenizer_file(tokenizer_json, eod_token="<|pad|>").eod_id == library.token_to_id("<|pad|>")
    alone = tmp_path / "tokenizer.json"
    alone.write_bytes(tokenizer_json.read_bytes())
    assert load_tokenizer_file(alone).eod_id == -1
    with pytest.raises(ToolError, match=r"--eod-token '</s>': not in the vocabulary"):
        load_tokenizer_file(tokenizer_json, eod_token="</s>")


def test_vocabulary_size_counts_added_tokens(tokenizer_json: Path) -> None:
    library = tokenizers.Tokenizer.from_file(str(tokenizer_json))
    assert load_tokenizer_file(tokenizer_json).vocab_size == library.get_vocab_size(with_added_tokens=True)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", b"{}", "not a tokenizer.json"),
        ("tokenizer.json", b"\xff", "not a tokenizer.json"),
        ("cl100k.tiktoken", b"not base64", "not a .tiktoken file"),
        ("mine.tiktoken", b"", "--tiktoken-pattern None: rank files do not carry"),
        ("tokenizer.model", b"", "not a SentencePiece model"),
    ],
)
def test_file_that_is_no_tokenizer_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ToolError, match=message):
        load_tokenizer_file(tmp_path / name)


def test_backend_that_cannot_load_the_file_is_named(tokenizer_model: Path) -> None:
    with pytest.raises(ToolError, match=r"--backend fastokens: encodes tokenizer\.json alone"):
        fast_encoder(load_tokenizer_file(tokenizer_model), False, "fastokens")
