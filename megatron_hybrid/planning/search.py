"""The layouts of a model over so many GPUs that fit, fastest first as predicted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache

from megatron_hybrid import flops
from megatron_hybrid.flags import FlagError
from megatron_hybrid.fp8 import FLAGS_OF, Fp8Error, recomputable
from megatron_hybrid.parallel import pipeline_layout
from megatron_hybrid.planning import memory
from megatron_hybrid.planning.hardware import RESERVED_GIB, Gpu
from megatron_hybrid.planning.job import Job, check_fp8
from megatron_hybrid.planning.timing import Measured, Prediction, predict

TENSOR, CONTEXT, PIPELINE = (1, 2, 4, 8), (1, 2, 4, 8, 16, 32), (1, 2, 4, 8)
VIRTUAL = (1, 2, 4)
MICRO_BATCHES = (1, 2, 4, 8)

#: From what costs no time to what costs most; the first that fits is taken.
RECOMPUTE: tuple[tuple[str, ...], ...] = (
    (),
    ("layernorm",),
    ("gdn_norm_out", "layernorm"),
    ("layernorm", "mlp"),
    ("gdn_norm_out", "layernorm", "mlp"),
    ("full",),
)


@dataclass(frozen=True)
class Found:
    """rank: the pipeline rank that needs `needed`."""

    job: Job
    rank: int
    needed: memory.Memory
    predicted: Prediction


def search(base: Job, gpus: int, gpu: Gpu, fp8: Sequence[str], measured: Measured | None = None) -> list[Found]:
    """All layouts that fit, one for each way of splitting, fastest first.

    Args:
        base: the model and batch; its own layout is not kept.
        fp8: recipes to try, "" for bf16.

    Raises:
        FlagError: nothing fits.
    """
    room = (gpu.memory_gib - RESERVED_GIB) * memory.GIB
    found = []
    splits = list(_splits(base, gpus, gpu))
    if not splits:
        raise FlagError(
            f"--gpus {gpus}: no layout divides them so that --global-batch-size {base.global_batch} divides too; give "
            "another number of GPUs, or another batch"
        )
    for split in splits:
        for recipe in fp8:
            job = replace(split, fp8=recipe)
            if not _fits_fp8(job):
                continue
            for recompute in (recomputable(modules, recipe) for modules in RECOMPUTE):
                tried = replace(job, recompute=recompute, recompute_layers=1)
                rank, needed = memory.fullest(tried)
                if needed.total <= room:
                    found.append(Found(tried, rank, needed, predict(tried, gpu, measured)))
                    break
    if not found:
        raise FlagError(f"--gpus {gpus}: nothing fits on {gpu.name}; give more GPUs, or shorter sequences")
    return sorted(found, key=lambda one: one.predicted.step_s)


def _splits(base: Job, gpus: int, gpu: Gpu) -> Iterator[Job]:
    s, length = base.sizes, base.sequence_tokens
    most_tp = min(s.heads, s.kv_heads, s.gdn_key_heads or s.heads, gpu.nvlink_gpus)
    for tp in (n for n in TENSOR if n <= most_tp):
        for cp in CONTEXT:
            if length % (2 * cp if cp > 1 else 1) or length % (tp * cp) or length // cp < 1024:
                continue
            for pp in (n for n in PIPELINE if gpus % (tp * cp * n) == 0 and n <= len(base.layers)):
                dp = gpus // (tp * cp * pp)
                for chunks in VIRTUAL if pp > 1 else (1,):
                    for micro in MICRO_BATCHES:
                        if base.global_batch % (dp * micro) or (chunks > 1 and base.global_batch // (dp * micro) % pp):
                            continue
                        segments = _segments(s, base.layers, length, pp, chunks)
                        if segments is None:
                            continue
                        yield replace(
                            base, segments=segments, tp=tp, pp=pp, cp=cp, dp=dp, micro_batch=micro,
                            sequence_parallel=tp > 1, overlap=True, distributed_optimizer=True,
                        )  # fmt: skip


@cache
def _segments(sizes: flops.Sizes, layers: str, tokens: int, pp: int, chunks: int) -> tuple[str, ...] | None:
    """As --pipeline-layout auto:V cuts them; None where there are too few layers."""
    if pp == 1:
        return (layers,)
    if pp * chunks > len(layers):
        return None
    return pipeline_layout.plan(layers, pipeline_layout.Costs.from_flops(sizes, layers, tokens), pp, chunks).segments


def _fits_fp8(job: Job) -> bool:
    try:
        check_fp8(job)
    except Fp8Error:
        return False
    return True


def flags(job: Job) -> str:
    """What to add to the preset and the flags given."""
    words = []
    for name, size in (("tensor-model", job.tp), ("pipeline-model", job.pp), ("context", job.cp)):
        if size > 1:
            words.append(f"--{name}-parallel-size {size}")
    if job.sequence_parallel:
        words.append("--sequence-parallel")
    if job.pp > 1:
        words.append(f"--pipeline-layout auto:{job.chunks}")
    words.append(f"--micro-batch-size {job.micro_batch}")
    if "full" in job.recompute:
        words.append("--recompute-granularity full --recompute-method uniform --recompute-num-layers 1")
    elif job.recompute:
        words.append(f"--recompute-granularity selective --recompute-modules {' '.join(job.recompute)}")
    if job.fp8:
        words.append(FLAGS_OF[job.fp8])
    words.append("--overlap-grad-reduce")
    if job.fp8 != "mxfp8":  # refused with it (megatron_hybrid/fp8.py)
        words.append("--overlap-param-gather")
    return " ".join(words)
