"""Logits of a Hugging Face OLMo-Hybrid folder on given tokens, by transformers in fp32.

    python -m megatron_hybrid.tools.hf_logits --model HF_FOLDER --tokens TOKENS.safetensors --output OUT.safetensors

TOKENS holds "tokens", integers [B, T]; OUT gets "logits", fp32 [B, T, V]. Meant for a process of its own, so that
the comparison with Megatron shares no code and no state. Tokens are not padded and each row is one document.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_hybrid.tools.cli import ToolError, run_cli
from megatron_hybrid.tools.compare_logits import read_tensor

if TYPE_CHECKING:
    from torch import Tensor


def load_model(folder: Path) -> Any:
    """transformers' OlmoHybridForCausalLM of a local folder, fp32, in evaluation mode.

    Raises:
        ToolError: no model there, or its tensors are not exactly those that the model has; transformers alone would
            initialise what is missing at random and only warn.
    """
    import torch
    from transformers import OlmoHybridForCausalLM

    if not (folder / "config.json").is_file():
        raise ToolError(f"--model {folder}: no config.json in it; give a folder made by tools.convert export")
    model, report = OlmoHybridForCausalLM.from_pretrained(
        str(folder), dtype=torch.float32, local_files_only=True, output_loading_info=True
    )
    for kind, names in report.items():
        if names:
            first = sorted(map(str, names))[0]
            raise ToolError(f"--model {folder}: {len(names)} tensors under {kind}, the first is {first}")
    return model.eval()


def hf_logits(model: Any, tokens: Tensor) -> Tensor:
    """Logits fp32 [B, T, V] of integer `tokens` [B, T], one row at a time.

    Raises:
        ToolError: `tokens` has another shape or dtype, or an id outside the vocabulary.
    """
    import torch

    if tokens.dim() != 2 or tokens.numel() == 0 or tokens.dtype not in (torch.int64, torch.int32):
        raise ToolError(f"--tokens: int64 [B, T] is needed, but it is {tokens.dtype} {list(tokens.shape)}")
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= model.config.vocab_size:
        raise ToolError(f"--tokens: ids {low} to {high}, legal: 0 to {model.config.vocab_size - 1}")
    with torch.inference_mode():
        return torch.cat([model(row[None].long(), use_cache=False).logits.float() for row in tokens])


def main() -> None:
    """Entry point; see the module's docstring."""
    parser = argparse.ArgumentParser(
        prog="python -m megatron_hybrid.tools.hf_logits", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face folder")
    parser.add_argument("--tokens", type=Path, required=True, help='safetensors file with "tokens", int64 [B, T]')
    parser.add_argument("--output", type=Path, required=True, help='safetensors file to write "logits" to')
    arguments = parser.parse_args()
    tokens = read_tensor(arguments.tokens, "tokens")
    logits = hf_logits(load_model(arguments.model), tokens)

    from safetensors.torch import save_file

    save_file({"logits": logits.contiguous()}, arguments.output)
    print(f"{arguments.output}: logits {list(logits.shape)} fp32")


if __name__ == "__main__":
    run_cli(main)
