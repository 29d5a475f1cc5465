"""A SentencePiece model as Hugging Face files: the same ids and the same text, or an honest copy."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from megatron_hybrid.tools import hf_tokenizer
from megatron_hybrid.tools.cli import ToolError
from megatron_hybrid.tools.convert.hf_config import hf_config
from tests.tools.tiny_model import PYTHON_SOURCE, ROOT, TINY, train_sentencepiece


def test_auto_tokenizer_gives_the_ids_and_the_text_of_sentencepiece(
    tmp_path: Path,
) -> None:
    from transformers import AutoTokenizer

    model, folder = tmp_path / "any.model", tmp_path / "hf"
    folder.mkdir()
    train_sentencepiece(model)
    written = hf_tokenizer.write_tokenizer(model, folder, vocab_rows=371, eos_id=1, pad_id=None, max_length=64)
    assert written.exact
    assert {path.name for path in folder.iterdir()} == set(written.files)
    (folder / "config.json").write_text(json.dumps(hf_config(TINY, "float32")))  # AutoTokenizer looks at it
    reference = sentencepiece.SentencePieceProcessor(model_file=str(model))
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    for text in (
        PYTHON_SOURCE,
        PYTHON_SOURCE * 7,
        Path(__file__).read_text(),
        (ROOT / "pyproject.toml").read_text().replace("    ", "\t"),
        " ",
        "       \n  \r\n\t\t \x00 <|endoftext|> <unk> <0x0A> \u2028\U0001f469\u200d\U0001f467",
        *(" " * count + "x" + "=" * count for count in range(1, 80)),
    ):
        ids = tokenizer(text)["input_ids"]
        assert ids == reference.encode(text), text[:50]
        assert tokenizer.decode(ids) == reference.decode(ids) == text
    assert len(tokenizer) == 371
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.bos_token_id) == (1, None, None)
    recognised = AutoTokenizer.from_pretrained(str(folder), split_special_tokens=False)
    assert recognised("<|endoftext|>")["input_ids"] == [1]


def test_the_tokenizer_that_this_project_trains_is_reproduced(
    tokenizer_model: Path, vocab_size: int, tmp_path: Path
) -> None:
    written = hf_tokenizer.write_tokenizer(
        tokenizer_model, tmp_path, vocab_rows=vocab_size, eos_id=1, pad_id=None, max_length=64
    )
    assert written.exact, written.reason


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_type": "unigram"}, "model_type is not bpe"),
        ({"byte_fallback": False}, "byte_fallback is off"),
        ({"normalization_rule_name": "nmt_nfkc"}, "normalisation 'nmt_nfkc' is not identity"),
        ({"add_dummy_prefix": True}, "add_dummy_prefix is on"),
        ({"remove_extra_whitespaces": True}, "remove_extra_whitespaces is on"),
        ({"user_defined_symbols": ["    "]}, "encodes .* differently"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_tokenizer_that_cannot_be_reproduced_is_copied(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    model, folder = tmp_path / "tokenizer.model", tmp_path / "hf"
    folder.mkdir()
    train_sentencepiece(model, **{"hard_vocab_limit": False, **changes})
    rows = sentencepiece.SentencePieceProcessor(model_file=str(model)).vocab_size()
    written = hf_tokenizer.write_tokenizer(model, folder, vocab_rows=rows, eos_id=1, pad_id=None, max_length=64)
    assert not written.exact
    assert re.search(reason, written.reason)
    assert [path.name for path in folder.iterdir()] == ["tokenizer.model"]
    assert (folder / "tokenizer.model").read_bytes() == model.read_bytes()


def test_a_model_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    model = tmp_path / "any.model"
    train_sentencepiece(model)
    for path, rows, eos_id, message in (
        (model, 372, 1, "has 371 pieces, but the checkpoint was trained with true_vocab_size 372"),
        (model, 371, 371, "eos_token_id 371 of the checkpoint is no id of this model; legal: 0 to 370"),
        (tmp_path / "nothing.model", 371, 1, "no such file"),
        (Path(__file__), 371, 1, "not a SentencePiece model"),
    ):
        with pytest.raises(ToolError, match=f"--tokenizer-model {path}: .*{message}"):
            hf_tokenizer.write_tokenizer(path, tmp_path, vocab_rows=rows, eos_id=eos_id, pad_id=None, max_length=64)
        assert [found.name for found in tmp_path.iterdir()] == ["any.model"]
