"""Predicted time of a training step, from published ceilings and shares of them that one H200 and one H100 reached
(docs/speed.md), or from a table of measured times. Compared with whole steps on one H200 alone; communication and other
GPUs are predictions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_hybrid import flops
from megatron_hybrid.parallel.exchange_choice import LATENCY_S
from megatron_hybrid.parallel.pipeline_schedule import play
from megatron_hybrid.planning import activations, memory, traffic
from megatron_hybrid.planning.hardware import Gpu
from megatron_hybrid.planning.job import Job

#: Shares of the published ceilings that are taken to be reached: measured for GEMMs of these widths (in FP8 with their
#: casts) and flash attention, guessed for elementwise kernels and collectives.
GEMM_BF16, GEMM_FP8, ATTENTION, BANDWIDTH, COLLECTIVE = 0.68, 0.52, 0.49, 0.8, 0.8

#: Seconds of a Gated DeltaNet mixer core, forward + backward and forward: 8,192 tokens, 30 heads, K 96, V 192, on an
#: H100 on 2026-11-25, by kernels since replaced. The first is 66.0 ms of 24 of them in a training step
#: (docs/measurements/2026-11-25-profile-h100.json), of the second no record was kept. Other sizes by tokens and state,
#: other GPUs by memory bandwidth: for an H200 that gives 1.92 and 0.51 ms, docs/kernels.md has 2.11 and 0.55 since.
MIXER_S, MIXER_FORWARD_S = 2.75e-3, 0.725e-3
_MIXER_WORK, _MIXER_HBM = 8192 * 30 * 96 * 192, 3350

#: Bytes that would take as long to move as an optimizer step per parameter did, with moments of 4 and of 2 bytes.
UPDATE_BYTES = 55

#: {"G", "*", "*window", "embedding", "output"}: measured ms of one sequence on one GPU, forward and backward.
Measured = Mapping[str, float]


@dataclass(frozen=True)
class Prediction:
    """step_s: seconds of one step. bubble: share of it that an average GPU waits in the pipeline. exposed_s: seconds
    of it in communication that nothing hides, by kind. mfu: of the dense bf16 ceiling, as the log line counts.
    """

    step_s: float
    bubble: float
    exposed_s: Mapping[str, float]
    tokens_per_s: float
    mfu: float


def predict(job: Job, gpu: Gpu, measured: Measured | None = None) -> Prediction:
    """measured: replaces the estimates of what layers compute."""
    segments = [_segment_s(job, gpu, index, measured) for index in range(len(job.segments))]
    busy, bubble = _pipeline(job, [sum(parts.values()) for parts in segments])
    exposed = {
        kind: job.microbatches * max(sum(s[kind] for s in segments[rank :: job.pp]) for rank in range(job.pp))
        for kind in ("tensor", "context", "pipeline")
    }
    slowest = max(range(job.pp), key=lambda rank: sum(traffic.data_parallel(job, rank)))
    exposed["data"] = _data_s(job, gpu, slowest, busy / job.microbatches)
    held = memory.parameters(job, slowest)
    update = held.count / job.optimizer_shards * UPDATE_BYTES / (gpu.hbm_gb_s * 1e9 * BANDWIDTH)
    step = busy / (1 - bubble) + exposed["data"] + update
    tokens = job.global_batch * job.sequence_tokens / step / job.gpus
    work = flops.training_flops_per_token(job.sizes, job.layers, job.sequence_tokens)
    return Prediction(step, bubble, exposed, tokens, tokens * work / (gpu.bf16_tflops * 1e12))


def _pipeline(job: Job, segment_s: list[float]) -> tuple[float, float]:
    """(seconds of a batch without filling, draining and waiting, share of a batch's time that these take)."""
    mean = sum(segment_s) / job.pp * job.microbatches
    if job.pp == 1:
        return mean, 0.0
    forward = [seconds / (1 + flops.BACKWARD) for seconds in segment_s]
    # Once the pipeline is full every microbatch takes the slowest rank's time: play the start, add the rest.
    played = min(job.microbatches, 2 * job.pp)
    time = play(forward, job.pp, played, flops.BACKWARD, job.chunks).time
    slowest = max(sum(segment_s[rank :: job.pp]) for rank in range(job.pp))
    time += (job.microbatches - played) * slowest
    return mean, 1 - mean / time


def _segment_s(job: Job, gpu: Gpu, index: int, measured: Measured | None) -> dict[str, float]:
    """Seconds of one microbatch through a segment, forward and backward, and what is not hidden of its messages."""
    before = sum(len(segment) for segment in job.segments[:index])
    first, last = index == 0, index == len(job.segments) - 1
    found = {"compute": _ends_s(job, gpu, first, last, measured), "context": 0.0}
    found["tensor"] = _sent_s(traffic.tensor_ends(job, first, last), 4, gpu, job.tp, 1)
    layers = Counter(
        (symbol, symbol == "*" and job.sizes.windowed(number))
        for number, symbol in enumerate(job.segments[index], start=before + 1)
    )
    for (symbol, windowed), count in layers.items():
        found["compute"] += count * _layer_s(job, gpu, symbol, windowed, measured)
        found["tensor"] += count * _sent_s(traffic.tensor_layer(job, symbol), 10, gpu, job.tp, 1)
        found["context"] += count * _sent_s(traffic.context_layer(job, symbol), 4, gpu, job.cp, job.tp)
    hops = (not first) + (not last) if job.pp > 1 else 0
    found["pipeline"] = hops * (LATENCY_S + activations.stream(job) / (gpu.network_gb_s * 1e9 * COLLECTIVE))
    return found


def _layer_s(job: Job, gpu: Gpu, symbol: str, windowed: bool, measured: Measured | None) -> float:
    s = job.held
    if measured:
        share = job.tokens / job.sequence_tokens / job.tp * s.heads / job.sizes.heads
        forward_and_backward = measured["*window" if windowed else symbol] / 1e3 * share
        return forward_and_backward * (1 + _again(job, symbol))
    parts = flops.layer_parts(s, symbol, job.sequence_tokens, windowed)
    per_flop = job.tokens / job.tp / (gpu.bf16_tflops * 1e12)
    gemm = per_flop / GEMM_BF16
    if job.fp8:
        gemm = job.tokens / job.tp / (gpu.fp8_tflops * 1e12 * GEMM_FP8)
    linears = sum(parts[name] for name in ("gdn_proj", "attn_proj", "mlp") if name in parts) * gemm
    elementwise = 4 * sum(activations.layer(job, symbol).values()) / (gpu.hbm_gb_s * 1e9 * BANDWIDTH)
    mixer = mixer_s(job, gpu) if symbol == "G" else 3.5 * parts["attn_core"] * per_flop / ATTENTION
    once = (1 + flops.BACKWARD) * linears + mixer + elementwise
    return once * (1 + _again(job, symbol))


def mixer_s(job: Job, gpu: Gpu) -> float:
    """Of a Gated DeltaNet mixer core, forward and backward."""
    s = job.held
    work = job.tokens / job.tp * s.gdn_value_heads * s.key_dim * s.value_dim
    return MIXER_S * work / _MIXER_WORK * _MIXER_HBM / gpu.hbm_gb_s


def _again(job: Job, symbol: str) -> float:
    """Recomputation, as a share of a layer's forward and backward by FLOPs; the mixer core by its measured time."""
    forward = 1 / (1 + flops.BACKWARD)
    if "full" in job.recompute:
        return forward
    parts = flops.layer_parts(job.held, symbol, job.sequence_tokens)
    share = 0.02 if "layernorm" in job.recompute else 0.0
    if "mlp" in job.recompute:
        share += forward * parts["mlp"] / sum(parts.values())
    if "core_attn" in job.recompute and "attn_core" in parts:
        share += forward * parts["attn_core"] / sum(parts.values()) * GEMM_BF16 / ATTENTION
    if "gdn_norm_out" in job.recompute and symbol == "G":
        share += 0.12 * MIXER_FORWARD_S / MIXER_S  # a mixer core is about 12 % of a layer
    return share


def _ends_s(job: Job, gpu: Gpu, first: bool, last: bool, measured: Measured | None) -> float:
    share = job.tokens / job.sequence_tokens / job.tp
    if measured:
        return (measured["embedding"] * first + measured["output"] * last) / 1e3 * share
    if not last:
        return 0.0
    products = 4 if job.loss_chunk_tokens else 3
    output = products * flops.output_parts(job.held)["output"] * job.tokens / job.tp
    loss = 3 * job.tokens * job.held.vocabulary_rows / job.tp * activations.element_bytes(job)
    return output / (gpu.bf16_tflops * 1e12 * GEMM_BF16) + loss / (gpu.hbm_gb_s * 1e9 * BANDWIDTH)


def _sent_s(size: float, messages: int, gpu: Gpu, ranks: int, inside: int) -> float:
    """Seconds of `size` bytes received in a group of `ranks`, `inside` GPUs apart."""
    if ranks == 1:
        return 0.0
    return messages * LATENCY_S + size / (_ring_gb_s(gpu, ranks, inside) * 1e9 * COLLECTIVE)


def _ring_gb_s(gpu: Gpu, ranks: int, inside: int) -> float:
    """NVLink where the group lies within it; else as many network ports as it has GPUs on a node, NVLink at most."""
    if ranks * inside <= gpu.nvlink_gpus:
        return gpu.nvlink_gb_s
    return min(gpu.nvlink_gb_s, gpu.network_gb_s * max(1, min(ranks, gpu.nvlink_gpus // inside)))


def _data_s(job: Job, gpu: Gpu, rank: int, microbatch_s: float) -> float:
    """Of gradients and parameters; with --overlap-grad-reduce hidden behind one microbatch's backward and forward."""
    gradients, parameters = (
        _sent_s(size, 1, gpu, job.dp * job.cp, job.tp) for size in traffic.data_parallel(job, rank)
    )
    if not job.overlap:
        return gradients + parameters
    hidden = 0.0 if job.fp8 == "mxfp8" else microbatch_s / 3  # its parameters cannot be gathered meanwhile
    return max(0.0, gradients - microbatch_s * 2 / 3) + max(0.0, parameters - hidden)
