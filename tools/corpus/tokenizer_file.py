"""What a tokenizer file is: Hugging Face's tokenizer.json, a SentencePiece model or tiktoken ranks."""

import base64
import hashlib
import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_hybrid.tools.cli import ToolError

UINT16_TRAP = range(65500, 65537)  # vocabularies Megatron's builder stores as int32 and its fast path reads as uint16

# Split patterns of tiktoken encodings, which their rank files do not carry.
TIKTOKEN_PATTERNS = {
    "gpt2": r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s""",
    "cl100k": r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|"""
    r"""\s++$|\s*[\r\n]|\s+(?!\S)|\s""",
}

# Split patterns of tokenizer.json in which no match crosses, or looks past, the places CUT_PLACE finds.
_CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|{digits}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CUTTABLE_PATTERNS = {
    _CL100K.replace("{digits}", r"\p{N}{1,3}"),  # cl100k, Llama 3, OLMo 2 and 3
    _CL100K.replace("{digits}", r"\p{N}"),  # Qwen 2
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",  # GPT-2
}
# Between a word and the space before the next word; after a line end, before a letter.
CUT_PLACE = re.compile(
    r"(?<=[A-Za-z])(?= [A-Za-z])|(?<=[^\s]\n)(?=[A-Za-z\u3041-\u3096\u30a1-\u30fa\u4e00-\u9fff\uac00-\ud7a3])"
)


@dataclass(frozen=True)
class TokenizerFile:
    """A tokenizer as the plan records it; two with equal fields make the same ids.

    `vocab_size` is the largest id + 1, added tokens included. `eod_id` is -1 where there is none.
    `special` are the strings that stand for control tokens. `cuttable` says whether a text may be
    encoded in pieces, cut at CUT_PLACE, with the same ids as in one.
    """

    kind: str
    path: str
    sha256: str
    vocab_size: int
    eod_id: int
    special: tuple[str, ...] = ()
    cuttable: bool = False
    pattern: str = ""
    content: bytes = field(default=b"", repr=False, compare=False)

    def record(self) -> dict[str, Any]:
        """What plans and manifests keep of it."""
        fields = asdict(self)
        del fields["content"]
        return fields | {"special": list(self.special)}


def load_tokenizer_file(
    path: Path, eod_token: str | None = None, eod_id: int | None = None, tiktoken_pattern: str | None = None
) -> TokenizerFile:
    """Reads `path`, a file or a folder with tokenizer.json; raises ToolError if it is no tokenizer."""
    if path.is_dir():
        path = path / "tokenizer.json"
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise ToolError(
            f"--tokenizer-model {path}: no such file; give a tokenizer.json, tokenizer.model or .tiktoken file, or "
            "train one with python -m megatron_hybrid.tools.train_tokenizer"
        ) from None
    if path.suffix == ".json":
        result = _huggingface(path, content, eod_token)
    elif path.suffix == ".tiktoken":
        result = _tiktoken(path, content, tiktoken_pattern)
    else:
        result = _sentencepiece(path, content, eod_token)
    if eod_id is not None:
        if not eod_id >= 0:
            raise ToolError(f"--eod-id {eod_id}: must be 0 or more")
        result = TokenizerFile(
            **{
                **result.__dict__,
                "eod_id": eod_id,
                "vocab_size": max(result.vocab_size, eod_id + 1),
            }
        )
    if result.vocab_size in UINT16_TRAP:
        raise ToolError(
            f"--tokenizer-model {path}: {result.vocab_size:,} ids; for 65,500 to 65,536 Megatron's builder writes "
            "int32 and its --dataloader-fast-cache-load reads uint16, which is silent garbage: add unused tokens up to "
            "65,537 or train a vocabulary below 65,500"
        )
    return result


def _huggingface(path: Path, content: bytes, eod_token: str | None) -> TokenizerFile:
    try:
        data = json.loads(content)
        model, added = data["model"], data.get("added_tokens") or []
        vocab = model["vocab"]
        ids = list(vocab.values()) if isinstance(vocab, dict) else list(range(len(vocab)))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ToolError(f"--tokenizer-model {path}: not a tokenizer.json of the tokenizers library") from None
    vocab_size = max([*ids, *(token["id"] for token in added)], default=-1) + 1
    if eod_token is None:
        eod_token = _configured_eos(path)
    eod_id = -1
    if eod_token is not None:
        known = {token["content"]: token["id"] for token in added}
        in_vocab: Any = vocab.get(eod_token, -1) if isinstance(vocab, dict) else -1
        eod_id = int(known.get(eod_token, in_vocab))
        if eod_id < 0:
            raise ToolError(
                f"--eod-token {eod_token!r}: not in the vocabulary of {path}; its added tokens are "
                f"{', '.join(list(known)[:8]) or 'none'}"
            )
    special = tuple(sorted((token["content"] for token in added if token.get("special")), key=len, reverse=True))
    return TokenizerFile(
        "huggingface", str(path), hashlib.sha256(content).hexdigest(), vocab_size, eod_id, special,
        _is_cuttable(data, added), content=content,
    )  # fmt: skip


def _configured_eos(path: Path) -> str | None:
    """The eos_token of the tokenizer_config.json beside `path`, if there is one."""
    config = path.with_name("tokenizer_config.json")
    if not config.is_file():
        return None
    try:
        eos = json.loads(config.read_bytes()).get("eos_token")
    except (ValueError, AttributeError):
        raise ToolError(f"{config}: not JSON; repair it or pass --eod-token") from None
    return eos.get("content") if isinstance(eos, dict) else eos


def _is_cuttable(data: dict[str, Any], added: list[dict[str, Any]]) -> bool:
    if data.get("normalizer") is not None or data["model"].get("type", "BPE") != "BPE":
        return False
    if any(re.search(r"\s", token["content"]) or token.get("lstrip") or token.get("rstrip") for token in added):
        return False
    outer = data.get("pre_tokenizer") or {}
    steps = outer.get("pretokenizers", []) if outer.get("type") == "Sequence" else [outer]
    byte_level = [step for step in steps if step.get("type") == "ByteLevel"]
    splits = [step for step in steps if step.get("type") == "Split"]
    if len(byte_level) != 1 or byte_level[0].get("add_prefix_space") or len(byte_level) + len(splits) != len(steps):
        return False
    if byte_level[0].get("use_regex", True):
        return not splits
    return bool(splits) and all(
        step["pattern"].get("Regex") in CUTTABLE_PATTERNS and step.get("behavior") == "Isolated" for step in splits
    )


def _sentencepiece(path: Path, content: bytes, eod_token: str | None) -> TokenizerFile:
    import sentencepiece

    try:
        if not content:
            raise RuntimeError("empty")  # the library takes it for a model without pieces
        processor: Any = sentencepiece.SentencePieceProcessor(model_proto=content)
    except RuntimeError:
        raise ToolError(
            f"--tokenizer-model {path}: not a SentencePiece model (tokenizer.model); Hugging Face's is tokenizer.json"
        ) from None
    eod_id = int(processor.eos_id())  # Megatron's eod of a SentencePiece model; -1: none
    if eod_token is not None:
        eod_id = int(processor.piece_to_id(eod_token))
        if eod_id == processor.unk_id():
            raise ToolError(f"--eod-token {eod_token!r}: not a piece of {path}")
    size = int(processor.vocab_size())
    special = tuple(
        sorted((processor.id_to_piece(index) for index in range(size) if processor.is_control(index)), key=len)
    )
    return TokenizerFile(
        "sentencepiece", str(path), hashlib.sha256(content).hexdigest(), size, eod_id, special, content=content
    )


def tiktoken_ranks(content: bytes) -> dict[bytes, int]:
    """The token bytes and ids of a .tiktoken file; raises ValueError for anything else."""
    ranks = {}
    for line in content.split(b"\n"):
        if line.strip():
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
    return ranks


def _tiktoken(path: Path, content: bytes, pattern: str | None) -> TokenizerFile:
    if pattern is None:
        pattern = next((name for name in TIKTOKEN_PATTERNS if path.name.startswith(name)), None)
    if pattern not in TIKTOKEN_PATTERNS:
        raise ToolError(
            f"--tiktoken-pattern {pattern}: rank files do not carry their split pattern; choose one of "
            f"{', '.join(TIKTOKEN_PATTERNS)}"
        )
    try:
        ranks = tiktoken_ranks(content)
        if not ranks:
            raise ValueError("empty")
    except ValueError:
        raise ToolError(f"--tokenizer-model {path}: not a .tiktoken file (base64 token, space, rank)") from None
    return TokenizerFile(
        "tiktoken", str(path), hashlib.sha256(content).hexdigest(), max(ranks.values()) + 1, -1,
        pattern=TIKTOKEN_PATTERNS[pattern], content=content,
    )  # fmt: skip
