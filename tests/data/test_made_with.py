"""A dataset of another tokenizer than the run's is refused, or named."""

import argparse
import json
from pathlib import Path

import pytest

from megatron_hybrid.data.made_with import OtherTokenizer, check


@pytest.mark.parametrize("manifest", ["text.json", "manifest.json"])
def test_data_of_another_tokenizer(manifest: str, tmp_path: Path) -> None:
    tokenizer = {"path": "old.model", "vocab_size": 500, "eod_id": 1}
    said_of: dict[str, object] = {
        "tokenizer": tokenizer,
        "options": {"append_eod": True},
        "datasets": [{"prefix": "text"}],
    }
    (tmp_path / manifest).write_text(json.dumps(said_of))
    prefixes = [str(tmp_path / "text")]

    def said(rows: int, eod: int, **flags: bool) -> list[str]:
        return check(argparse.Namespace(padded_vocab_size=rows, **flags), eod, prefixes)

    assert said(512, 1, document_masking=True) == []
    with pytest.raises(OtherTokenizer, match=r"text: made with old.model of 500 ids, .* embedding has 128 rows"):
        said(128, 1)
    (line,) = said(512, 98)
    assert "ends documents with id 1; this run's tokenizer does with 98" in line
    with pytest.raises(OtherTokenizer, match=r"id 1; .* with 98: --document-masking would not find them"):
        said(512, 98, document_masking=True)
    said_of["options"] = {"append_eod": False}
    (tmp_path / manifest).write_text(json.dumps(said_of))
    assert said(512, 98) == []
    (line,) = said(512, 1, document_masking=True)
    assert "made without --append-eod: --document-masking finds only" in line


@pytest.mark.parametrize("content", ["[]", '{"text": "a corpus"}\n{"text": "of two lines"}'])
def test_data_without_a_manifest_are_taken(content: str, tmp_path: Path) -> None:
    (tmp_path / "text.json").write_text(content)
    others = {"tokenizer": {"vocab_size": 500, "eod_id": 1}, "options": {"append_eod": True}}
    (tmp_path / "manifest.json").write_text(json.dumps(others | {"datasets": [{"prefix": "others"}]}))
    assert check(argparse.Namespace(padded_vocab_size=1), 0, [str(tmp_path / "text")]) == []
    assert check(argparse.Namespace(padded_vocab_size=None), 1, [str(tmp_path / "others")]) == []
