"""What a layer keeps for its backward pass, tensor by tensor, in bytes of one microbatch on one rank.

With --transformer-impl local: compared with counted bytes of real runs, as is all that Transformer Engine shares with
it. What its modules keep otherwise, and FP8, is reasoned, not measured. Letters: see `job`; L = n over TP under
sequence parallelism, else n.
"""

from __future__ import annotations

from megatron_hybrid.flops import CHUNK
from megatron_hybrid.parallel.exchange_choice import scan_is_faster, scan_rounds
from megatron_hybrid.planning.job import Job

#: Tokens whose logits the loss holds in fp32 at a time on CPU (modules/cross_entropy.py).
FP32_TOKENS = 1024

#: {tensor: bytes}
Kept = dict[str, float]

#: Tensors that a name in --recompute-modules computes again instead of keeping. gdn_norm_out: modules/recompute.py.
RECOMPUTED: dict[str, tuple[str, ...]] = {
    "mlp": ("fc1 output", "swiglu inner", "fc2 input"),
    "layernorm": ("norm output",),
    "core_attn": ("attention output", "softmax sums"),
    "gdn_norm_out": ("mixer output", "chunk inverses", "gates", "states", "intermediates", "passed states"),
}


def layer(job: Job, symbol: str) -> Kept:
    """All that a `G` or `*` layer keeps when nothing is computed again."""
    norm_first = job.norms == "pre" or (job.norms == "released" and symbol == "G")
    mixer = _delta_net(job) if symbol == "G" else _attention(job)
    return _total(_norms(job, norm_first), mixer, _mlp(job))


def kept(job: Job, symbol: str) -> Kept:
    """What remains of `layer` under the job's recompute choices; `full` keeps a layer's input alone."""
    if "full" in job.recompute:
        return {"layer input": stream(job) / job.recompute_layers}
    dropped = {name for module in job.recompute for name in RECOMPUTED.get(module, ())}
    found = {name: size for name, size in layer(job, symbol).items() if name not in dropped}
    if "mlp" in job.recompute and "norm output" in found and not job.local:  # the MLP's norm is inside it
        found["norm output"] /= 2
    elif "mlp" in job.recompute and job.fp8:  # the checkpoint keeps the MLP's input in bf16
        found["fc1 input"] = found.get("fc1 input", 0.0) + stream(job) / 2
    return found


def stream(job: Job) -> float:
    """Bytes of the hidden states between layers: L·D."""
    return _own_tokens(job) * job.sizes.hidden * element_bytes(job)


def element_bytes(job: Job) -> int:
    return 2 if job.half else 4


def _own_tokens(job: Job) -> float:
    return job.tokens / (job.tp if job.sequence_parallel else 1)


def _linear_input(job: Job, elements: float) -> float:
    """What a linear keeps of its input: in FP8 the columnwise copy alone, a byte an element."""
    return elements * (1 if job.fp8 else element_bytes(job))


def _norm_bytes(job: Job) -> int:
    """Of an element of a norm's input; PyTorch's keeps it in fp32, and normalised too."""
    return 8 if job.local else element_bytes(job)


def _norms(job: Job, norm_first: bool) -> Kept:
    """Two norms of the hidden states: before the branches, or of what comes out of them."""
    own, hidden = _own_tokens(job), job.sizes.hidden
    inputs = 2 * own * (hidden * _norm_bytes(job) + 4)
    linear = _linear_input(job, own * hidden)
    if norm_first:
        return {"norm input": inputs, "norm output": 2 * linear}
    return {"norm input": inputs, "projection input": linear, "fc1 input": linear}


def _delta_net(job: Job) -> Kept:
    s, n, element = job.held, job.tokens / job.tp, element_bytes(job)
    values = s.gdn_value_heads * s.value_dim
    channels = 2 * s.gdn_key_heads * s.key_dim + values * (2 if s.output_gate else 1)
    heads, chunks = s.gdn_value_heads / job.tp, _chunks(job)
    found = {
        "projections": n * (channels + 2 * s.gdn_value_heads) * element,
        "chunk inverses": chunks * heads * CHUNK * CHUNK * element,
        "gates": chunks * heads * CHUNK * 5 * 4,
        "states": gdn_states(job),
        "intermediates": _intermediates(job),
        "passed states": passed_states(job),
        "mixer output": _linear_input(job, n * values),
    }
    if job.fp8:  # the a|b projection stays in bf16 and keeps its own input
        found["a|b input"] = _own_tokens(job) * s.hidden * element
    return found


def gdn_states(job: Job) -> float:
    """States kept: all in the activations' dtype, or with --gdn-states-every n > 1 every n-th in fp32."""
    every = 1 if job.keep_intermediates else job.states_every
    if not every:
        return 0.0
    s = job.held
    state = s.gdn_value_heads / job.tp * s.key_dim * s.value_dim
    return _chunks(job) / every * state * (element_bytes(job) if every == 1 else 4)


def _intermediates(job: Job) -> float:
    """What --gdn-keep-intermediates keeps besides: q, k, norms, q scaled, scores, new values, output before norm."""
    if not job.keep_intermediates:
        return 0.0
    s, n, element = job.held, job.tokens / job.tp, element_bytes(job)
    per_token = 2 * s.gdn_key_heads * s.key_dim + s.gdn_value_heads * (s.key_dim + 2 * s.value_dim)
    per_chunk = s.gdn_value_heads * CHUNK * CHUNK * element + 2 * s.gdn_key_heads * CHUNK * 4
    return n * per_token * element + _chunks(job) * per_chunk / job.tp


def _chunks(job: Job) -> float:
    """Chunks that room is made for: under context parallelism each of a row's two pieces may end in a part of one."""
    return job.tokens / CHUNK + (2 * job.micro_batch if job.cp > 1 else 0)


def pair_bytes(job: Job) -> float:
    """What a stretch of tokens does to the state, M and S of all heads of a rank in fp32 (`parallel.state_passing`)."""
    s = job.held
    return s.gdn_value_heads / job.tp * s.key_dim * (s.key_dim + s.value_dim) * 4 * job.micro_batch


def passes_by_scan(job: Job) -> bool:
    """`state_passing.choose_exchange`'s choice, unless --gdn-cp-comm-type says."""
    if job.gdn_exchange != "auto":
        return job.gdn_exchange == "scan"
    return scan_is_faster(job.cp, 2, pair_bytes(job))


def passed_states(job: Job) -> float:
    """What passing states between context-parallel ranks keeps: pairs, and states composed from them, on rank 0."""
    if job.cp == 1 or job.gdn_exchange == "a2a":
        return 0.0
    s = job.held
    pair = pair_bytes(job)
    state, transition = (pair * dim / (s.key_dim + s.value_dim) for dim in (s.value_dim, s.key_dim))
    if not passes_by_scan(job):
        return 2 * job.cp * pair + (2 * job.cp + 3) * state
    rounds = scan_rounds(2 * job.cp)
    return (rounds - 2) * (2 * pair + 4 * transition) + 2 * transition + 4 * state


def _attention(job: Job) -> Kept:
    s, n, element = job.held, job.tokens / job.tp, element_bytes(job)
    queries, keys = s.heads * s.head_dim, s.kv_heads * s.head_dim
    found = {
        "projections": n * (queries + 2 * keys) * element,
        "attention output": n * queries * element,
        "softmax sums": n * s.heads * 4,
    }
    if job.qk_norm == "head" or (job.qk_norm == "full" and job.local):  # in PyTorch: fp32 copies, and both normalised
        found["q/k norm"] = n * (queries + keys) * 8
    elif job.qk_norm == "full":
        found["q/k norm"] = 2 * job.tokens * 4
    if job.qk_norm != "none" or job.rotary:
        found["q and k"] = n * (queries + keys) * element
    if job.rotary and job.local:  # cosines and sines, each for q and for k, the same for all rows
        found["rotary angles"] = job.tokens / job.micro_batch * s.head_dim * 4 * 4
    if job.fp8:
        found["projection's input"] = n * queries
    return found


def _mlp(job: Job) -> Kept:
    n, ffn, element = job.tokens / job.tp, job.held.ffn, element_bytes(job)
    found = {
        "fc1 output": n * ffn * (2 if job.sizes.gated_mlp else 1) * element,
        "fc2 input": _linear_input(job, n * ffn),
    }
    if job.local:  # silu of the gate and a copy of the rest, which the fused kernel does without
        found["swiglu inner"] = 2 * n * ffn * element
    return found


def ends(job: Job, first: bool, last: bool) -> Kept:
    """What a pipeline segment keeps besides layers and logits: the batch, rotary angles, the final norm's tensors."""
    # Tokens, labels and positions, int64, and the mask.
    found: Kept = {"token ids": (3 * 8 + 4) * job.tokens} if first or last else {}
    if job.rotary:
        found["rotary angles"] = job.tokens / job.micro_batch * job.sizes.head_dim * 4
    if last:
        found["final norm"] = _own_tokens(job) * job.sizes.hidden * (_norm_bytes(job) + element_bytes(job))
    return found


def buffers(job: Job) -> float:
    """Once on a rank: the sequence gathered for the next linear, the hidden states on their way to the next stage."""
    gathered = job.tokens * job.sizes.hidden * element_bytes(job) if job.sequence_parallel else 0.0
    return gathered + (stream(job) if job.pp > 1 else 0.0)


def logits_kept(job: Job) -> float:
    """What the loss keeps from forward to backward: the logits, or Megatron's own loss the softmax in fp32."""
    if job.loss_chunk_tokens:
        return 0.0
    return job.tokens * job.held.vocabulary_rows / job.tp * (element_bytes(job) if job.z_loss else 4)


def logits(job: Job) -> float:
    """What is kept, the logits' gradient, and on CPU fp32 pieces; chunk by chunk with --loss-chunk-tokens."""
    rows, element = job.held.vocabulary_rows / job.tp, element_bytes(job)
    pieces = min(job.tokens, FP32_TOKENS) * rows * 2 * 4 if job.local else 0.0
    if (
        job.loss_chunk_tokens
    ):  # a chunk's logits, which become their gradient; the weight's gradient in fp32, and a part
        chunk = min(job.tokens, job.loss_chunk_tokens)
        return chunk * rows * element + pieces + (4 + element) * rows * job.sizes.hidden
    if not job.z_loss:  # Megatron's own loss
        pieces = job.tokens * rows * element
    return logits_kept(job) + job.tokens * rows * element + pieces


def workspace(job: Job, last: str) -> float:
    """Tensors that exist while the backward of the last layer, a `G` or `*`, runs, when most is kept.

    The MLP's gradients come first; what a mixer needs then takes the place of what the MLP had kept.
    """
    n, s, element = job.tokens / job.tp, job.held, element_bytes(job)
    mlp = n * s.ffn * (4 if s.gated_mlp else 2) * element
    delta = 0.0
    if last == "G":
        channels = 2 * s.gdn_key_heads * s.key_dim + 2 * s.gdn_value_heads * s.value_dim
        states = n / CHUNK * s.gdn_value_heads * s.key_dim * s.value_dim * element
        # Gradients; q, k, v, o again unless kept. The states' gradients; states unless kept.
        tensors, made = (2, 1) if job.keep_intermediates else (3, 2)
        delta = n * channels * element * tensors + made * states - sum(_mlp(job).values())
    recomputed = sum(layer(job, last).values()) * job.recompute_layers if "full" in job.recompute else 0.0
    return max(mlp, delta) + 2 * stream(job) + recomputed


def _total(*many: Kept) -> Kept:
    found: Kept = {}
    for part in many:
        for name, size in part.items():
            found[name] = found.get(name, 0) + size
    return found
