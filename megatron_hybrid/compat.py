"""The only place that looks at which versions of Megatron, Transformer Engine, triton and their peers are here."""

from __future__ import annotations

import importlib.util
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

from megatron_hybrid import __version__

PYTHON = (3, 12)


def python_problem() -> str | None:
    """One line that says what is wrong with this Python, or None."""
    if sys.version_info[:2] == PYTHON:
        return None
    found = ".".join(map(str, sys.version_info[:3]))
    return (
        f"python {found}: megatron-core 0.19.2 needs 3.12 (its compiled dataset helper is built for it); "
        "make a virtual environment with python3.12"
    )


def installed(package: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def software() -> dict[str, str]:
    """What a run's numbers may depend on: {name: version or kind}."""
    import torch

    packages = ("torch", "triton", "megatron-core", "transformer-engine", "apex", "numpy", "nvidia-nccl-cu13")
    found = {name: installed(name) or "absent" for name in packages}
    found["python"] = ".".join(map(str, sys.version_info[:3]))
    found["megatron-hybrid"] = __version__
    found["cuda"] = torch.version.cuda or "absent"
    found["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu ({platform.machine()})"
    return found


def use_transformer_engine() -> bool:
    """Whether models are built from Transformer Engine modules: it is installed and there is a GPU to run it."""
    import torch

    return torch.cuda.is_available() and importlib.util.find_spec("transformer_engine") is not None


#: What Megatron's fused paths need a GPU, Transformer Engine or apex for.
_CPU_FLAGS = (
    "--distributed-backend=gloo",
    "--use-cpu-initialization",
    "--no-masked-softmax-fusion",
    "--no-persist-layer-norm",
    "--no-rope-fusion",
    "--no-bias-swiglu-fusion",
    "--no-bias-dropout-fusion",
)


def backend_flags(flags: Sequence[str]) -> list[str]:
    """Megatron flags that this machine forces: no GPU, no Transformer Engine, no apex. Those already given are left."""
    import torch

    forced: list[str] = []
    if not torch.cuda.is_available():
        forced += _CPU_FLAGS
    if not use_transformer_engine():
        forced += ["--transformer-impl=local", "--no-rope-fusion"]
        if importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is None:  # built by NVIDIA's apex
            forced.append("--no-gradient-accumulation-fusion")
    given = {word.split("=")[0] for word in flags}
    return [flag for flag in dict.fromkeys(forced) if flag.split("=")[0] not in given]


def limit_connections(flags: Sequence[str]) -> str | None:
    """Sets CUDA_DEVICE_MAX_CONNECTIONS=1 unless it is set; what was set, as it would be typed, or None.

    Megatron demands it of tensor and context parallelism on GPUs before Blackwell, and the opposite of FSDP. The driver
    reads it with the first CUDA context, so the GPU is asked for by nvidia-smi, which makes none here.
    """
    name = "CUDA_DEVICE_MAX_CONNECTIONS"
    if name in os.environ or {"--use-torch-fsdp2", "--use-megatron-fsdp"} & set(flags):
        return None
    try:
        found = subprocess.run(
            ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split()
        if not found or max(float(capability) for capability in found) >= 10:
            return None
    except (OSError, subprocess.CalledProcessError, ValueError):  # no GPU, or none that can be asked
        return None
    os.environ[name] = "1"
    return f"{name}=1"


def join_or_be_alone() -> None:
    """torchrun's variables where a launcher set them; one process of its own where none did."""
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "localhost"), ("MASTER_PORT", "0")):
        os.environ.setdefault(name, value)


def start_backend() -> None:
    """Make Megatron run on this machine: the CPU backend without a GPU, and no compiling of what is compiled.

    Megatron's start-up runs `make` in its own package and exits when that fails. The wheel has the built helper and
    no Makefile, so the step is left out wherever the helper imports.
    """
    from megatron_hybrid import cpu_backend

    cpu_backend.enable()
    if importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is not None:
        from megatron.core.datasets import utils

        utils.compile_helpers = lambda: None
