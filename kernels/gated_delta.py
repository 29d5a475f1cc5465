"""The gated delta rule and the mixer core around it, for training and generation: one interface, three backends.

    triton     the kernels in triton_*.py; default on a GPU
    reference  plain PyTorch (reference.py); default on CPU
    fla        flash-linear-attention, when installed, to measure against; no summaries, no single tokens, no documents
               that ranks share

The backend is the caller's choice or the default of the tensors' device, said once in the log. None stands in for
another: what a backend cannot do, it refuses.

Letters in shapes: B batch, T sequence, H value heads, Hk key heads, K key dim, V value dim, W conv width,
D = 2 Hk K + H V conv channels (q, then k, then v), N documents (B unless packed).
"""

from __future__ import annotations

import importlib.util
import logging
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_hybrid.kernels import reference
from megatron_hybrid.kernels.checks import check_call, conv_letters, mixer_sizes

PassStates = reference.PassStates
BACKENDS = ("triton", "reference", "fla")
log = logging.getLogger(__name__)


def choose_backend(backend: str | None, x: Tensor) -> str:
    """The backend to run for tensors like x: the one asked for, or the default of their device.

    Raises ValueError for an unknown name, RuntimeError when the backend asked for cannot run here.
    """
    name = backend or ("triton" if x.is_cuda else "reference")
    if name not in BACKENDS:
        raise ValueError(f"backend is {name!r}; it must be one of {', '.join(BACKENDS)}")
    if name == "triton":
        import triton

        if not x.is_cuda and not triton.knobs.runtime.interpret:
            raise RuntimeError("backend triton needs tensors on a GPU (or TRITON_INTERPRET=1); choose reference on CPU")
        if x.is_cuda and x.dtype not in (torch.bfloat16, torch.float16):
            raise ValueError(f"dtype is {x.dtype}; the triton backend takes bfloat16 or float16, reference takes any")
    if name == "fla" and importlib.util.find_spec("fla") is None:
        raise RuntimeError("backend fla needs the package flash-linear-attention, which is not installed")
    _say_once(name, str(x.device.type))
    return name


@cache
def _say_once(name: str, device: str) -> None:
    log.info("Gated DeltaNet kernels: backend %s on %s", name, device)


def gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, A_log: Tensor, dt_bias: Tensor, *,
    scale: float | None = None, initial_state: Tensor | None = None, output_final_state: bool = False,
    cu_seqlens: Tensor | None = None, allow_neg_eigval: bool = True, qk_l2norm: bool = True, states_every: int = 0,
    keep_intermediates: bool = False, backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """o and the final state of S_t = exp(g_t) (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T, o_t = scale S_t^T q_t.

    Args:
        q, k: [B, T, Hk, K]; v: [B, T, H, V], of one dtype; views of a projection are read where they are.
        a, b: [B, T, H], of one dtype, raw decay and write-strength projections: g = -exp(A_log) softplus(a + dt_bias)
            and beta = sigmoid(b), doubled with allow_neg_eigval, both in fp32. A_log, dt_bias: [H].
        scale: K^-0.5 if None.
        initial_state: [N, H, K, V] fp32; zeros if None.
        cu_seqlens: [N + 1] int32 or int64, document boundaries 0 ... T of one packed row (B = 1). On a GPU its
            values are not read back, so they are not checked; on CPU they are.
        qk_l2norm: normalise q and k; without it they are taken as normalised.
        states_every: triton: keep the state entering every n-th chunk of 64 tokens for the backward; 0 keeps none.
        keep_intermediates: triton: keep all that the backward reads, so that it computes nothing again; the states are
            part of it, so states_every must be 0. The same gradients either way.
        backend: see the top of this file.

    Returns:
        (o [B, T, H, V] in the dtype of v, final state [N, H, K, V] fp32 or None).

    Raises ValueError when shapes, dtypes or devices disagree, RuntimeError when the backend cannot run here.
    Source: "Gated Delta Networks" (arXiv 2412.06464), with beta up to 2.
    """
    check_call(
        {"q": ("B, T, Hk, K", q), **_delta_arguments(k, v, a, b, A_log, dt_bias)}
        | {"initial_state": ("N, H, K, V", initial_state)},
        key_heads="the number of heads of k", value_heads="the number of heads of v", cu_seqlens=cu_seqlens,
    )  # fmt: skip
    keep = _kept(states_every, keep_intermediates)
    name = choose_backend(backend, v)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if name == "triton" and v.numel():
        from megatron_hybrid.kernels.triton_autograd import DeltaRule, Options, with_unit_stride

        options = Options(scale, allow_neg_eigval, qk_l2norm, **keep)
        dense = (with_unit_stride(x) for x in (q, k, v, a, b, A_log, dt_bias))
        return DeltaRule.apply(*dense, _fp32(initial_state), options, cu_seqlens, output_final_state)
    if name == "fla":
        return _fla(
            q, k, v, a, b, A_log, dt_bias, scale, initial_state, output_final_state, cu_seqlens, allow_neg_eigval,
            qk_l2norm,
        )  # fmt: skip
    if qk_l2norm:
        q, k = reference.l2norm(q), reference.l2norm(k)
    g, beta = reference.gates(a, b, A_log, dt_bias, allow_neg_eigval=allow_neg_eigval)
    o, final = reference.gated_delta_rule_chunked(
        q, k, v, g, beta, scale=scale, initial_state=initial_state, cu_seqlens=cu_seqlens
    )
    return o, final if output_final_state else None


def mixer_core(
    qkvz: Tensor, ab: Tensor, conv_weight: Tensor, A_log: Tensor, dt_bias: Tensor, norm_weight: Tensor, *,
    num_key_heads: int, num_value_heads: int, key_dim: int, value_dim: int, allow_neg_eigval: bool = True,
    norm_eps: float = 1e-5, cu_seqlens: Tensor | None = None, conv_halo: Tensor | None = None,
    initial_state: Tensor | None = None, output_final_state: bool = False, states_every: int = 0,
    keep_intermediates: bool = False, pass_states: PassStates | None = None, backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Everything of a mixer between its projections: conv + SiLU, l2norm, gates, delta rule, gated RMSNorm.

    Args:
        qkvz: [B, T, D + H V], the projections q, k, v (before their convolution) and z one after the other, any batch
            and token strides; [B, T, D] without an output gate.
        ab: [B, T, 2 H], a then b. A_log, dt_bias: [H].
        conv_weight: [D, W] or [D, 1, W], W <= 4. norm_weight: [V].
        conv_halo: [N, D, W - 1], the inputs before each document, oldest first; zeros if None.
        initial_state, output_final_state, cu_seqlens, states_every, keep_intermediates, allow_neg_eigval: as in
            `gated_delta_rule`.
        pass_states: for documents that other ranks share (`PassStates`); then there is no initial_state.

    Returns:
        (y [B, T, H V] in the dtype of qkvz, final state [N, H, K, V] fp32 or None). Gradients flow to every tensor,
        conv_halo and initial_state too.

    Raises ValueError when shapes or devices disagree, RuntimeError when the backend cannot run here.
    """
    Hk, H, K, V = num_key_heads, num_value_heads, key_dim, value_dim
    check_call(
        {"qkvz": ("B, T, D or D + H V", qkvz), "ab": ("B, T, 2 H", ab)}
        | _mixer_weights(conv_weight, A_log, dt_bias, norm_weight)
        | {"conv_halo": ("N, D, W - 1", conv_halo), "initial_state": ("N, H, K, V", initial_state)},
        key_heads="num_key_heads", value_heads="num_value_heads", cu_seqlens=cu_seqlens,
        sizes=mixer_sizes(Hk, H, K, V, conv_weight),
    )  # fmt: skip
    weight = conv_weight.flatten(1)
    D, W = weight.shape
    if pass_states is not None and (initial_state is not None or output_final_state):
        raise ValueError(
            "pass_states brings the initial states and takes the final ones: neither can be given or asked"
        )
    keep = _kept(states_every, keep_intermediates)
    name = choose_backend(backend, qkvz)
    if name == "fla":
        if conv_halo is not None or pass_states is not None:
            raise RuntimeError("backend fla cannot share a sequence between ranks; use triton, or exchange heads")
        return _fla_mixer(
            qkvz, ab, weight, A_log, dt_bias, norm_weight, (Hk, H, K, V), allow_neg_eigval, norm_eps, cu_seqlens,
            initial_state, output_final_state,
        )  # fmt: skip
    if name == "triton" and qkvz.numel():
        from megatron_hybrid.kernels.triton_autograd import MixerCore, Options, with_unit_stride

        options = Options(K**-0.5, allow_neg_eigval, norm_eps=norm_eps, **keep)
        halo = None if conv_halo is None else _four_taps(conv_halo, 4 - W)
        y, final = MixerCore.apply(
            with_unit_stride(qkvz), with_unit_stride(ab), _four_taps(weight, 4 - W), with_unit_stride(A_log),
            with_unit_stride(dt_bias), with_unit_stride(norm_weight), halo, _fp32(initial_state), (Hk, H, K, V),
            options, cu_seqlens, output_final_state, pass_states,
        )  # fmt: skip
        return y.flatten(2), final
    x = reference.causal_conv_silu(qkvz[..., :D], weight, cu_seqlens=cu_seqlens, initial_state=conv_halo)
    q, k, v = x.split([Hk * K, Hk * K, H * V], dim=-1)
    q, k = (reference.l2norm(y.unflatten(2, (Hk, K))) for y in (q, k))
    a, b = ab.chunk(2, dim=-1)
    gates = reference.gates(a, b, A_log, dt_bias, allow_neg_eigval=allow_neg_eigval)
    o, last = reference.gated_delta_rule_chunked(
        q, k, v.unflatten(2, (H, V)), *gates, initial_state=initial_state, cu_seqlens=cu_seqlens,
        pass_states=pass_states,
    )  # fmt: skip
    final = last if output_final_state else None
    if qkvz.shape[-1] == D:
        wide = torch.promote_types(o.dtype, torch.float32)
        return F.rms_norm(o.to(wide), (V,), norm_weight.to(wide), norm_eps).to(o.dtype).flatten(2), final
    return reference.gated_rms_norm(o, qkvz[..., D:].unflatten(2, (H, V)), norm_weight, norm_eps).flatten(2), final


def shard_summary(
    k: Tensor, v: Tensor, a: Tensor, b: Tensor, A_log: Tensor, dt_bias: Tensor, *, cu_seqlens: Tensor | None = None,
    allow_neg_eigval: bool = True, k_l2norm: bool = True, backend: str | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What a stretch of tokens does to the state, for context parallelism: S_out = M @ S_in + S for every S_in.

    Arguments as in `gated_delta_rule`. Returns (M [N, H, K, K], S [N, H, K, V]) fp32, with gradients.
    """
    check_call(
        _delta_arguments(k, v, a, b, A_log, dt_bias),
        key_heads="the number of heads of k", value_heads="the number of heads of v", cu_seqlens=cu_seqlens,
    )  # fmt: skip
    name = choose_backend(backend, v)
    if name == "fla":
        raise RuntimeError("backend fla has no shard summary; use triton or reference")
    if name == "triton" and v.numel():
        from megatron_hybrid.kernels.triton_autograd import Options, Summary, with_unit_stride

        options = Options(1.0, allow_neg_eigval, k_l2norm)
        both = Summary.apply(*(with_unit_stride(x) for x in (k, v, a, b, A_log, dt_bias)), options, cu_seqlens)
        return both[..., : k.shape[-1]], both[..., k.shape[-1] :]
    g, beta = reference.gates(a, b, A_log, dt_bias, allow_neg_eigval=allow_neg_eigval)
    return reference.shard_summary(reference.l2norm(k) if k_l2norm else k, v, g, beta, cu_seqlens=cu_seqlens)


@torch.no_grad()
def decode_step(
    qkvz: Tensor, ab: Tensor, conv_state: Tensor, state: Tensor, conv_weight: Tensor, A_log: Tensor, dt_bias: Tensor,
    norm_weight: Tensor, *, num_key_heads: int, allow_neg_eigval: bool = True, norm_eps: float = 1e-5,
    backend: str | None = None,
) -> Tensor:  # fmt: skip
    """One token of each row through the mixer core; conv_state and state are updated in place. No gradients.

    Args:
        qkvz: [B, D + H V] or [B, D], ab: [B, 2 H], as in `mixer_core`.
        conv_state: [B, D, W - 1], the inputs before this token, oldest first.
        state: [B, H, K, V] fp32; backend reference takes fp64 too.

    Returns y [B, H V] in the dtype of qkvz. Raises as `mixer_core`.
    """
    if state.dim() != 4:
        raise ValueError(f"state is {tuple(state.shape)}; it must be [B, H, K, V]")
    B, H, K, V = state.shape
    Hk = num_key_heads
    check_call(
        {"state": ("B, H, K, V", state), "qkvz": ("B, D or D + H V", qkvz), "ab": ("B, 2 H", ab)}
        | _mixer_weights(conv_weight, A_log, dt_bias, norm_weight)
        | {"conv_state": ("B, D, W - 1", conv_state)},
        key_heads="num_key_heads", value_heads="the number of heads of state",
        sizes=mixer_sizes(Hk, H, K, V, conv_weight),
    )  # fmt: skip
    name = choose_backend(backend, qkvz)
    if state.dtype != torch.float32 and (state.dtype, name) != (torch.float64, "reference"):
        raise ValueError(f"state is {state.dtype}; it must be torch.float32: tokens add to it one by one")
    weight = conv_weight.flatten(1).contiguous()
    D, W = weight.shape
    if name == "fla":
        raise RuntimeError("backend fla has no step of one token here; use triton or reference")
    if name == "triton":
        import triton

        from megatron_hybrid.kernels.configs import launch_for
        from megatron_hybrid.kernels.triton_autograd import with_unit_stride
        from megatron_hybrid.kernels.triton_decode import decode_kernel

        for what, x in (("state", state), ("conv_state", conv_state)):
            if not x.is_contiguous():
                raise ValueError(f"{what} has strides {x.stride()}; it must be contiguous: it is updated in place")
        x, gates = with_unit_stride(qkvz), with_unit_stride(ab)
        y = qkvz.new_empty(B, H * V)
        decode_kernel[(B * H,)](
            x, conv_state, weight, gates, with_unit_stride(A_log), with_unit_stride(dt_bias),
            with_unit_stride(norm_weight), state, y, K**-0.5, 1e-6, norm_eps, x.stride(0), gates.stride(0), Hk=Hk, H=H,
            K=K, V=V, BK=triton.next_power_of_2(K), BV=triton.next_power_of_2(V), W=W,
            BETA_MAX=2.0 if allow_neg_eigval else 1.0, GATE=qkvz.shape[1] > D,
            **launch_for("decode", K, V).options,
        )  # fmt: skip
    else:
        out, final = mixer_core(
            qkvz[:, None], ab[:, None], weight, A_log, dt_bias, norm_weight, num_key_heads=Hk, num_value_heads=H,
            key_dim=K, value_dim=V, allow_neg_eigval=allow_neg_eigval, norm_eps=norm_eps, conv_halo=conv_state,
            initial_state=state, output_final_state=True, backend="reference",
        )  # fmt: skip
        y = out[:, 0]
        assert final is not None
        state.copy_(final)
    conv_state.copy_(torch.cat([conv_state[..., 1:], qkvz[:, :D, None].to(conv_state.dtype)], dim=-1))
    return y


def _four_taps(x: Tensor, missing: int) -> Tensor:
    """Weights or history of a narrower convolution with zeros for the oldest taps; x itself where none is missing."""
    return (F.pad(x, (missing, 0)) if missing else x).contiguous()


def _kept(states_every: int, keep_intermediates: bool) -> dict[str, Any]:
    """Both as Options takes them: nothing is kept where there will be no backward. Raises ValueError for both."""
    if keep_intermediates and states_every:
        raise ValueError(
            f"keep_intermediates keeps every state already: states_every is {states_every}, it must be 0 with it"
        )
    if not torch.is_grad_enabled():
        return {}
    return {"states_every": states_every, "keep_intermediates": keep_intermediates}


def _delta_arguments(
    k: Tensor, v: Tensor, a: Tensor, b: Tensor, A_log: Tensor, dt_bias: Tensor
) -> dict[str, tuple[str, Tensor | None]]:
    """What `check_call` takes."""
    return {
        "k": ("B, T, Hk, K", k), "v": ("B, T, H, V", v), "a": ("B, T, H", a), "b": ("B, T, H", b),
        "A_log": ("H", A_log), "dt_bias": ("H", dt_bias),
    }  # fmt: skip


def _mixer_weights(
    conv_weight: Tensor, A_log: Tensor, dt_bias: Tensor, norm_weight: Tensor
) -> dict[str, tuple[str, Tensor | None]]:
    """What `check_call` takes."""
    return {
        "conv_weight": (conv_letters(conv_weight), conv_weight), "A_log": ("H", A_log), "dt_bias": ("H", dt_bias),
        "norm_weight": ("V", norm_weight),
    }  # fmt: skip


def _fp32(state: Tensor | None) -> Tensor | None:
    return None if state is None else state.float().contiguous()


def _fla_mixer(
    qkvz: Tensor, ab: Tensor, conv_weight: Tensor, A_log: Tensor, dt_bias: Tensor, norm_weight: Tensor,
    heads: tuple[int, int, int, int], allow_neg_eigval: bool, norm_eps: float, cu_seqlens: Tensor | None,
    initial_state: Tensor | None, output_final_state: bool,
) -> tuple[Tensor, Any]:  # fmt: skip
    """The mixer core as flash-linear-attention's own layer puts its kernels together."""
    from fla.modules.causal_conv1d import causal_conv1d
    from fla.modules.layernorm import rms_norm
    from fla.modules.norm.fused_norm_gate import rms_norm_gated

    Hk, H, K, V = heads
    D = conv_weight.shape[0]
    x, _ = causal_conv1d(x=qkvz[..., :D].contiguous(), weight=conv_weight, activation="silu", cu_seqlens=cu_seqlens)
    q, k, v = x.split([Hk * K, Hk * K, H * V], dim=-1)
    a, b = (y.contiguous() for y in ab.chunk(2, dim=-1))
    o, final = gated_delta_rule(
        q.unflatten(2, (Hk, K)), k.unflatten(2, (Hk, K)), v.unflatten(2, (H, V)), a, b, A_log, dt_bias,
        initial_state=initial_state, output_final_state=output_final_state, cu_seqlens=cu_seqlens,
        allow_neg_eigval=allow_neg_eigval, backend="fla",
    )  # fmt: skip
    if qkvz.shape[-1] == D:
        return rms_norm(o, norm_weight, None, eps=norm_eps).flatten(2), final
    z = qkvz[..., D:].unflatten(2, (H, V)).contiguous()
    return rms_norm_gated(o, z, norm_weight, None, activation="swish", eps=norm_eps).flatten(2), final


def _fla(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, A_log: Tensor, dt_bias: Tensor, scale: float,
    initial_state: Tensor | None, output_final_state: bool, cu_seqlens: Tensor | None, allow_neg_eigval: bool,
    qk_l2norm: bool,
) -> tuple[Tensor, Any]:  # fmt: skip
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    return chunk_gated_delta_rule(
        q, k, v, g=a, beta=b, scale=scale, initial_state=initial_state, output_final_state=output_final_state,
        cu_seqlens=cu_seqlens, use_qk_l2norm_in_kernel=qk_l2norm, use_gate_in_kernel=True, A_log=A_log,
        dt_bias=dt_bias, use_beta_sigmoid_in_kernel=True, allow_neg_eigval=allow_neg_eigval,
    )  # fmt: skip
