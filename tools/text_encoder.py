"""Encodes documents to token ids with the tokenizer that training will name in its flags."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_hybrid.tools.cli import ToolError


class SentencePieceEncoder:
    """A SentencePiece model: the ids of `--tokenizer-type SentencePieceTokenizer --tokenizer-model PATH`."""

    def __init__(self, path: Path) -> None:
        """Loads `path`; raises ToolError if it is missing or no SentencePiece model."""
        import sentencepiece

        try:
            content = path.read_bytes()
            self._processor: Any = sentencepiece.SentencePieceProcessor(model_proto=content)
        except FileNotFoundError:
            raise ToolError(
                f"--tokenizer-model {path}: no such file; train one with "
                "python -m megatron_hybrid.tools.train_tokenizer"
            ) from None
        except RuntimeError:
            raise ToolError(f"--tokenizer-model {path}: not a SentencePiece model (tokenizer.model)") from None
        self.vocab_size = int(self._processor.vocab_size())
        self.eod_id = int(self._processor.eos_id())  # Megatron's eod of a SentencePiece model; -1: none
        self.sha256 = hashlib.sha256(content).hexdigest()

    def encode(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        """Token ids of each text, without any special token; literal special tokens are plain text."""
        return [np.array(ids, dtype=np.int32) for ids in self._processor.encode(list(texts), num_threads=1)]
