"""What to change about a job that does not fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from megatron_hybrid.fp8 import recomputable
from megatron_hybrid.planning import memory
from megatron_hybrid.planning.job import Job


def remedy(job: Job, room: float) -> str:
    """The first change that makes the job fit in `room` bytes, cheapest in time first, as flags."""
    for flags, changed in _changes(job):
        if memory.fullest(changed)[1].total <= room:
            return f"fits with {flags}"
    return "no single change makes it fit; try `plan search`"


def _changes(job: Job) -> Iterator[tuple[str, Job]]:
    if job.micro_batch > 1:
        yield "--micro-batch-size 1", replace(job, micro_batch=1)
    if not job.distributed_optimizer and job.dp > 1:
        yield "--use-distributed-optimizer", replace(job, distributed_optimizer=True)
    if not job.loss_chunk_tokens:
        yield "--loss-chunk-tokens 2048", replace(job, loss_chunk_tokens=2048)
    for modules in (recomputable(names, job.fp8) for names in (("layernorm",), ("layernorm", "mlp"))):
        if "full" not in job.recompute and modules:
            yield (
                f"--recompute-granularity selective --recompute-modules {' '.join(modules)}",
                replace(job, recompute=modules),
            )
    if "full" not in job.recompute:
        yield (
            "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
            replace(job, recompute=("full",), recompute_layers=1),
        )
    for tp in (2, 4, 8):
        if tp > job.tp and job.dp * job.tp % tp == 0 and not job.sequence_tokens % (tp * job.cp):
            yield (
                f"--tensor-model-parallel-size {tp} --sequence-parallel",
                replace(job, tp=tp, dp=job.dp * job.tp // tp, sequence_parallel=True),
            )
