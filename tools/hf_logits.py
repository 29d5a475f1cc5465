"""Logits of a Hugging Face OLMo-Hybrid folder on given tokens, by transformers in fp32.

    python -m megatron_hybrid.tools.hf_logits --model HF_FOLDER --tokens TOKENS.safetensors --output OUT.safetensors

TOKENS holds "tokens", integers [B, T]; OUT gets "logits", fp32 [B, T, V]. Packed rows, greedy tokens and losses can be
asked for too: see `tools.convert.questions`. Meant for a process of its own, so that the comparison with Megatron
shares no model code and no state. Each document is run by itself, without padding.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_hybrid.tools.cli import Parser, ToolError, run_cli
from megatron_hybrid.tools.convert.questions import answers

if TYPE_CHECKING:
    from torch import Tensor


def load_model(folder: Path) -> Any:
    """transformers' OlmoHybridForCausalLM or Olmo3ForCausalLM of a local folder, fp32, in evaluation mode.

    Raises:
        ToolError: no model there, or its tensors are not exactly those that the model has; transformers alone would
            initialise what is missing at random and only warn.
    """
    import torch
    from transformers import AutoConfig, Olmo3ForCausalLM, OlmoHybridForCausalLM

    if not (folder / "config.json").is_file():
        raise ToolError(f"--model {folder}: no config.json in it; give a folder made by tools.convert export")
    model_type = AutoConfig.from_pretrained(str(folder), local_files_only=True).model_type
    if model_type not in ("olmo_hybrid", "olmo3"):
        raise ToolError(f"--model {folder}: model_type {model_type!r}, legal: 'olmo_hybrid', 'olmo3'")
    model, report = (OlmoHybridForCausalLM if model_type == "olmo_hybrid" else Olmo3ForCausalLM).from_pretrained(
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


def document_logits(model: Any, tokens: Tensor, lengths: list[int] | None) -> Tensor:
    """Logits of rows [B, T], or of one packed row [1, T] whose documents are run one by one."""
    import torch

    if lengths is None:
        return hf_logits(model, tokens)
    documents = [document for document in tokens.split(lengths, dim=1) if document.numel()]
    return torch.cat([hf_logits(model, document) for document in documents], dim=1)


def main() -> None:
    """Entry point; see the module's docstring."""
    parser = Parser(prog="python -m megatron_hybrid.tools.hf_logits", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face folder")
    parser.add_argument("--tokens", type=Path, required=True, help='safetensors file with "tokens", int64 [B, T]')
    parser.add_argument("--output", type=Path, required=True, help='safetensors file to write "logits" to')
    arguments = parser.parse_args()
    if not arguments.tokens.is_file():
        raise ToolError(f"--tokens {arguments.tokens}: no such file")

    from safetensors.torch import load_file, save_file

    model = load_model(arguments.model)
    found = answers(load_file(arguments.tokens), partial(document_logits, model))
    if not found:
        raise ToolError(f'--tokens {arguments.tokens}: nothing to answer in it; it should hold "tokens", int64 [B, T]')
    save_file(found, arguments.output)
    print(f"{arguments.output}: {', '.join(f'{name} {list(tensor.shape)}' for name, tensor in found.items())}")


if __name__ == "__main__":
    run_cli(main)
