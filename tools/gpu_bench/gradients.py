"""Gradients of one batch under several sets of flags, compared with those of the first: cosines, layer by layer.

    python -m megatron_hybrid.tools.gpu_bench.gradients QUESTION.json ANSWER.json

QUESTION: {preset, flags, tokenizer: flags, tokens: raw uint16 file, variants: {name: flags}}. ANSWER: {cosines:
{variant: {parameter: cosine}}, table: markdown lines, fp8: {variant: modules that computed in FP8}}.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_hybrid.tools.cli import Parser, ToolError, run_cli
from megatron_hybrid.tools.gpu_bench import harness

#: Delayed scaling knows the range of its tensors after it has seen them.
PASSES = 4

Gradients = dict[str, torch.Tensor]


def gradients_of(question: dict[str, Any], variant: str, tokens: torch.Tensor) -> tuple[Gradients, list[str], float]:
    """({parameter: gradient on CPU}, names of modules that ran in FP8, loss) of the last of some equal passes."""
    from megatron.training.checkpointing import load_checkpoint

    from megatron_hybrid.model import OlmoHybridModel

    flags = [*question["flags"], *question["variants"][variant], "--no-load-optim", "--no-load-rng", "--no-skip-step"]
    args = harness.parse(question["preset"], [*flags, *question["tokenizer"], "--mock-data"], fixed_vocabulary=False)
    model = harness.Trained(args, tokens, with_optimizer=False)
    try:
        load_checkpoint(model.model, None, None)
        loss = 0.0
        for _ in range(PASSES):
            model.data = harness.batches(tokens, args.seq_length, args.micro_batch_size)  # the same batch
            loss = float(model.backward())
        whole = next(module for module in model.model[0].modules() if isinstance(module, OlmoHybridModel))
        found = {name: param.main_grad.detach().float().cpu() for name, param in whole.named_parameters()}
        in_fp8 = [name for name, module in whole.named_modules() if getattr(module, "fp8", False) is True]
        return found, in_fp8, loss
    finally:
        model.close()


def cosines(found: Gradients, reference: Gradients) -> dict[str, float]:
    return {
        name: torch.nn.functional.cosine_similarity(found[name].double().flatten(), grad.double().flatten(), 0).item()
        for name, grad in reference.items()
    }


def table(by_variant: Mapping[str, dict[str, float]]) -> list[str]:
    """Rows are layers, columns variants: the least cosine in the layer and where."""
    names = list(by_variant)
    if not names:
        return []
    layers = sorted({_layer(name) for name in by_variant[names[0]]}, key=lambda layer: (not layer.isdigit(), layer))
    lines = [
        "Cosine of gradients with bf16's, the least of each layer",
        "",
        "| layer | " + " | ".join(names) + " |",
        "|---" * (len(names) + 1) + "|",
    ]
    for layer in layers:
        cells = []
        for variant in names:
            inside = {name: value for name, value in by_variant[variant].items() if _layer(name) == layer}
            worst = min(inside, key=lambda name: inside[name])
            cells.append(f"{inside[worst]:.5f} {worst.split(f'layers.{layer}.')[-1].removesuffix('.weight')}")
        lines.append(f"| {layer} | " + " | ".join(cells) + " |")
    return lines


def _layer(parameter: str) -> str:
    found = re.search(r"layers\.(\d+)\.", parameter)
    return found[1] if found else parameter


def question_and_answer(description: str | None) -> tuple[dict[str, Any], Path]:
    """What the command line names: the question as it was read, and where the answer goes.

    Raises:
        ToolError: a question that is no JSON, or lacks a part.
    """
    parser = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question", type=Path)
    parser.add_argument("answer", type=Path)
    args = parser.parse_args()
    try:
        question: dict[str, Any] = json.loads(args.question.read_text())
        missing = [name for name in ("preset", "flags", "tokenizer", "tokens", "variants") if name not in question]
    except ValueError as error:
        raise ToolError(f"{args.question}: not JSON ({error})") from None
    if missing:
        raise ToolError(f"{args.question}: has no {missing[0]!r}; tools.fp8_acceptance writes such files")
    return question, args.answer


def main() -> None:
    logging.disable(logging.WARNING)
    question, output = question_and_answer(__doc__)
    tokens = harness.read_tokens(question["tokens"])[: 2**20]
    harness.start()
    reference: Gradients | None = None
    answer: dict[str, Any] = {"cosines": {}, "fp8": {}, "losses": {}, "errors": {}}
    for variant in question["variants"]:
        try:
            found, answer["fp8"][variant], answer["losses"][variant] = gradients_of(question, variant, tokens)
        except Exception as error:
            traceback.print_exc()
            answer["errors"][variant] = f"{type(error).__name__}: {error}"[:300]
            continue
        finally:
            harness.free()
        if reference is None:
            reference = found
        else:
            answer["cosines"][variant] = cosines(found, reference)
        answer["table"] = table(answer["cosines"])
        output.write_text(json.dumps(answer, indent=1))
    if answer["errors"]:
        raise SystemExit(f"error: {answer['errors']}")


if __name__ == "__main__":
    run_cli(main)
