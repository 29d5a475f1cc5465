"""Writes a SentencePiece model as Hugging Face tokenizer files that give the same ids.

Only one family of models can be reproduced exactly by a Hugging Face fast tokenizer: BPE with byte fallback,
identity normalisation, no dummy prefix and all whitespace kept, which is what this project trains. The result is
compared with SentencePiece itself on source code and on repetitive text before it is written; a model which does
not agree, or belongs to another family, is copied as it is and the caller is told why.

Ids are the same for every text, and text comes back from its ids unchanged. Byte pieces that are no UTF-8, which only
a model can put together, are decoded differently: a Hugging Face tokenizer gives U+FFFD for every byte of such a run.

The names of control pieces inside a text are plain text, as they were in training. Who wants them to be recognised
loads the tokenizer with `AutoTokenizer.from_pretrained(folder, split_special_tokens=False)`.
"""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_hybrid.tools.cli import ToolError

WORD_SEPARATOR = "▁"  # SentencePiece writes a space so
PROBE_SOURCE = (
    "def fibonacci(n: int) -> list[int]:\n"
    '    """Return the first `n` numbers.\n\n        indented   with  runs of spaces\n    """\n'
    "\tvalues = [0, 1]  # a tab, then a comment\n"
    "\n\n\n"
    "    while len(values) < n:\r\n        values.append(values[-1] + values[-2])\n"
    "    return values[:n]   \n",
    "  leading and trailing spaces  ",
    "naïve Ελληνικά 中文字 🙂👩‍👩‍👧 \u200b\u00a0\ufeff e\u0301 ﬁ ½",
    "a != b && c <= 0xFF || ~d ^ {'k': [1_000, -2.5e-10]}; 3.14159",
    "\x01\x7f\u0085\u2028",
    "",
    " ",
    "\n",
)


@dataclass(frozen=True)
class TokenizerFiles:
    """What was written: the file names, and, if `tokenizer.json` is not among them, why."""

    files: tuple[str, ...]
    exact: bool
    reason: str


def write_tokenizer(
    model_file: Path, folder: Path, *, vocab_rows: int, eos_id: int | None, pad_id: int | None, max_length: int
) -> TokenizerFiles:
    """Writes the tokenizer of a SentencePiece model into a Hugging Face model folder.

    Args:
        model_file: the SentencePiece model.
        folder: where `tokenizer.json`, `tokenizer_config.json` and a copy of the model go.
        vocab_rows: pieces the checkpoint was trained with; a model of another size is refused.
        eos_id: id of the piece that ends a document; None when there is none.
        pad_id: the same for padding.
        max_length: tokens of the longest context, for `model_max_length`.

    Raises:
        ToolError: the file is missing, is no SentencePiece model, or does not belong to this checkpoint.
    """
    model = read_sentencepiece_model(model_file)
    pieces = [piece.piece for piece in model.pieces]
    if len(pieces) != vocab_rows:
        raise ToolError(
            f"--tokenizer-model {model_file}: it has {len(pieces)} pieces, but the checkpoint was trained with "
            f"true_vocab_size {vocab_rows}; give the model that preprocessed its data"
        )
    for name, token_id in (("eos_token_id", eos_id), ("pad_token_id", pad_id)):
        if token_id is not None and not 0 <= token_id < len(pieces):
            raise ToolError(
                f"--tokenizer-model {model_file}: {name} {token_id} of the checkpoint is no id of this model; "
                f"legal: 0 to {len(pieces) - 1}"
            )
    shutil.copyfile(model_file, folder / "tokenizer.model")
    reason = unsupported_reason(model)
    if not reason:
        tokenizer = build_tokenizer(model)
        reason = first_disagreement(tokenizer, model)
    if reason:
        return TokenizerFiles(("tokenizer.model",), False, reason)
    tokenizer.save(str(folder / "tokenizer.json"))
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,  # transformers 4 may drop spaces before punctuation otherwise
        "split_special_tokens": True,  # as in training: the text "</s>" is characters, never the end of a document
        "model_max_length": max_length,
        "unk_token": pieces[model.trainer_spec.unk_id],
    }
    if eos_id is not None:
        config["eos_token"] = pieces[eos_id]
    if pad_id is not None:
        config["pad_token"] = pieces[pad_id]
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    return TokenizerFiles(("tokenizer.model", "tokenizer.json", "tokenizer_config.json"), True, "")


def read_sentencepiece_model(path: Path) -> Any:
    """The ModelProto of a SentencePiece model file; ToolError if `path` is missing or is no such file."""
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2

    if not path.is_file():
        raise ToolError(f"--tokenizer-model {path}: no such file; give a SentencePiece model (tokenizer.model)")
    content = path.read_bytes()
    try:
        sentencepiece.SentencePieceProcessor(model_proto=content)
    except RuntimeError:
        raise ToolError(f"--tokenizer-model {path}: not a SentencePiece model (tokenizer.model)") from None
    return sentencepiece_model_pb2.ModelProto.FromString(content)


def unsupported_reason(model: Any) -> str:
    """Why a Hugging Face fast tokenizer cannot reproduce `model`; empty when it can."""
    piece_type = type(model.pieces[0])
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    requirements = (
        (trainer.model_type == type(trainer).BPE, "model_type is not bpe"),
        (trainer.byte_fallback, "byte_fallback is off"),
        (not trainer.treat_whitespace_as_suffix, "treat_whitespace_as_suffix is on"),
        (not normalizer.precompiled_charsmap, f"normalisation {normalizer.name!r} is not identity"),
        (not normalizer.add_dummy_prefix, "add_dummy_prefix is on"),
        (not normalizer.remove_extra_whitespaces, "remove_extra_whitespaces is on"),
        (normalizer.escape_whitespaces, "escape_whitespaces is off"),
        (not model.denormalizer_spec.precompiled_charsmap, "it has a denormalizer"),
        (all(piece.type != piece_type.UNUSED for piece in model.pieces), "it has unused pieces"),
        (sum(piece.type == piece_type.BYTE for piece in model.pieces) == 256, "byte pieces are missing"),
    )
    return "; ".join(reason for holds, reason in requirements if not holds)


def build_tokenizer(model: Any) -> Any:
    """A `tokenizers.Tokenizer` with the pieces, the merge order and the byte fallback of `model`."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    piece_type = type(model.pieces[0])
    vocab = {piece.piece: index for index, piece in enumerate(model.pieces)}
    bpe = models.BPE(
        vocab=vocab,
        merges=merge_list(model),
        byte_fallback=True,
        fuse_unk=True,
        unk_token=model.pieces[model.trainer_spec.unk_id].piece,
    )
    tokenizer = Tokenizer(bpe)
    tokenizer.normalizer = normalizers.Replace(" ", WORD_SEPARATOR)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(WORD_SEPARATOR, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    control = [p.piece for p in model.pieces if p.type in (piece_type.CONTROL, piece_type.UNKNOWN)]
    user_defined = [p.piece for p in model.pieces if p.type == piece_type.USER_DEFINED]
    tokenizer.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in control])
    tokenizer.encode_special_tokens = True  # means: as plain text
    # SentencePiece looks for user-defined symbols in the normalised text, where spaces are already escaped.
    tokenizer.add_tokens([AddedToken(piece, special=False, normalized=True) for piece in user_defined])
    return tokenizer


def merge_list(model: Any) -> list[tuple[str, str]]:
    """All pairs that make a piece, best piece first.

    SentencePiece merges any two neighbours whose concatenation is a piece, best score first; a Hugging Face BPE
    wants the pairs themselves. The two part ways only where one piece can be made from overlapping pairs, in
    periodic text, which `first_disagreement` therefore tries.
    """
    normal = type(model.pieces[0]).NORMAL
    mergeable = {piece.piece for piece in model.pieces if piece.type == normal}
    ordered = sorted((p for p in model.pieces if p.type == normal), key=lambda piece: -piece.score)
    return [
        (text[:cut], text[cut:])
        for text in (piece.piece for piece in ordered)
        for cut in range(1, len(text))
        if text[:cut] in mergeable and text[cut:] in mergeable
    ]


def probe_texts(model: Any) -> Iterator[str]:
    """Texts on which a wrong merge order, normaliser or decoder shows: source code, and runs of periodic pieces."""
    yield from PROBE_SOURCE
    roots = set()
    for piece in model.pieces:
        if piece.type in (type(piece).CONTROL, type(piece).UNKNOWN, type(piece).USER_DEFINED):
            yield f"x{piece.piece}{piece.piece} y"
        if piece.type != type(piece).NORMAL:
            continue
        text = piece.piece.replace(WORD_SEPARATOR, " ")
        period = (text + text).find(text, 1)
        if period < len(text):
            roots.add(text[:period])
    for root in sorted(roots):
        for repeats in (*range(2, 40), 63, 64, 65, 127, 129, 200):
            yield f"x{root * repeats}y"
    yield "".join(sorted(roots)) * 3


def first_disagreement(tokenizer: Any, model: Any) -> str:
    """The first probe on which `tokenizer` and SentencePiece differ in ids or in decoded text; empty for none."""
    import sentencepiece

    reference: Any = sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())
    for text in probe_texts(model):
        expected = reference.encode(text)
        if tokenizer.encode(text, add_special_tokens=False).ids != expected:
            return f"a Hugging Face BPE encodes {text[:40]!r} differently"
        if tokenizer.decode(expected, skip_special_tokens=False) != reference.decode(expected):
            return f"a Hugging Face BPE decodes {text[:40]!r} differently"
    return ""
