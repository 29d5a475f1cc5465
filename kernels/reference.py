"""The gated delta rule mixer in plain PyTorch: the definition every fast kernel is tested against.

Letters used in shapes
    B  batch                    T  sequence (tokens)      H  value heads
    Hk key heads, H % Hk == 0   K  key dim                V  value dim
    D  channels                 W  conv width             C  chunk (tokens)
    N  documents: B when dense, len(cu_seqlens) - 1 when packed

Per token t and value head, with unit-norm q and k, gate g <= 0 and write strength beta in (0, 2):

    S_t = exp(g_t) (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T        S in R^{K x V}
    o_t = scale * S_t^T q_t

This is the gated delta rule of "Gated Delta Networks" (arXiv 2412.06464), with the state transposed (K x V
instead of V x K) and beta allowed up to 2.

Value head h reads key head h // (H // Hk). "Packed" means B == 1 and several documents one after the other,
document n being tokens cu_seqlens[n] to cu_seqlens[n + 1]; nothing crosses a document boundary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple, overload

import torch
import torch.nn.functional as F
from torch import Tensor

#: Takes the summaries M [N, H, K, K] and S [N, H, K, V] of all documents; the function it returns waits for the
#: states that enter them, [N, H, K, V], differentiable in M and S.
PassStates = Callable[[Tensor, Tensor], Callable[[], Tensor]]


def l2norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x / sqrt(sum(x^2) + eps) over the last dimension; eps is inside the root, so a zero vector stays zero.

    x is [..., K] in any float dtype; so is the result, computed in fp32 (fp64 stays fp64).
    Source: the normalisation of q and k in OLMo-Hybrid (and in flash-linear-attention).
    """
    x_fp32 = x.to(_at_least_fp32(x))
    return (x_fp32 / torch.sqrt((x_fp32 * x_fp32).sum(-1, keepdim=True) + eps)).to(x.dtype)


def gates(
    a: Tensor, b: Tensor, A_log: Tensor, dt_bias: Tensor, *, allow_neg_eigval: bool = True
) -> tuple[Tensor, Tensor]:
    """Log-decay g = -exp(A_log) * softplus(a + dt_bias) and write strength beta = sigmoid(b), doubled if asked.

    Args:
        a: [B, T, H] raw decay projection, any float dtype.
        b: [B, T, H] raw write-strength projection, any float dtype.
        A_log, dt_bias: [H].
        allow_neg_eigval: beta in (0, 2) instead of (0, 1), so that the transition may have negative eigenvalues.

    Returns:
        (g, beta), both [B, T, H] and both in fp32, or fp64 when an input of that output is fp64. OLMo-Hybrid's
        other implementations take sigmoid(b) in the activation dtype; here beta never loses bits to bf16.

    Raises ValueError when shapes disagree.
    Source: OLMo-Hybrid (Hugging Face modelling code and OLMo-core); the gate is the one of Mamba-2.
    """
    _require(a.dim() == 3, "a", tuple(a.shape), "[B, T, H]")
    _require_shape("b", b, a.shape, "the shape of a")
    _require_shape("A_log", A_log, a.shape[2:], "[H]")
    _require_shape("dt_bias", dt_bias, a.shape[2:], "[H]")
    dtype = _at_least_fp32(a, A_log, dt_bias)
    # torch's default threshold of 20 drops exp(-20) = 2e-9, visible in fp64; exp(-40) is below its rounding.
    softplus = F.softplus(a.to(dtype) + dt_bias.to(dtype), threshold=40.0)
    beta = b.to(_at_least_fp32(b)).sigmoid()
    return -A_log.to(dtype).exp() * softplus, 2.0 * beta if allow_neg_eigval else beta


@overload
def causal_conv_silu(
    x_BTD: Tensor, weight: Tensor, *, cu_seqlens: Tensor | None = ..., initial_state: Tensor | None = ...
) -> Tensor: ...


@overload
def causal_conv_silu(
    x_BTD: Tensor,
    weight: Tensor,
    *,
    cu_seqlens: Tensor | None = ...,
    initial_state: Tensor | None = ...,
    output_final_state: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def causal_conv_silu(
    x_BTD: Tensor,
    weight: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Depthwise causal convolution without bias, then SiLU: y_t = silu(sum_j weight[:, j] * x_{t - (W-1) + j}).

    Args:
        x_BTD: [B, T, D], any float dtype.
        weight: [D, W] or [D, 1, W] (the layout of torch.nn.Conv1d with groups=D).
        cu_seqlens: [N + 1] int32 or int64, document boundaries 0 ... T; requires B == 1.
        initial_state: [N, D, W - 1], the W - 1 inputs before each document, oldest first; zeros if None.
        output_final_state: also return the last W - 1 inputs of each document, in that same layout.

    Returns:
        y [B, T, D] in the dtype of x_BTD, computed in fp32 (fp64 stays fp64); with output_final_state
        (y, final_state [N, D, W - 1] in the dtype of x_BTD); what a short document doesn't fill is initial state.

    Raises ValueError when shapes disagree or cu_seqlens isn't legal.
    Source: OLMo-Hybrid's short convolutions on q, k and v (width 4).
    """
    _require(x_BTD.dim() == 3, "x_BTD", tuple(x_BTD.shape), "[B, T, D]")
    B, T, D = x_BTD.shape
    W = weight.shape[-1] if weight.dim() else 0
    is_legal = W >= 1 and weight.shape in ((D, W), (D, 1, W))
    _require(is_legal, "weight", tuple(weight.shape), f"[D, W] or [D, 1, W] with D = {D}, W >= 1")
    documents = _documents(B, T, cu_seqlens, x_BTD.device)
    N = len(documents.length)
    history = _state_or_zeros(initial_state, (N, D, W - 1), "[N, D, W - 1]", x_BTD.dtype, x_BTD.device)
    rows = torch.cat([x_BTD.reshape(B * T, D), history.transpose(1, 2).reshape(N * (W - 1), D)])

    def rows_at(n: Tensor, position: Tensor) -> Tensor:
        """Inputs at positions of documents n; positions -(W - 1) ... -1 are a document's history."""
        in_history = B * T + (n + 1) * (W - 1) + position
        return rows.index_select(0, torch.where(position >= 0, documents.start[n] + position, in_history))

    dtype = _at_least_fp32(x_BTD, weight)
    taps = weight.reshape(D, W).to(dtype)
    total = torch.zeros(B * T, D, dtype=dtype, device=x_BTD.device)
    for j in range(W):
        total = total + taps[:, j] * rows_at(documents.of_token, documents.position - (W - 1) + j).to(dtype)
    y = F.silu(total).to(x_BTD.dtype).reshape(B, T, D)
    if not output_final_state:
        return y
    n = torch.arange(N, device=x_BTD.device)
    last = [rows_at(n, documents.length - (W - 1) + j) for j in range(W - 1)]
    return y, torch.stack(last, dim=-1) if last else history


def gated_rms_norm(o: Tensor, z: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    """o / sqrt(mean(o^2) + eps) * weight * silu(z) over the last dimension; norm first, then the gate.

    Args:
        o: [..., H, V], any float dtype. z: [..., H, V], the gate before its SiLU.
        weight: [V], shared by all heads.
        eps: added to the mean of squares. OLMo-Hybrid uses 1e-5 here and 1e-6 in every other norm.

    Returns:
        [..., H, V] in the dtype of o: fp32 all through (fp64 if an input is), one cast at the end.

    Raises ValueError when shapes disagree.
    Source: OLMo-Hybrid's output norm; the order of casts is flash-linear-attention's.
    """
    _require_shape("z", z, o.shape, "the shape of o")
    _require_shape("weight", weight, o.shape[-1:], "[V]")
    dtype = _at_least_fp32(o, z, weight)
    o_fp32 = o.to(dtype)
    normalised_fp32 = o_fp32 * torch.rsqrt(o_fp32.square().mean(-1, keepdim=True) + eps)
    return (normalised_fp32 * weight.to(dtype) * F.silu(z.to(dtype))).to(o.dtype)


def gated_delta_rule_recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition (top of this file), one token at a time in fp64. Slow, differentiable, and the oracle.

    Args:
        q, k: [B, T, Hk, K], already l2-normalised. v: [B, T, H, V].
        g: [B, T, H] log-decay, <= 0. beta: [B, T, H].
        scale: factor on o; K^-0.5 if None.
        initial_state: [N, H, K, V]; zeros if None.
        cu_seqlens: [N + 1] int32 or int64, document boundaries 0 ... T; requires B == 1.

    Returns:
        (o [B, T, H, V], final_state [N, H, K, V]), both fp64 whatever the inputs, so that an error measured
        against them is the other side's. The final state of an empty document is its initial state.

    Raises ValueError when shapes disagree or cu_seqlens isn't legal.
    Source: the gated delta rule of arXiv 2412.06464.
    """
    B, T, H, K, V = _check_delta_rule(k, v, g, beta, q=q)
    documents = _documents(B, T, cu_seqlens, k.device)
    N = len(documents.length)
    states = _state_or_zeros(initial_state, (N, H, K, V), "[N, H, K, V]", torch.float64, k.device)
    q, k = (_to_value_heads(x.double(), H).flatten(0, 1) for x in (q, k))
    v, g, beta = (x.double().flatten(0, 1) for x in (v, g, beta))
    q = q * (K**-0.5 if scale is None else scale)
    # Dense rows have equal lengths and advance together; packed documents run one after the other.
    outputs, finals = [], []
    for group in torch.arange(N, device=k.device).split(B if cu_seqlens is None else 1):
        state = states[group]
        for t in range(int(documents.length[group[0]])):
            at = documents.start[group] + t
            decayed = g[at].exp()[..., None, None] * state
            error = v[at] - torch.einsum("nhk,nhkv->nhv", k[at], decayed)
            state = decayed + torch.einsum("nh,nhk,nhv->nhkv", beta[at], k[at], error)
            outputs.append(torch.einsum("nhk,nhkv->nhv", q[at], state))
        finals.append(state)
    o = torch.stack(outputs).reshape(T, B, H, V).transpose(0, 1) if outputs else v.reshape(B, T, H, V)
    return o, torch.cat(finals)


def gated_delta_rule_chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    chunk_size: int = 64,
    pass_states: PassStates | None = None,
) -> tuple[Tensor, Tensor]:
    """The same function as `gated_delta_rule_recurrent`, C tokens at a time, in fp32 (fp64 if an input is).

    With G the running sum of g inside a chunk and S the state entering it, for i >= j:
        U   = (I + strict_lower(beta_i exp(G_i - G_j) k_i.k_j))^-1 (beta_i v_i - beta_i exp(G_i) S^T k_i)
        o_i = scale exp(G_i) S^T q_i + scale sum_j exp(G_i - G_j) q_i.k_j U_j
        S'  = exp(G_C) S + sum_i exp(G_C - G_i) k_i U_i^T
    The inverse is a triangular solve: a Neumann series overflows for correlated keys with beta near 2.

    Args:
        q, k, v, g, beta, scale, initial_state, cu_seqlens: as in `gated_delta_rule_recurrent`; any float dtype.
        chunk_size: C, tokens per chunk; changes speed and rounding only.
        pass_states: instead of initial_state, for documents that other ranks share: what these do to the state goes
            out, scores are computed meanwhile, and the scan starts from what came in.

    Returns:
        (o [B, T, H, V] in the dtype of v, final_state [N, H, K, V] in fp32, or fp64 if an input is fp64).

    Raises ValueError when shapes disagree, cu_seqlens isn't legal, or chunk_size < 1.
    Source: the chunkwise form of arXiv 2412.06464.
    """
    B, T, H, K, V = _check_delta_rule(k, v, g, beta, q=q)
    dtype = _at_least_fp32(q, k, v, g, beta, *(() if initial_state is None else (initial_state,)))
    layout = _chunk_layout(B, T, cu_seqlens, chunk_size, k.device)
    states = _state_or_zeros(initial_state, (len(layout.order), H, K, V), "[N, H, K, V]", dtype, k.device)
    if B * T == 0:
        return v, states
    terms = _chunk_terms(k, v, g, beta, layout, dtype)
    wait = None if pass_states is None else pass_states(*_summary(terms, layout))
    q_chunks = _into_chunks(_to_value_heads(q.to(dtype), H), layout) * (K**-0.5 if scale is None else scale)
    scores = (q_chunks @ terms.k.mT) * terms.decay
    entering, new_values, final_state = _scan_states(terms, states if wait is None else wait(), layout)
    from_state = (q_chunks * terms.decay_from_start[..., None]) @ entering
    return _out_of_chunks(from_state + scores @ new_values, layout, B, T).to(v.dtype), final_state


def shard_summary(
    k: Tensor, v: Tensor, g: Tensor, beta: Tensor, *, cu_seqlens: Tensor | None = None, chunk_size: int = 64
) -> tuple[Tensor, Tensor]:
    """What a stretch of tokens does to the state: S_out = M @ S_in + S, exactly, for every S_in.

    M is the product of the token transitions exp(g_t) (I - beta_t k_t k_t^T), latest on the left, and S is the
    final state from zeros. State-passing context parallelism exchanges these instead of tokens.

    Args:
        k, v, g, beta, cu_seqlens, chunk_size: as in `gated_delta_rule_chunked`.

    Returns:
        (M [N, H, K, K], S [N, H, K, V]) in fp32, or fp64 if an input is fp64; N = B unless packed.
        For an empty stretch M is the identity and S is zero.

    Raises ValueError as `gated_delta_rule_chunked`.
    """
    B, T, H, K, V = _check_delta_rule(k, v, g, beta)
    dtype = _at_least_fp32(k, v, g, beta)
    layout = _chunk_layout(B, T, cu_seqlens, chunk_size, k.device)
    if B * T == 0:
        identity = torch.eye(K, dtype=dtype, device=k.device).expand(len(layout.order), H, K, K)
        return identity, identity.new_zeros(len(layout.order), H, K, V)
    return _summary(_chunk_terms(k, v, g, beta, layout, dtype), layout)


def compose(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The summary of two neighbouring stretches, `first` before `second` in the sequence. Associative.

    first and second are (M [..., K, K], S [..., K, V]) as from `shard_summary`; so is the result.
    """
    (M1, S1), (M2, S2) = first, second
    return M2 @ M1, M2 @ S1 + S2


class _ChunkLayout(NamedTuple):
    """Every document cut into chunks of C tokens, the last one padded: all first chunks, then all second ones, ...

    Documents are taken longest first: those with a chunk at step c are the first running[c], side by side.
    """

    C: int
    order: Tensor  # [N] document at each place, longest first
    place: Tensor  # [N] place of each document, the inverse of order
    running: list[int]  # documents with a chunk at step c
    slot: Tensor  # [B * T] where each token sits among the sum(running) * C slots


class _ChunkTerms(NamedTuple):
    """What the chunks need besides the state; M_ is the number of chunks, decays in [0, 1]."""

    k: Tensor  # [M_, H, C, K]
    decay: Tensor  # [M_, H, C, C] exp(G_i - G_j) for i >= j, else 0
    decay_from_start: Tensor  # [M_, H, C] exp(G_i)
    u: Tensor  # [M_, H, C, V] new values if the entering state were zero
    w: Tensor  # [M_, H, C, K] new values = u - w @ entering state


def _chunk_layout(B: int, T: int, cu_seqlens: Tensor | None, chunk_size: int, device: torch.device) -> _ChunkLayout:
    _require(chunk_size >= 1, "chunk_size", chunk_size, "an integer >= 1")
    documents = _documents(B, T, cu_seqlens, device)
    C = max(1, min(chunk_size, int(documents.length.max())))
    chunks = (documents.length + C - 1) // C
    order = torch.argsort(chunks, descending=True, stable=True)
    place = torch.argsort(order)
    steps = torch.arange(int(chunks.max()), device=device)
    running = (chunks[None, :] > steps[:, None]).sum(1)
    first_chunk = running.cumsum(0) - running
    chunk = first_chunk[documents.position // C] + place[documents.of_token]
    return _ChunkLayout(C, order, place, running.tolist(), chunk * C + documents.position % C)


def _into_chunks(x: Tensor, layout: _ChunkLayout) -> Tensor:
    """[B, T, H, *] to [M_, H, C, *], zeros in the padding."""
    flat = x.flatten(0, 1)
    empty = flat.new_zeros(sum(layout.running) * layout.C, *flat.shape[1:])
    return empty.index_copy(0, layout.slot, flat).unflatten(0, (-1, layout.C)).transpose(1, 2).contiguous()


def _out_of_chunks(x: Tensor, layout: _ChunkLayout, B: int, T: int) -> Tensor:
    """[M_, H, C, *] to [B, T, H, *], dropping the padding."""
    return x.transpose(1, 2).flatten(0, 1).index_select(0, layout.slot).unflatten(0, (B, T))


def _chunk_terms(
    k: Tensor, v: Tensor, g: Tensor, beta: Tensor, layout: _ChunkLayout, dtype: torch.dtype
) -> _ChunkTerms:
    """Everything that doesn't depend on the state, for all chunks at once."""
    k = _into_chunks(_to_value_heads(k.to(dtype), v.shape[2]), layout)
    v, g, beta = (_into_chunks(x.to(dtype), layout) for x in (v, g, beta))
    ones = torch.ones(layout.C, layout.C, dtype=torch.bool, device=k.device)
    # Sum each G_i - G_j = g_{j+1} + ... + g_i by itself: a difference of running sums would lose the small gates
    # that follow a large one. Above the diagonal -inf goes in before exp, so that the gradient there is 0 * 0.
    later_than_j = g[..., :, None].masked_fill(~ones.tril(-1), 0.0)
    decay = later_than_j.cumsum(-2).masked_fill(~ones.tril(), float("-inf")).exp()
    decay_from_start = g.cumsum(-1).exp()
    beta = beta[..., None]
    system = beta * decay * (k @ k.mT)
    written = torch.cat([beta * v, beta * decay_from_start[..., None] * k], dim=-1)
    # unitriangular: the diagonal counts as 1 and only what is strictly below it is read.
    solved = torch.linalg.solve_triangular(system, written, upper=False, unitriangular=True)
    u, w = solved.split([v.shape[-1], k.shape[-1]], dim=-1)
    return _ChunkTerms(k, decay, decay_from_start, u, w)


def _summary(terms: _ChunkTerms, layout: _ChunkLayout) -> tuple[Tensor, Tensor]:
    """As `shard_summary`: M and S follow the same recurrence from different starts; M has no values to write."""
    H, K, V = terms.k.shape[1], terms.k.shape[-1], terms.u.shape[-1]
    identity = F.pad(torch.eye(K, dtype=terms.k.dtype, device=terms.k.device), (0, V))
    widened = terms._replace(u=F.pad(terms.u, (K, 0)))
    maps = _scan_states(widened, identity.expand(len(layout.order), H, K, K + V), layout)[2]
    return maps[..., :K], maps[..., K:]


def _scan_states(terms: _ChunkTerms, initial_states: Tensor, layout: _ChunkLayout) -> tuple[Tensor, Tensor, Tensor]:
    """States through the chunks: (entering [M_, H, K, V], new values [M_, H, C, V], final [N, H, K, V])."""
    k_to_end = terms.k * terms.decay[..., -1, :, None]
    decay_whole = terms.decay_from_start[..., -1, None, None]
    steps = zip(*(x.split(layout.running) for x in (terms.u, terms.w, k_to_end, decay_whole)), strict=True)
    state = initial_states[layout.order]
    entering, new_values, finished = [], [], []
    for u, w, k_step, decay_step in steps:
        finished.append(state[len(u) :])
        state = state[: len(u)]
        entering.append(state)
        new_values.append(u - w @ state)
        state = decay_step * state + k_step.mT @ new_values[-1]
    finished.append(state)
    return torch.cat(entering), torch.cat(new_values), torch.cat(finished[::-1])[layout.place]


def _require(condition: bool, name: str, value: object, legal: str) -> None:
    if not condition:
        raise ValueError(f"{name} is {value}; it must be {legal}")


def _require_shape(name: str, x: Tensor, legal: tuple[int, ...], letters: str) -> None:
    _require(x.shape == legal, name, tuple(x.shape), f"{letters}, here {tuple(legal)}")


def _at_least_fp32(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def _to_value_heads(x_BTHK: Tensor, H: int) -> Tensor:
    """Repeat key heads so that value head h finds its key head h // (H // Hk) at h."""
    return x_BTHK.repeat_interleave(H // x_BTHK.shape[2], dim=2)


class _Documents(NamedTuple):
    """Where the documents are among the flattened B * T tokens; all int64."""

    start: Tensor  # [N]
    length: Tensor  # [N]
    of_token: Tensor  # [B * T] the document of each token
    position: Tensor  # [B * T] and its position there


def _documents(B: int, T: int, cu_seqlens: Tensor | None, device: torch.device) -> _Documents:
    if cu_seqlens is None:
        bounds = torch.arange(B + 1, device=device) * T
    else:
        given = f"{cu_seqlens.dtype} of shape {tuple(cu_seqlens.shape)}"
        is_legal = cu_seqlens.dtype in (torch.int32, torch.int64) and cu_seqlens.dim() == 1 and len(cu_seqlens) >= 2
        _require(is_legal, "cu_seqlens", given, "int32 or int64 of shape [N + 1], N >= 1")
        _require(B == 1, "B", B, "1 when cu_seqlens is given: pack the documents into one row")
        bounds = cu_seqlens.to(device=device, dtype=torch.int64)
        values = bounds.tolist()
        is_legal = values[0] == 0 and values[-1] == T and values == sorted(values)
        _require(is_legal, "cu_seqlens", values, f"non-decreasing from 0 to T = {T}")
    start, length = bounds[:-1], bounds.diff()
    of_token = torch.arange(len(length), device=device).repeat_interleave(length)
    return _Documents(start, length, of_token, torch.arange(B * T, device=device) - start[of_token])


def _state_or_zeros(
    initial_state: Tensor | None, shape: tuple[int, ...], letters: str, dtype: torch.dtype, device: torch.device
) -> Tensor:
    if initial_state is None:
        return torch.zeros(shape, dtype=dtype, device=device)
    _require_shape("initial_state", initial_state, shape, letters)
    return initial_state.to(dtype)


def _check_delta_rule(
    k: Tensor, v: Tensor, g: Tensor, beta: Tensor, q: Tensor | None = None
) -> tuple[int, int, int, int, int]:
    """Check the shapes of a delta rule call and return (B, T, H, K, V)."""
    _require(k.dim() == 4, "k", tuple(k.shape), "[B, T, Hk, K]")
    _require(v.dim() == 4 and v.shape[:2] == k.shape[:2], "v", tuple(v.shape), f"[B, T, H, V], k is {tuple(k.shape)}")
    B, T, H, V = v.shape
    Hk, K = k.shape[2:]
    _require(Hk >= 1 and H % Hk == 0, "H", H, f"a multiple of the key heads, Hk = {Hk}")
    if q is not None:
        _require_shape("q", q, k.shape, "the shape of k")
    _require_shape("g", g, (B, T, H), "[B, T, H]")
    _require_shape("beta", beta, (B, T, H), "[B, T, H]")
    return B, T, H, K, V
