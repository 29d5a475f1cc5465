"""A look at a GPU machine before anything long: what is installed, and one FP8 linear layer per recipe.

python -m megatron_hybrid.tools.gpu_bench.check
"""

from __future__ import annotations

import argparse
import importlib
import traceback
from collections.abc import Callable

import torch

from megatron_hybrid.compat import software
from megatron_hybrid.tools.cli import Parser


def fp8_linear(recipe: str) -> str:
    """Largest error of a 128 x 128 layer and of its input's gradient, relative to bf16."""
    import transformer_engine.pytorch as te
    from transformer_engine.common import recipe as recipes

    kinds = {
        "tensorwise": recipes.Float8CurrentScaling(),
        "delayed": recipes.DelayedScaling(),
        "blockwise": recipes.Float8BlockScaling(),
    }
    torch.manual_seed(0)
    layer = te.Linear(128, 128, bias=False, params_dtype=torch.bfloat16)
    x = torch.randn(128, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    found = []
    for enabled in (False, True):
        for _ in range(2):
            x.grad = None
            with te.fp8_autocast(enabled=enabled, fp8_recipe=kinds[recipe]):
                y = layer(x)
            y.backward(torch.ones_like(y))
        found.append((y.detach().float(), x.grad.float()))  # type: ignore[union-attr]
    errors = [((a - b).norm() / a.norm()).item() for a, b in zip(*found, strict=True)]
    return f"output {errors[0]:.3f}, gradient {errors[1]:.3f}"


def attention() -> str:
    """Which kernels Transformer Engine's attention takes at the 7B's head size."""
    import transformer_engine.pytorch as te

    core = te.DotProductAttention(30, 128, attn_mask_type="causal", qkv_format="sbhd")
    q, k, v = (torch.randn(1024, 1, 30, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        core(q, k, v).sum().backward()
        torch.cuda.synchronize()
    names = {e.name[:60] for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA}
    return ", ".join(
        sorted(name for name in names if any(word in name for word in ("fmha", "flash", "sdpa", "softmax")))
    )


def main() -> None:
    Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print(software(), flush=True)
    checks: dict[str, Callable[[], object]] = {
        f"import {name}": lambda name=name: importlib.import_module(name)  # type: ignore[misc]
        for name in ("transformer_engine.pytorch", "megatron.training", "fla", "tensorboard", "sentencepiece")
    }
    checks |= {f"FP8 {name}": lambda name=name: fp8_linear(name) for name in ("tensorwise", "delayed", "blockwise")}  # type: ignore[misc]
    checks["attention"] = attention
    for name, run in checks.items():
        try:
            result = run()
            print(f"{name}: {result if isinstance(result, str) else 'ok'}", flush=True)
        except Exception as error:
            traceback.print_exc()
            print(f"{name}: {type(error).__name__}: {error}"[:300], flush=True)


if __name__ == "__main__":
    main()
