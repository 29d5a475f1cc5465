"""Whether datasets were made with the tokenizer that the run has: ids of another one train without a word."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

#: Bytes; a larger file of that name is a corpus, which every rank would read into memory.
_MAX_MANIFEST = 1 << 28


class OtherTokenizer(ValueError):
    """Data that this run's tokenizer has not made, where that cannot work; one line."""


def check(args: argparse.Namespace, eod: int, prefixes: Sequence[str]) -> list[str]:
    """Compare the manifests of tools.preprocess beside the datasets, where there are any, with the run.

    Args:
        args: Megatron's, with the rows of the vocabulary matrices.
        eod: the tokenizer's end-of-document id.

    Returns:
        Lines to show, of what may be meant.

    Raises:
        OtherTokenizer: ids beyond the embedding, or document boundaries that would not be found.
    """
    needs_eod = [
        flag
        for flag in ("document-masking", "reset-position-ids", "reset-attention-mask", "eod-mask-loss")
        if getattr(args, flag.replace("-", "_"), False)
    ]
    lines = []
    for prefix, made, appended in _tokenizers(prefixes):
        ids, ends = made.get("vocab_size"), made.get("eod_id")
        about = f"--data-path {prefix}: made with {made.get('path', 'a tokenizer')}"
        if isinstance(ids, int) and args.padded_vocab_size and ids > args.padded_vocab_size:
            raise OtherTokenizer(
                f"{about} of {ids:,} ids, and this run's embedding has {args.padded_vocab_size:,} rows; "
                "give that tokenizer, or prepare the data again"
            )
        if not appended:
            lines += [
                f"--data-path {prefix}: made without --append-eod: --{flag} finds only ends that the texts spell out"
                for flag in needs_eod[:1]
            ]
        elif isinstance(ends, int) and ends != eod:
            line = f"{about}, which ends documents with id {ends}; this run's tokenizer does with {eod}"
            if needs_eod:
                raise OtherTokenizer(f"{line}: --{needs_eod[0]} would not find them; give that tokenizer")
            lines.append(line)
    return lines


def _tokenizers(prefixes: Sequence[str]) -> Iterator[tuple[str, dict[str, Any], bool]]:
    """(prefix, its tokenizer's record, whether documents were ended) of those that a manifest speaks of."""
    for prefix in prefixes:
        for path in (Path(f"{prefix}.json"), Path(prefix).parent / "manifest.json"):
            try:
                if path.stat().st_size > _MAX_MANIFEST:
                    continue
                content = json.loads(path.read_bytes())
                made, names = content["tokenizer"], [entry["prefix"] for entry in content["datasets"]]
                appended = content["options"]["append_eod"]
            except (OSError, ValueError, LookupError, TypeError):
                continue  # not a manifest
            if isinstance(made, dict) and Path(prefix).name in names:  # else of other data in the folder
                yield prefix, made, appended
                break
