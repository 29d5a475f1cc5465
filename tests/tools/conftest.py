"""Text and a tokenizer small enough to train in a blink, shared by the tests of the data tools."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_hybrid.tools import train_tokenizer

VOCAB_SIZE = 397

TEXTS = [
    "def area(radius):\n    if radius < 0:\n        raise ValueError('negative')\n    return 3.14159 * radius ** 2\n",
    "\tTabs and   runs of spaces, a trailing blank  ",
    "Grüße, 漢字, emoji 🎉, e\u0301 beside é, a no-break\u00a0space.\r\n",
    "the quick brown fox jumps over the lazy dog; the dog sleeps on.\n\n\n",
    "<|endoftext|> and <unk> and <0x0A> are plain text here",
    "x",
]


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """The documents of TEXTS."""
    return list(TEXTS)


@pytest.fixture(scope="session")
def vocab_size() -> int:
    """Number of pieces of `tokenizer_model`."""
    return VOCAB_SIZE


@pytest.fixture(scope="session")
def tokenizer_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of VOCAB_SIZE pieces trained on TEXTS."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    sentences = [sentence for text in TEXTS * 3 for sentence in text.replace("\t", "\n").split("\n") if sentence]
    path.write_bytes(train_tokenizer.train(sentences, VOCAB_SIZE))
    return path


SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


@pytest.fixture(scope="session")
def tokenizer_json(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE of the kind OLMo uses, in a folder with its tokenizer_config.json; eos <|endoftext|>."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    tokenizer.add_special_tokens([AddedToken("<|endoftext|>", special=True), AddedToken("<|pad|>", special=True)])
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    tokenizer.save(str(path))
    path.with_name("tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    return path


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[[str, list[str]], Path]:
    """Writes texts as a JSONL file of the given name and returns its path."""

    def write(name: str, texts: list[str]) -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
        return path

    return write
