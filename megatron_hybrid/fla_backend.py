"""Where `--gdn-backend fla` can train: its own refusal would come in the first backward pass, as a traceback."""

from __future__ import annotations

import re
from importlib.util import find_spec

from megatron_hybrid import compat


def refuses_backward(capability: str, triton: str) -> bool:
    """Whether flash-linear-attention has no backward pass on this GPU: gradients of its gates are wrong there.

    Its issue #640; mended in triton 3.7.1, and its tilelang kernels have not the fault.

    Args:
        capability: of the GPU, as "9.0".
        triton: its version.
    """
    version = tuple(int(number) for number in re.findall(r"\d+", triton)[:3])
    return capability.startswith("9.") and (3, 4) <= version < (3, 7, 1)


def problem() -> str | None:
    """What is in the way of `--gdn-backend fla` on this machine, with what to do, or None."""
    import torch

    if find_spec("fla") is None:
        return (
            "needs the package flash-linear-attention; pip install flash-linear-attention==0.6.0, or leave the flag out"
        )
    if not torch.cuda.is_available():
        return "needs a GPU; legal here: auto, reference"
    capability = ".".join(map(str, torch.cuda.get_device_capability()))
    triton = compat.installed("triton") or "0"
    if refuses_backward(capability, triton) and find_spec("tilelang") is None:
        return (
            f"flash-linear-attention has no backward pass on this GPU (sm_{capability.replace('.', '')}) with triton "
            f"{triton}, whose gradients of the gates are wrong (its issue #640); triton 3.7.1 or newer, or pip install "
            "tilelang; or leave the flag out: our kernels are checked here"
        )
    return None
