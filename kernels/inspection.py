"""Compile what a call would launch for a GPU that need not be here, and read the result's resources.

Needs no driver: triton compiles for a named target, and its package carries ptxas and cuobjdump.
"""

from __future__ import annotations

import re
import stat
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megatron_hybrid.kernels import gated_delta, triton_decode, triton_launch
from megatron_hybrid.kernels.configs import Launch, trial
from megatron_hybrid.kernels.descriptors import strange_descriptors

KERNELS = (
    "conv",
    "diagonal",
    "prepare",
    "scan",
    "norm",
    "norm_backward",
    "adjoint_scan",
    "query_gradient",
    "inverse_gradient",
    "key_gradient",
    "conv_backward",
    "decode",
)
_TYPES = {
    torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int32: "*i32", torch.int64: "*i64",
}  # fmt: skip


class Recorded(NamedTuple):
    """One launch that did not happen."""

    name: str
    function: Any
    arguments: dict[str, Any]
    options: dict[str, int | None]


class Resources(NamedTuple):
    """What ptxas says of one kernel. spill_bytes counts loads and stores of local memory, not their bytes; instructions
    counts tensor-core instructions by name and shape; strange: `strange_descriptors`, of which a sound kernel has none.
    """

    registers: int
    stack_bytes: int
    spill_bytes: int
    shared_bytes: int
    instructions: Counter[str]
    strange: list[str]


def holder(kernel: str) -> ModuleType:
    """The module whose name for the kernel is launched."""
    return triton_decode if kernel == "decode" else triton_launch


@contextmanager
def recording(**launch_table: Launch) -> Iterator[list[Recorded]]:
    """Inside, launches are written down instead of run, on CPU tensors too; their outputs stay uninitialised.

    launch_table: launches other than the defaults.
    """
    launches: list[Recorded] = []
    originals = {name: getattr(holder(name), f"{name}_kernel") for name in KERNELS}
    choose_backend = gated_delta.choose_backend

    class Recorder:
        def __init__(self, name: str, function: Any) -> None:
            self.name, self.function = name, function

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            def launch(*args: Any, **kwargs: Any) -> None:
                options = {key: kwargs.pop(key) for key in ("num_warps", "num_stages", "maxnreg")}
                names = self.function.arg_names
                launches.append(
                    Recorded(self.name, self.function, dict(zip(names, args, strict=False)) | kwargs, options)
                )

            return launch

    try:
        for name, function in originals.items():
            setattr(holder(name), f"{name}_kernel", Recorder(name, function))
        gated_delta.choose_backend = lambda backend, x: "triton"
        with trial(**launch_table):
            yield launches
    finally:
        gated_delta.choose_backend = choose_backend
        for name, function in originals.items():
            setattr(holder(name), f"{name}_kernel", function)


def compile_for(launch: Recorded, capability: int, **options: int | None) -> Any:
    """The compiled kernel for compute capability 90 or 100; options replace num_warps and num_stages."""
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for i, param in enumerate(launch.function.params):
        value = launch.arguments[param.name]
        if param.is_constexpr or (isinstance(value, int) and value == 1 and not param.do_not_specialize):
            signature[param.name] = "constexpr"
            constants[(i,)] = value
        elif isinstance(value, torch.Tensor):
            signature[param.name] = _TYPES[value.dtype]
            attributes[(i,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[param.name] = "fp32"
        else:
            signature[param.name] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0 and not param.do_not_specialize:
                attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=launch.function, signature=signature, constexprs=constants, attrs=attributes)
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options=launch.options | options)


def resources(compiled: Any) -> Resources:
    """Registers, stack, spills, shared memory and matrix instructions of a compiled kernel."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _cuobjdump("--dump-resource-usage", cubin)
        sass = _cuobjdump("--dump-sass", cubin)
    found = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    matrix = Counter(re.findall(r"\b((?:HGMMA|UTCHMMA|UTCQMMA|HMMA|UTCMMA)[\w.]*)", sass))
    local = len(re.findall(r"\b(?:STL|LDL)\b", sass))
    strange = strange_descriptors(sass)
    return Resources(found["REG"], found["STACK"], local, compiled.metadata.shared, matrix, strange)


def _cuobjdump(option: str, cubin: Path) -> str:
    binary = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not binary.stat().st_mode & stat.S_IXUSR:  # some wheels unpack it without the run bit
        binary.chmod(binary.stat().st_mode | stat.S_IXUSR)
    return subprocess.run([binary, option, cubin], check=True, capture_output=True, text=True).stdout
