"""Bytes on the fullest GPU, by part. Weights, gradients, optimizer and activations are compared with real runs."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, fields
from functools import cache

from megatron_hybrid.parallel.pipeline_schedule import passes
from megatron_hybrid.planning import activations
from megatron_hybrid.planning.job import Job

GIB = 2**30


@dataclass(frozen=True)
class Parameters:
    """Parameters of one pipeline rank's share: in the model's dtype, and always in fp32. linears: those FP8 covers."""

    model_dtype: int = 0
    fp32: int = 0
    linears: int = 0

    def __add__(self, other: Parameters) -> Parameters:
        return Parameters(self.model_dtype + other.model_dtype, self.fp32 + other.fp32, self.linears + other.linears)

    @property
    def count(self) -> int:
        return self.model_dtype + self.fp32


@dataclass(frozen=True)
class Memory:
    """Bytes of one GPU. states: Gated DeltaNet's, for the backward pass. logits: the loss and all it needs."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    states: float
    logits: float
    workspace: float

    @property
    def total(self) -> float:
        return sum(getattr(self, item.name) for item in fields(self))

    def __str__(self) -> str:
        parts = (f"{item.name} {getattr(self, item.name) / GIB:.2f}" for item in fields(self))
        return f"{self.total / GIB:.2f} GiB: {', '.join(parts)}"


def layer_parameters(job: Job, symbol: str) -> Parameters:
    """On one tensor-parallel rank, padding included."""
    s, tp = job.held, job.tp
    mlp = (3 if s.gated_mlp else 2) * s.hidden * s.ffn // tp
    if symbol == "G":
        keys, values = s.gdn_key_heads * s.key_dim // tp, s.gdn_value_heads * s.value_dim // tp
        heads = s.gdn_value_heads // tp
        linears = s.hidden * (2 * keys + (3 if s.output_gate else 2) * values) + mlp
        rest = 2 * s.hidden * heads + s.conv_width * (2 * keys + values) + s.value_dim + 2 * s.hidden
        return Parameters(linears + rest, 2 * heads, linears)
    queries, keys = s.heads * s.head_dim // tp, s.kv_heads * s.head_dim // tp
    linears = 2 * s.hidden * (queries + keys) + mlp
    norms = {"full": queries + keys, "head": 2 * s.head_dim, "none": 0}[job.qk_norm]
    return Parameters(linears + norms + 2 * s.hidden, 0, linears)


def parameters(job: Job, rank: int) -> Parameters:
    """Of a pipeline rank, with all its virtual stages."""
    total = Parameters()
    for symbol, count in Counter("".join(job.segments[rank :: job.pp])).items():
        one = layer_parameters(job, symbol)
        total += Parameters(count * one.model_dtype, count * one.fp32, count * one.linears)
    vocabulary = job.held.vocabulary_rows // job.tp * job.sizes.hidden
    if rank == 0:
        total += Parameters(vocabulary)
    if rank == job.pp - 1:
        total += Parameters(vocabulary + job.sizes.hidden)
    return total


def weight_bytes(job: Job, held: Parameters) -> float:
    """With FP8, beside the bf16 weights the copies Transformer Engine keeps of them, by row and by column."""
    copies = 2 * held.linears if job.fp8 else 0
    kept = held.model_dtype * activations.element_bytes(job) + held.fp32 * 4
    return kept + copies - (2 * held.linears if job.fp8_param_gather else 0)


def gradient_bytes(job: Job, held: Parameters) -> float:
    return held.model_dtype * job.grad_bytes + held.fp32 * 4


def optimizer_bytes(job: Job, held: Parameters) -> float:
    """Adam's two moments, and the fp32 copy of what is not fp32 itself."""
    shards = job.optimizer_shards
    return (held.model_dtype * (job.state_bytes if job.half else 8) + held.fp32 * 8) / shards


def in_flight(job: Job, rank: int, chunk_bytes: list[float]) -> tuple[int, ...]:
    """For each virtual stage of a pipeline rank, microbatches whose activations it holds when it holds most bytes."""
    if job.chunks == 1:
        return (min(job.microbatches, job.pp - rank),)
    moments = _held_together(rank, job.pp, job.chunks, min(job.microbatches, 3 * job.pp))
    return max(moments, key=lambda held: sum(n * size for n, size in zip(held, chunk_bytes, strict=True)))


@cache
def _held_together(rank: int, ranks: int, chunks: int, microbatches: int) -> frozenset[tuple[int, ...]]:
    """Microbatches in flight in each virtual stage, at every moment of Megatron's schedule."""
    held, moments = [0] * chunks, set()
    for backward, _, chunk in passes(rank, ranks, chunks, microbatches):
        held[chunk] += -1 if backward else 1
        moments.add(tuple(held))
    return frozenset(moments)


def _segment(job: Job, index: int) -> activations.Kept:
    """What one pipeline segment keeps of one microbatch, logits apart."""
    total = dict(activations.ends(job, index == 0, index == len(job.segments) - 1))
    for symbol, count in Counter(job.segments[index]).items():
        for name, size in activations.kept(job, symbol).items():
            total[name] = total.get(name, 0) + count * size
    return total


def of_rank(job: Job, rank: int) -> Memory:
    """Of a GPU on this pipeline rank."""
    held = parameters(job, rank)
    kept, states = activations.buffers(job), 0.0
    segments = [_segment(job, rank + chunk * job.pp) for chunk in range(job.chunks)]
    counts = in_flight(job, rank, [sum(segment.values()) for segment in segments])
    for count, segment in zip(counts, segments, strict=True):
        states += count * segment.pop("states", 0.0)
        kept += count * sum(segment.values())
    logits = activations.logits(job) if rank == job.pp - 1 else 0.0
    return Memory(
        weights=weight_bytes(job, held),
        gradients=gradient_bytes(job, held),
        optimizer=optimizer_bytes(job, held),
        activations=kept,
        states=states,
        logits=logits,
        workspace=activations.workspace(job),
    )


def fullest(job: Job) -> tuple[int, Memory]:
    """The pipeline rank that needs most, and what it needs."""
    ranks = [(rank, of_rank(job, rank)) for rank in range(job.pp)]
    return max(ranks, key=lambda pair: pair[1].total)
