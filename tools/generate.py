"""Continues prompts with a Hugging Face OLMo-Hybrid folder, by transformers on the CPU in fp32.

    python -m megatron_hybrid.tools.generate --model HF_FOLDER --prompt "def main" --max-new-tokens 64

Greedy unless --temperature is above 0. Prompts run one after the other, since padding would enter the recurrence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_hybrid.tools.cli import Parser, ToolError, run_cli
from megatron_hybrid.tools.hf_logits import load_model


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: the likeliest at temperature 0; `top_k` 0 means all tokens."""

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ToolError(f"--max-new-tokens {self.max_new_tokens}: legal: 1 and above")
        if self.temperature < 0:
            raise ToolError(f"--temperature {self.temperature}: legal: 0 (greedy) and above")
        if self.top_k < 0:
            raise ToolError(f"--top-k {self.top_k}: legal: 0 (all tokens) and above")
        if self.top_k and not self.temperature:
            raise ToolError(f"--top-k {self.top_k}: has no effect at --temperature 0; give a temperature above 0")


def load_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer; ToolError if transformers cannot load one from it."""
    from transformers import AutoTokenizer

    if not (folder / "tokenizer.json").is_file():
        raise ToolError(
            f"--model {folder}: no tokenizer.json in it; export again with --tokenizer-model, "
            "and see there why a SentencePiece model may be copied only"
        )
    return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)


def continuation(model: Any, tokenizer: Any, prompt: str, sampling: Sampling) -> str:
    """The text that follows `prompt`, without it and without special tokens.

    Raises:
        ToolError: the prompt has no token to continue from.
    """
    import torch

    tokens = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
    if tokens.shape[1] == 0:
        raise ToolError("--prompt: it is empty; the model has no token that begins a document, give some text")
    chosen: dict[str, Any] = {"do_sample": sampling.temperature > 0}
    if chosen["do_sample"]:
        chosen |= {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": 1.0}
    torch.manual_seed(sampling.seed)
    with torch.inference_mode():
        output = model.generate(
            tokens.long(),
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=sampling.max_new_tokens,
            **chosen,
        )
    return tokenizer.decode(output[0, tokens.shape[1] :], skip_special_tokens=True)


def generate(folder: Path, prompts: Sequence[str], sampling: Sampling) -> list[str]:
    """One continuation per prompt; each starts from the same seed, so the order of prompts does not matter."""
    tokenizer = load_tokenizer(folder)
    model = load_model(folder)
    return [continuation(model, tokenizer, prompt, sampling) for prompt in prompts]


def main() -> None:
    """Entry point; see the module's docstring."""
    defaults = Sampling()
    parser = Parser(prog="python -m megatron_hybrid.tools.generate", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face folder with a tokenizer")
    parser.add_argument("--prompt", nargs="+", required=True, metavar="TEXT", help="texts to continue")
    parser.add_argument("--max-new-tokens", type=int, default=defaults.max_new_tokens, help="default: %(default)s")
    parser.add_argument("--temperature", type=float, default=defaults.temperature, help="0: greedy; default: 0")
    parser.add_argument("--top-k", type=int, default=defaults.top_k, help="sample from the k likeliest; 0: all")
    parser.add_argument("--seed", type=int, default=defaults.seed, help="default: %(default)s")
    arguments = parser.parse_args()
    sampling = Sampling(arguments.max_new_tokens, arguments.temperature, arguments.top_k, arguments.seed)
    for prompt, text in zip(arguments.prompt, generate(arguments.model, arguments.prompt, sampling), strict=True):
        print(f"{prompt}{text}\n")


if __name__ == "__main__":
    run_cli(main)
