"""Bytes that one GPU receives from others in a training step, by kind. Compared with counted ones.

A ring's bytes: all-gather and reduce-scatter (W−1)/W of the whole tensor, all-reduce twice that. Letters: see `job`.
"""

from __future__ import annotations

from megatron_hybrid.parallel.exchange_choice import scan_rounds
from megatron_hybrid.planning import activations, memory
from megatron_hybrid.planning.job import Job

#: {kind: bytes}: tensor, context, pipeline, data.
Bytes = dict[str, float]


def per_microbatch(job: Job, rank: int) -> Bytes:
    """Of a pipeline rank, forward and backward of one microbatch through all its virtual stages."""
    segments = range(rank, len(job.segments), job.pp)
    symbols = "".join(job.segments[index] for index in segments)
    tensor = sum(tensor_layer(job, symbol) for symbol in symbols)
    tensor += tensor_ends(job, first=0 in segments, last=len(job.segments) - 1 in segments)
    context = sum(context_layer(job, symbol) for symbol in symbols)
    inward = sum((index > 0) + (index < len(job.segments) - 1) for index in segments)
    pipeline = inward * activations.stream(job) if job.pp > 1 else 0.0
    return {"tensor": tensor, "context": context, "pipeline": pipeline}


def per_step(job: Job, rank: int) -> Bytes:
    """Of a pipeline rank, with the gradients and parameters that data-parallel ranks exchange once."""
    found = {kind: size * job.microbatches for kind, size in per_microbatch(job, rank).items()}
    return {**found, "data": sum(data_parallel(job, rank))}


def data_parallel(job: Job, rank: int) -> tuple[float, float]:
    """(gradients, parameters): reduce-scattered and gathered by the distributed optimizer, else reduced alone."""
    held, ranks = memory.parameters(job, rank), job.dp * job.cp
    gradients = memory.gradient_bytes(job, held)
    weights = held.model_dtype * (1 if job.fp8_param_gather else activations.element_bytes(job)) + held.fp32 * 4
    share = (ranks - 1) / ranks
    if not job.distributed_optimizer:
        return 2 * share * gradients, 0.0
    return share * gradients, share * weights


def tensor_layer(job: Job, symbol: str) -> float:
    """Forward and backward. A gathered input is gathered again for the weight's gradient."""
    if job.tp == 1:
        return 0.0
    whole = job.tokens * job.sizes.hidden * activations.element_bytes(job)
    columns, rows = (3 if symbol == "G" else 2), 2
    if job.sequence_parallel:
        forward = columns + rows
        again = forward if "full" in job.recompute else 2 if "mlp" in job.recompute else 0
        collectives: float = forward + again + (2 * columns + rows)
    else:
        forward = 2 * rows
        again = forward if "full" in job.recompute else 2 if "mlp" in job.recompute else 0
        collectives = forward + again + 2 * columns
    small = 0.0
    if symbol == "*" and job.qk_norm == "full":  # sums of squares of q and k, forward and backward
        small = 2 * 2 * job.tokens * 2 * 4
    if symbol == "G":  # the gradient of the norm's weight, one for all heads
        small = 2 * job.sizes.value_dim * activations.element_bytes(job)
    return (job.tp - 1) / job.tp * (collectives * whole + small)


def tensor_ends(job: Job, first: bool, last: bool) -> float:
    """Embedding: summed over ranks, and with sequence parallelism its gradient gathered. Output layer and loss."""
    if job.tp == 1:
        return 0.0
    whole = job.tokens * job.sizes.hidden * activations.element_bytes(job)
    found = 2.0 * whole * first
    if last:
        found += (3 if job.sequence_parallel else 2) * whole
        found += 2 * job.tokens * 4 * 3  # of each token: the largest logit, the label's, the sum of exponentials
    return (job.tp - 1) / job.tp * found


def context_layer(job: Job, symbol: str) -> float:
    """Forward and backward."""
    if job.cp == 1:
        return 0.0
    s, others, element = job.held, job.cp - 1, activations.element_bytes(job)
    if symbol == "*":  # keys and values of every other rank, and their gradients
        return 2 * others * job.tokens * 2 * s.kv_heads * s.head_dim / job.tp * element
    channels = (2 * s.gdn_key_heads * s.key_dim + s.gdn_value_heads * s.value_dim) / job.tp
    values = s.gdn_value_heads * s.value_dim / job.tp
    if job.gdn_exchange == "a2a":
        gate = values if s.output_gate else 0
        moved = channels + gate + 2 * s.gdn_value_heads / job.tp + values
        return 2 * others / job.cp * job.tokens * moved * element
    halo = others * 2 * 3 * job.micro_batch * channels * element
    pair = activations.pair_bytes(job)
    if not activations.passes_by_scan(job):
        return 2 * (others * 2 * pair + halo)
    return 2 * (scan_rounds(2 * job.cp) * 2 * pair + halo)  # at most: ranks at the ends of the chain receive less
