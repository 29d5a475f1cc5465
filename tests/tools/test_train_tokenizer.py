"""The tokenizer gives every text back unchanged, and Megatron finds its end-of-document token."""

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece

from megatron_hybrid.tools import train_tokenizer as tool
from megatron_hybrid.tools.cli import ToolError

WriteJsonl = Callable[[str, list[str]], Path]


@pytest.fixture(scope="module")
def processor(tokenizer_model: Path) -> sentencepiece.SentencePieceProcessor:
    """The session's model, loaded."""
    return sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_model))


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("def f():\n    if x:\n\t\treturn  1\n\n\n", id="code"),
        pytest.param(" lead, trail ", id="outer-spaces"),
        pytest.param("   ", id="spaces-alone"),
        pytest.param("\n", id="newline-alone"),
        pytest.param("\r\n\x0b\x0c\x85\u2028", id="other-line-ends"),
        pytest.param("a\0b\x7f", id="control-characters"),
        pytest.param("é e\u0301 ﬁ ① ﷺ \u00a0\u3000", id="nfkc-would-change"),
        pytest.param("漢字 🎉👩‍👩‍👧 \U0010ffff", id="outside-the-vocabulary"),
        pytest.param("\u2585\u2047 \ufffd\ufeff", id="sentencepiece-reserved"),
        pytest.param("<|endoftext|><unk><s></s><0x0A>", id="special-tokens-as-text"),
    ],
)
def test_text_comes_back_unchanged(processor: sentencepiece.SentencePieceProcessor, text: str) -> None:
    ids = processor.encode(text)
    assert processor.decode(ids) == text
    assert processor.unk_id() not in ids


def test_space_mark_is_the_one_character_that_does_not_come_back(
    processor: sentencepiece.SentencePieceProcessor,
) -> None:
    others = [chr(code) for code in range(0x3000) if code != 0x2581]
    assert [text for text in others if processor.decode(processor.encode(text)) != text] == []
    assert processor.decode(processor.encode("a\u2581b")) == "a b"


def test_no_space_is_put_before_a_text(processor: sentencepiece.SentencePieceProcessor) -> None:
    assert processor.encode("x", out_type=str) == ["x"]
    assert processor.decode(processor.encode("ab") + processor.encode("cd")) == "abcd"


def test_end_of_document_cannot_be_written_in_a_text(processor: sentencepiece.SentencePieceProcessor) -> None:
    assert processor.id_to_piece(processor.eos_id()) == "<|endoftext|>"
    assert processor.eos_id() not in processor.encode("<|endoftext|>")


def test_megatron_finds_vocabulary_and_end_of_document(
    tokenizer_model: Path, texts: list[str], vocab_size: int
) -> None:
    from megatron.core.tokenizers.utils import build_tokenizer as build

    args = argparse.Namespace(
        tokenizer_type="SentencePieceTokenizer",
        tokenizer_model=str(tokenizer_model),
        chat_template=None,
        tokenizer_sentencepiece_ignore_extra_whitespaces=True,
        tokenizer_sentencepiece_legacy=False,
        special_tokens=None,
        metadata_path=None,
        pad_vocab_size=True,
        make_vocab_size_divisible_by=128,
        tensor_model_parallel_size=1,
        rank=0,
    )
    tokenizer = build.build_tokenizer(args)
    assert (tokenizer.vocab_size, args.padded_vocab_size) == (vocab_size, 512)
    assert (tokenizer.eod, tokenizer.eos, tokenizer.vocab[tokenizer.eod]) == (1, 1, "<|endoftext|>")
    assert tokenizer.pad not in range(vocab_size)
    assert [tokenizer.detokenize(tokenizer.tokenize(text)) for text in texts] == texts


@pytest.mark.parametrize(
    "sentence",
    [
        pytest.param("a" * 10_000, id="ascii"),
        pytest.param("漢" * 5_000, id="three-byte-characters"),
        pytest.param("a🎉é漢" * 2_000, id="mixed-widths"),
        pytest.param("short", id="short"),
        pytest.param("🎉" * 1048, id="exactly-the-limit"),
    ],
)
def test_long_line_is_split_without_loss(sentence: str) -> None:
    parts = list(tool.split_sentence(sentence))
    assert "".join(parts) == sentence
    assert all(0 < len(part.encode()) <= 4192 for part in parts)


def test_long_lines_reach_the_training(tmp_path: Path, write_jsonl: WriteJsonl) -> None:
    words = " ".join(f"zyxwv{number % 7}" for number in range(4000))  # one line of 28 kB
    tool.train_tokenizer(run_arguments(tmp_path, [write_jsonl("in.jsonl", [words])], vocab_size=278))
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    assert "\u2581zyxwv" in {processor.id_to_piece(piece) for piece in range(278)}


def run_arguments(tmp_path: Path, inputs: list[Path], **changes: object) -> argparse.Namespace:
    """The parsed command line of one run into `tmp_path`."""
    args = tool.parser().parse_args(["--input", *map(str, inputs), "--output", str(tmp_path / "tokenizer.model")])
    return argparse.Namespace(**{**vars(args), "vocab_size": 330, **changes})


def test_same_corpus_and_seed_give_the_same_file(tmp_path: Path, write_jsonl: WriteJsonl, texts: list[str]) -> None:
    source = write_jsonl("in.jsonl", texts * 20)
    models = []
    for seed in (1, 1, 2):
        tool.train_tokenizer(run_arguments(tmp_path, [source], seed=seed, sample_mb=0.001))
        models.append((tmp_path / "tokenizer.model").read_bytes())
    assert models[0] == models[1] != models[2]


def test_model_names_no_path(tmp_path: Path, write_jsonl: WriteJsonl, texts: list[str]) -> None:
    tool.train_tokenizer(run_arguments(tmp_path, [write_jsonl("in.jsonl", texts)]))
    assert str(tmp_path).encode() not in (tmp_path / "tokenizer.model").read_bytes()


def test_sample_is_bounded_spread_and_in_order() -> None:
    sentences = [f"{number:06d}" for number in range(10_000)]
    sample = tool.sample_sentences(sentences, 6_000, seed=3)
    assert len(sample) == 1_000
    assert sample == sorted(sample)
    assert 4_500 < sum(map(int, sample)) / len(sample) < 5_500
    assert tool.sample_sentences(sentences, 1e9, seed=3) == sentences


def test_lines_without_a_document_are_reported(tmp_path: Path, write_jsonl: WriteJsonl, texts: list[str]) -> None:
    source = write_jsonl("in.jsonl", texts)
    with open(source, "ab") as handle:
        handle.write(b'{"text": null}\nnot json\n')
    summary = tool.train_tokenizer(run_arguments(tmp_path, [source]))
    assert summary.endswith("lines skipped: malformed_json 1, wrong_type 1")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"vocab_size": 260}, "--vocab-size 260: must be above 260", id="vocabulary-too-small"),
        pytest.param({"vocab_size": 90_000}, "--vocab-size 90000: SentencePiece refuses", id="vocabulary-too-large"),
        pytest.param({"sample_mb": 0.0}, "--sample-mb 0: must be above 0", id="no-sample"),
        pytest.param({"input": [Path("absent.jsonl")]}, r"--input absent\.jsonl: no such file", id="no-input"),
        pytest.param({"text_key": "body"}, r"--input: no text under the key 'body' \(rejected: .*6", id="no-text"),
    ],
)
def test_bad_flag_is_named_and_leaves_no_model(
    tmp_path: Path, write_jsonl: WriteJsonl, change: dict[str, object], message: str, texts: list[str]
) -> None:
    args = run_arguments(tmp_path, [write_jsonl("in.jsonl", texts)], **change)
    with pytest.raises(ToolError, match=message) as error:
        tool.train_tokenizer(args)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.glob("tokenizer*"))


def test_training_prints_nothing_of_its_own(
    tmp_path: Path, write_jsonl: WriteJsonl, capfd: pytest.CaptureFixture[str], texts: list[str]
) -> None:
    tool.train_tokenizer(run_arguments(tmp_path, [write_jsonl("in.jsonl", texts)]))
    output = capfd.readouterr()
    assert (re.fullmatch(r"training 330 pieces on [^\n]*\n", output.out) is not None, output.err) == (True, "")


def test_corpus_of_gather_corpus_keys_is_read(tmp_path: Path, texts: list[str], vocab_size: int) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps({"text": text, "source": "stdlib/x.py"}) + "\n" for text in texts))
    assert f"{vocab_size} pieces" in tool.train_tokenizer(run_arguments(tmp_path, [source], vocab_size=vocab_size))
