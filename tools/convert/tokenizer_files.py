"""The tokenizer beside the weights: written for a SentencePiece model, copied for a Hugging Face tokenizer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from megatron_hybrid.tools.cli import ToolError
from megatron_hybrid.tools.convert.output_folder import read_json
from megatron_hybrid.tools.hf_mapping import ModelConfig

#: What may be copied of a Hugging Face tokenizer: text and tables, nothing that runs.
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja"),
)


def write_tokenizer_files(given: Path | None, config: ModelConfig, folder: Path) -> str:
    """Writes the tokenizer, if one is given, into `folder`; returns what was done in words.

    Args:
        given: a SentencePiece model, or a folder with a Hugging Face tokenizer.
        config: the model, whose vocabulary the tokenizer must fit.
        folder: where the files go.
    """
    if given is None:
        return "none written, --tokenizer-model was not given"
    if given.is_dir():
        size = tokenizer_size(given)
        if size is None:
            raise ToolError(
                f"--tokenizer-model {given}: no tokenizer.json in it; give a SentencePiece model or a folder"
            )
        if size > config.vocab_size:
            raise ToolError(
                f"--tokenizer-model {given}: it has {size} tokens, but the checkpoint has {config.vocab_size} rows; "
                "give the tokenizer of this model"
            )
        return f"copied: {', '.join(copy_tokenizer(given, folder))}"

    from megatron_hybrid.tools.hf_tokenizer import write_tokenizer

    written = write_tokenizer(
        given,
        folder,
        vocab_rows=config.true_vocab_size,
        eos_id=config.eos_token_id,
        pad_id=config.pad_token_id,
        max_length=config.max_position_embeddings,
    )
    if written.exact:
        return "AutoTokenizer gives the ids of SentencePiece (compared on source code and periodic text)"
    return f"tokenizer.model copied only, AutoTokenizer cannot load it: {written.reason}"


def copy_tokenizer(source: Path, target: Path) -> list[str]:
    """Copies the tokenizer files of a Hugging Face folder; returns their names. `auto_map`, which names code, goes."""
    copied = []
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
            copied.append(name)
    settings = target / "tokenizer_config.json"
    if "tokenizer_config.json" in copied and "auto_map" in (values := read_json(settings, "copy it again")):
        del values["auto_map"]
        settings.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return copied


def tokenizer_size(folder: Path) -> int | None:
    """Tokens of a folder's tokenizer.json, its highest id plus one; None if there is none."""
    if not (folder / "tokenizer.json").is_file():
        return None
    values = read_json(folder / "tokenizer.json", "copy it again")
    try:
        vocab = values["model"]["vocab"]
        ids = list(vocab.values()) if isinstance(vocab, dict) else list(range(len(vocab)))
        return max([*ids, *(token["id"] for token in values.get("added_tokens", []))]) + 1
    except (KeyError, TypeError, ValueError):
        raise ToolError(f"{folder / 'tokenizer.json'}: not a tokenizer of the tokenizers package") from None
