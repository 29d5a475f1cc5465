"""What two implementations of a model are asked, and how their answers are written, both as safetensors files.

    tokens, tokens.NAME     int64 [B, T]        answered by logits, logits.NAME     fp32 [B, T, V]
    lengths.NAME            int64 [documents]   tokens.NAME [1, T] is a packed row of documents of these lengths
    prompt.NAME             int64 [1, T]        answered by greedy.NAME             int64 [NEW_TOKENS]
    text.NAME               int64 [1, T]        answered by loss.NAME               fp64 [], mean over T - 1 tokens

Greedy tokens come from full forward passes, so that no cache can differ.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    #: Logits [B, T, V] of tokens [B, T], or of one packed row of documents of the given lengths.
    Forward = Callable[[Tensor, list[int] | None], Tensor]

NEW_TOKENS = 32


def answers(questions: dict[str, Tensor], forward: Forward) -> dict[str, Tensor]:
    """The answers to all questions of a file; questions of other names are left out."""
    import torch

    found: dict[str, Tensor] = {}
    for key, tokens in questions.items():
        kind, _, name = key.partition(".")
        suffix = f".{name}" if name else ""
        if kind == "tokens":
            lengths = questions.get(f"lengths.{name}")
            logits = forward(tokens, None if lengths is None else lengths.tolist())
            found[f"logits{suffix}"] = logits.float().cpu().contiguous()
        elif kind == "prompt":
            for _ in range(NEW_TOKENS):
                following = forward(tokens, None)[:, -1].argmax(dim=-1, keepdim=True)
                tokens = torch.cat([tokens, following.to(tokens.device)], dim=1)
            found[f"greedy{suffix}"] = tokens[0, -NEW_TOKENS:].cpu().contiguous()
        elif kind == "text":
            logits = forward(tokens, None)[0, :-1].double().cpu()
            found[f"loss{suffix}"] = torch.nn.functional.cross_entropy(logits, tokens[0, 1:].cpu())
    return found
