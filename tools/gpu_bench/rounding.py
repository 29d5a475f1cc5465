"""What FP8 costs by itself: gradients of one batch with the operands of its GEMMs rounded, and nothing else changed.

    python -m megatron_hybrid.tools.gpu_bench.rounding QUESTION.json ANSWER.json

The question is `gradients`' (the model starts from random weights); the answer is of the same form, with one variant,
"rounded": a scale per tensor from its present values, E4M3 forward and E5M2 for gradients, as --fp8-recipe tensorwise.
Sums are in fp32 and their results rounded to bf16. It needs no GPU and none of Transformer Engine.
"""

from __future__ import annotations

import json
import logging
from typing import Any

import torch

from megatron_hybrid.tools.cli import run_cli
from megatron_hybrid.tools.gpu_bench import harness
from megatron_hybrid.tools.gpu_bench.gradients import Gradients, cosines, question_and_answer, table

#: The linears that docs/fp8.md lists.
IN_FP8 = ("in_proj", "out_proj", "linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")


def rounded(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x as `dtype` holds it when its largest value is scaled to the largest of the format, in fp32."""
    scale = torch.finfo(dtype).max / x.abs().max().clamp(min=1e-30)
    return (x * scale).to(dtype).float() / scale


class Linear(torch.autograd.Function):
    """x [..., in], w [out, in] → x w^T, with rounded operands in its three products where `in_fp8`."""

    in_fp8 = False

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        x, w = x.bfloat16().float(), w.bfloat16().float()
        if Linear.in_fp8:
            x, w = rounded(x, torch.float8_e4m3fn), rounded(w, torch.float8_e4m3fn)
        ctx.save_for_backward(x, w)
        return (x @ w.t()).bfloat16().float()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        x, w = ctx.saved_tensors
        dy = grads[0].bfloat16().float()
        if Linear.in_fp8:
            dy = rounded(dy, torch.float8_e5m2)
        return (dy @ w).bfloat16().float(), (dy.flatten(0, -2).t() @ x.flatten(0, -2)).bfloat16().float()


def gradients_of(model: harness.Trained, tokens: torch.Tensor, in_fp8: bool) -> Gradients:
    Linear.in_fp8 = in_fp8
    model.data = harness.batches(tokens, model.args.seq_length, model.args.micro_batch_size)
    model.backward()
    named = model.model[0].named_parameters()
    return {name.removeprefix("module."): param.main_grad.clone() for name, param in named}


def main() -> None:
    logging.disable(logging.WARNING)
    question, answer = question_and_answer(__doc__)
    tokens = harness.read_tokens(question["tokens"])[: 2**20]
    harness.start()
    flags = [*question["flags"], *question["tokenizer"], "--mock-data", "--no-skip-step"]
    args = harness.parse(question["preset"], flags, fixed_vocabulary=False)
    args.bf16, args.params_dtype = False, torch.float32  # every rounding is this file's
    model = harness.Trained(args, tokens, with_optimizer=False)
    for name, module in model.model[0].named_modules():
        if name.rpartition(".")[2] in IN_FP8:
            module._forward_impl = lambda input, weight, *args, **kwargs: Linear.apply(input, weight)
    found = {"rounded": cosines(gradients_of(model, tokens, True), gradients_of(model, tokens, False))}
    answer.write_text(json.dumps({"cosines": found, "table": table(found)}, indent=1))
    print("\n".join(table(found)))


if __name__ == "__main__":
    run_cli(main)
