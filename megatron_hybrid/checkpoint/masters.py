"""Whether the masters in a checkpoint's optimizer state are masters: fp32 numbers that round to the weights.

With --use-precision-aware-optimizer they were not until training/hooks.py asked for whole ones: Transformer Engine's
Adam kept the lower 16 bits of each master beside its bf16 weight, which Megatron stored as numbers from -32768 to
32767, and of fp32 parameters it stored the first value. Who continues from such state, or averages or exports it, gets
another model without a word.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_hybrid.checkpoint.discovery import Unloadable
from megatron_hybrid.tools.dcp_reader import StoredTensor, TorchDistCheckpoint

OPTIMIZER = "optimizer."
MASTER = "optimizer.state.param."

#: Of a rounded weight and its master, relative: bf16's spacing. A master may itself be held in fp16.
ROUNDED = 2.0**-7


def fault(checkpoint: TorchDistCheckpoint) -> str | None:
    """What is wrong with its masters, in one line; None where nothing is, or where it has none.

    Reads two small tensors, as a norm's weight and A_log of one layer.
    """
    for name, stored in checkpoint.tensors.items():
        if name.startswith(OPTIMIZER) and stored.dtype == "int16":
            return _said(checkpoint, f"{name} is of int16")
    weights = [checkpoint.tensors[name.removeprefix(MASTER)] for name in _mastered(checkpoint)]
    for kind in ("float32", "bfloat16", "float16"):
        if alike := [weight for weight in weights if weight.dtype == kind]:
            name = min(alike, key=_size).name
            held, master = checkpoint.read(name).float(), checkpoint.read(MASTER + name).float()
            distance = float((held - master).abs().max())
            if distance > float(held.abs().max()) * (0 if kind == "float32" else ROUNDED):
                return _said(checkpoint, f"that of {name} is up to {distance:.4g} from it")
    return None


def _mastered(checkpoint: TorchDistCheckpoint) -> list[str]:
    return [n for n in checkpoint.tensors if n.startswith(MASTER) and n.removeprefix(MASTER) in checkpoint.tensors]


def _size(stored: StoredTensor) -> tuple[int, str]:
    return math.prod(stored.shape), stored.name


def _said(checkpoint: TorchDistCheckpoint, found: str) -> str:
    return (
        f"{checkpoint.folder}: its optimizer state holds no fp32 masters of the weights ({found}), as earlier versions "
        "wrote it with --use-precision-aware-optimizer; the weights are whole: train on from them alone (give it as "
        "--pretrained-checkpoint with --no-keep-moments), or export them to Hugging Face and import that"
    )


def never_from_weights(optimizer: Any) -> None:
    """For a model whose parameters themselves are FP8 or FP4: Unloadable where Megatron would make masters of them.

    It does so where a checkpoint's weights are loaded without its optimizer state, after they are rounded.
    """

    def reload_model_params(*_: Any, **__: Any) -> None:
        raise Unloadable(
            "--fp8-param-gather (or --fp4-param-gather): the fp32 masters would start as weights rounded to FP8, "
            "because the checkpoint's optimizer state is not loaded, or there is none; leave the flag out until the "
            "run has saved its first checkpoint, or load optimizer state too (--keep-moments; no --no-load-optim)"
        )

    optimizer.reload_model_params = reload_model_params


def load(original: Callable[..., Any], state: Any, folder: Any, *args: Any, **kw: Any) -> Any:
    """Megatron's `dist_checkpointing.load`; Unloadable, on every rank, where it would load such optimizer state."""
    if "optimizer" in state and (found := fault(TorchDistCheckpoint(Path(str(folder))))):
        raise Unloadable(found)
    return original(state, folder, *args, **kw)
