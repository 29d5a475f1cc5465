"""Published ceilings of GPUs. Nothing here was measured by this project; plans say so.

Sources: NVIDIA's data sheets of H100 SXM, H200 SXM, HGX/DGX B200 and GB200 NVL72 (dense figures: half of those with
sparsity; NVLink and network: half of those for both directions). Memory: the data sheet's number, read as GiB, which is
what nvidia-smi shows within 1 % (H100 81,559 MiB, H200 143,771 MiB, B200 183,359 MiB).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """memory_gib; bf16_tflops, fp8_tflops: dense; hbm, nvlink, network: GB/s of one GPU in one direction.

    nvlink_gpus: GPUs that NVLink joins. capability: of CUDA.
    """

    name: str
    memory_gib: float
    bf16_tflops: float
    fp8_tflops: float
    hbm_gb_s: float
    nvlink_gb_s: float
    network_gb_s: float
    nvlink_gpus: int
    capability: tuple[int, int]


GPUS: Mapping[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        Gpu("H100", 80, 989.4, 1978.9, 3350, 450, 50, 8, (9, 0)),
        Gpu("H200", 141, 989.4, 1978.9, 4800, 450, 50, 8, (9, 0)),
        Gpu("B200", 180, 2250, 4500, 7700, 900, 50, 8, (10, 0)),
        Gpu("GB200", 186, 2500, 5000, 8000, 900, 50, 72, (10, 0)),
    )
}

#: (compute capability, K, V) of the entries in kernels/configs.py, all for this triton; to read that file takes torch.
CHECKED_KERNELS = {((9, 0), 96, 192), ((9, 0), 128, 256), ((9, 0), 128, 128), ((9, 0), 64, 64), ((9, 0), 256, 256)}
CHECKED_TRITON = "3.6"

#: GiB that no tensor of ours gets: CUDA context, NCCL's and cuBLAS's buffers. An order of magnitude, not measured.
RESERVED_GIB = 3.0


def table() -> str:
    """The ceilings as text."""
    rows = ["GPU    GiB  bf16 TFLOP/s  fp8 TFLOP/s  HBM GB/s  NVLink GB/s  network GB/s  GPUs on NVLink"]
    rows += [
        f"{gpu.name:<6} {gpu.memory_gib:3.0f}  {gpu.bf16_tflops:12.0f}  {gpu.fp8_tflops:11.0f}  {gpu.hbm_gb_s:8.0f}"
        f"  {gpu.nvlink_gb_s:11.0f}  {gpu.network_gb_s:12.0f}  {gpu.nvlink_gpus:14d}"
        for gpu in GPUS.values()
    ]
    return "\n".join(
        [*rows, "published: NVIDIA's data sheets; dense; one direction, per GPU; network: one 400 Gb/s port per GPU"]
    )
