"""The reference against its own definition, finite differences, itself cut up differently, and transformers.

Letters are those of kernels/reference.py. Errors are max-abs relative to the largest entry of the expected tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck

from megatron_hybrid.kernels import gated_delta
from megatron_hybrid.kernels.reference import (
    causal_conv_silu,
    compose,
    gated_delta_rule_chunked,
    gated_delta_rule_recurrent,
    gated_rms_norm,
    gates,
    l2norm,
    shard_summary,
)

FP64 = 1e-12  # measured at most 3e-15
FP32 = 5e-6  # measured at most 6e-7 against the definition, 1.6e-6 against transformers, 4e-6 at the extremes
NAMES = ("q", "k", "v", "g", "beta", "initial_state")
# Empty documents at both ends and inside, lengths 1 to 3, boundaries inside, at and across chunks of 16.
LENGTHS = (0, 5, 0, 1, 2, 3, 40, 16, 1, 33, 0)

Shape = tuple[int, int, int, int]  # Hk, H, K, V


def rand(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def delta_inputs(
    B: int, T: int, shape: Shape, N: int | None = None, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    """q, k, v, g, beta, initial_state, as leaves that require grad; beta in (0, 2)."""
    Hk, H, K, V = shape
    tensors = (
        l2norm(rand(B, T, Hk, K, seed=1)),
        l2norm(rand(B, T, Hk, K, seed=2)),
        rand(B, T, H, V, seed=3),
        -F.softplus(rand(B, T, H, seed=4) - 1.0),
        2.0 * rand(B, T, H, seed=5).sigmoid(),
        rand(B if N is None else N, H, K, V, seed=6),
    )
    return [x.to(dtype).requires_grad_() for x in tensors]


def cumulative(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor((0, *lengths), dtype=torch.int32).cumsum(0, dtype=torch.int32)


def chunked(*tensors: Tensor, C: int = 16, cu_seqlens: Tensor | None = None) -> tuple[Tensor, Tensor]:
    return gated_delta_rule_chunked(*tensors[:5], initial_state=tensors[5], cu_seqlens=cu_seqlens, chunk_size=C)


def recurrent(*tensors: Tensor, cu_seqlens: Tensor | None = None) -> tuple[Tensor, Tensor]:
    return gated_delta_rule_recurrent(*tensors[:5], initial_state=tensors[5], cu_seqlens=cu_seqlens)


def gradients(outputs: tuple[Tensor, ...], tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Gradients of a fixed random projection of all outputs."""
    weights = [rand(*x.shape, seed=20 + i, dtype=x.dtype) for i, x in enumerate(outputs)]
    return torch.autograd.grad(outputs, tensors, weights)


def assert_close(actual: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    if expected.numel() == 0:
        return
    size = expected.abs().max().item()
    error = (actual.double() - expected.double()).abs().max().item()
    assert error <= tolerance * size, f"{what}: error {error:.2e}, largest entry {size:.2e}"


def assert_all_close(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...], tolerance: float, names: str) -> None:
    for name, a, e in zip(names.split(), actual, expected, strict=True):
        assert_close(a, e, tolerance, name)


# The definition, and chunked against recurrent


def test_recurrent_is_the_formula_written_out() -> None:
    q, k, v, g, beta, state = (x.detach() for x in delta_inputs(2, 6, (2, 4, 3, 5)))
    expected_o, expected_state = torch.empty_like(v), torch.empty_like(state)
    for n in range(2):
        for h in range(4):
            S = state[n, h]
            for t in range(6):
                k_t = k[n, t, h // 2]
                transition = torch.eye(3, dtype=S.dtype) - beta[n, t, h] * torch.outer(k_t, k_t)
                S = g[n, t, h].exp() * transition @ S + beta[n, t, h] * torch.outer(k_t, v[n, t, h])
                expected_o[n, t, h] = 3**-0.5 * S.T @ q[n, t, h // 2]
            expected_state[n, h] = S
    assert_all_close(recurrent(q, k, v, g, beta, state), (expected_o, expected_state), FP64, "o state")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("C", [16, 64], ids=lambda C: f"C{C}")
@pytest.mark.parametrize("T", [1, 63, 64, 65, 200], ids=lambda T: f"T{T}")
@pytest.mark.parametrize("shape", [(3, 3, 5, 7), (3, 6, 8, 4)], ids=["H3-K5-V7", "Hk3-H6-K8-V4"])
def test_chunked_equals_recurrent(shape: Shape, T: int, C: int, dtype: torch.dtype) -> None:
    tensors = [x.detach() for x in delta_inputs(2, T, shape, dtype=dtype)]
    o, state = chunked(*tensors, C=C)
    assert (o.dtype, state.dtype) == (dtype, dtype)
    assert_all_close((o, state), recurrent(*tensors), FP64 if dtype == torch.float64 else FP32, "o state")


@pytest.mark.parametrize("scale", [None, 1.0, 0.3])
def test_scale_multiplies_the_output_only(scale: float | None) -> None:
    tensors = [x.detach() for x in delta_inputs(1, 20, (2, 2, 4, 3))]
    o_default, state_default = recurrent(*tensors)
    expected = o_default * (4**0.5 * scale if scale is not None else 1.0)
    for rule in (gated_delta_rule_recurrent, gated_delta_rule_chunked):
        o, state = rule(*tensors[:5], scale=scale, initial_state=tensors[5])
        assert_all_close((o, state), (expected, state_default), FP64, "o state")


@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["dense", "packed"])
@pytest.mark.parametrize("C", [16, 64], ids=lambda C: f"C{C}")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
def test_chunked_gradients_equal_recurrent(lengths: tuple[int, ...] | None, C: int, dtype: torch.dtype) -> None:
    B, T, N = (2, 70, None) if lengths is None else (1, sum(lengths), len(lengths))
    tensors = delta_inputs(B, T, (2, 6, 5, 7), N=N, dtype=dtype)
    cu_seqlens = None if lengths is None else cumulative(lengths)
    actual = gradients(chunked(*tensors, C=C, cu_seqlens=cu_seqlens), tensors)
    expected = gradients(recurrent(*tensors, cu_seqlens=cu_seqlens), tensors)
    assert_all_close(actual, expected, FP64 if dtype == torch.float64 else 2 * FP32, " ".join(NAMES))


# Finite differences, fp64


@pytest.mark.parametrize("lengths", [None, (3, 0, 1, 5)], ids=["dense", "packed"])
@pytest.mark.parametrize("rule", [chunked, recurrent])
def test_gradcheck_delta_rule(rule: Callable[..., tuple[Tensor, Tensor]], lengths: tuple[int, ...] | None) -> None:
    N, cu_seqlens = (1, None) if lengths is None else (len(lengths), cumulative(lengths))
    options = {"C": 4} if rule is chunked else {}
    tensors = delta_inputs(1, 9, (1, 2, 3, 2), N=N)
    assert gradcheck(lambda *x: rule(*x, cu_seqlens=cu_seqlens, **options), tensors)


@pytest.mark.parametrize("allow_neg_eigval", [True, False], ids=["beta-to-2", "beta-to-1"])
def test_gradcheck_gates_through_the_delta_rule(allow_neg_eigval: bool) -> None:
    q, k, v = (x.detach() for x in delta_inputs(1, 6, (1, 2, 3, 2))[:3])
    parameters = [rand(1, 6, 2, seed=30), rand(1, 6, 2, seed=31), rand(2, seed=32), rand(2, seed=33)]

    def run(a: Tensor, b: Tensor, A_log: Tensor, dt_bias: Tensor) -> tuple[Tensor, Tensor]:
        g, beta = gates(a, b, A_log, dt_bias, allow_neg_eigval=allow_neg_eigval)
        return gated_delta_rule_chunked(q, k, v, g, beta, chunk_size=4)

    assert gradcheck(run, [x.requires_grad_() for x in parameters])


@pytest.mark.parametrize("lengths", [(7,), (0, 1, 2, 0, 3, 6, 0)], ids=["one", "packed"])
def test_gradcheck_conv(lengths: tuple[int, ...]) -> None:
    tensors = [rand(1, sum(lengths), 2, seed=40), rand(2, 1, 4, seed=41), rand(len(lengths), 2, 3, seed=42)]

    def run(x: Tensor, weight: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return causal_conv_silu(x, weight, cu_seqlens=cumulative(lengths), initial_state=state, output_final_state=True)

    assert gradcheck(run, [x.requires_grad_() for x in tensors])


def test_gradcheck_norms() -> None:
    o, z, weight = (x.requires_grad_() for x in (rand(2, 3, 4, seed=50), rand(2, 3, 4, seed=51), rand(4, seed=52)))
    assert gradcheck(gated_rms_norm, (o, z, weight))
    assert gradcheck(l2norm, (o,))


def test_gradcheck_shard_summary() -> None:
    assert gradcheck(lambda *x: shard_summary(*x, chunk_size=4), delta_inputs(1, 7, (1, 2, 3, 2))[1:5])


def mixer_inputs(T: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """The twelve tensors of mixer_core with Hk=1, H=2, K=3, V=2, W=4, as leaves that require grad."""
    widths = (3, 3, 4, 2, 2, 4)
    activations = [rand(1, T, width, seed=60 + i) for i, width in enumerate(widths)]
    parameters = [rand(*shape, seed=70 + i) for i, shape in enumerate(((3, 4), (3, 1, 4), (4, 4), (2,), (2,), (2,)))]
    return [x.to(dtype).requires_grad_() for x in (*activations, *parameters)]


def mixer(*tensors: Tensor, key_heads: int, value_heads: int, lengths: tuple[int, ...] | None = None) -> Tensor:
    """`mixer_core` of the projections and convolutions one by one."""
    q, k, v, a, b, z, *convs, A_log, dt_bias, norm_weight = tensors
    y, _ = gated_delta.mixer_core(
        torch.cat([q, k, v, z], dim=-1), torch.cat([a, b], dim=-1), torch.cat([w.flatten(1) for w in convs]),
        A_log, dt_bias, norm_weight, num_key_heads=key_heads, num_value_heads=value_heads,
        key_dim=k.shape[-1] // key_heads, value_dim=v.shape[-1] // value_heads,
        cu_seqlens=None if lengths is None else cumulative(lengths), backend="reference",
    )  # fmt: skip
    return y


def run_mixer(*tensors: Tensor, lengths: tuple[int, ...]) -> Tensor:
    return mixer(*tensors, key_heads=1, value_heads=2, lengths=lengths)


def test_gradcheck_mixer() -> None:
    assert gradcheck(lambda *x: run_mixer(*x, lengths=(5, 2)), mixer_inputs(7))


# State: a sequence in pieces, documents packed, shards summarised


@pytest.mark.parametrize("rule", [chunked, recurrent])
@pytest.mark.parametrize("cut", [1, 16, 41], ids=lambda cut: f"cut{cut}")
def test_two_pieces_equal_one_run(rule: Callable[..., tuple[Tensor, Tensor]], cut: int) -> None:
    *tokens, state = (x.detach() for x in delta_inputs(2, 65, (2, 6, 5, 7)))
    o_first, middle = rule(*(x[:, :cut] for x in tokens), state)
    o_second, final = rule(*(x[:, cut:] for x in tokens), middle)
    assert_all_close((torch.cat([o_first, o_second], 1), final), rule(*tokens, state), FP64, "o state")


@pytest.mark.parametrize("rule", [chunked, recurrent])
def test_packed_equals_each_document_alone(rule: Callable[..., tuple[Tensor, Tensor]]) -> None:
    tensors = delta_inputs(1, sum(LENGTHS), (2, 6, 5, 7), N=len(LENGTHS))
    o, states = rule(*tensors, cu_seqlens=cumulative(LENGTHS))
    pieces = zip(*(x.split(LENGTHS, dim=1) for x in tensors[:5]), tensors[5].split(1), strict=True)
    alone = [rule(*piece) for piece in pieces]
    expected = torch.cat([o for o, _ in alone], 1), torch.cat([state for _, state in alone])
    assert_all_close((o, states), expected, FP64, "o states")
    actual_grads, expected_grads = gradients((o, states), tensors), gradients(expected, tensors)
    assert_all_close(actual_grads, expected_grads, FP64, " ".join(NAMES))


@pytest.mark.parametrize("initial", [True, False], ids=["from-state", "from-zeros"])
@pytest.mark.parametrize("rule", [gated_delta_rule_chunked, gated_delta_rule_recurrent])
def test_empty_document_keeps_its_state(rule: Callable[..., tuple[Tensor, Tensor]], initial: bool) -> None:
    *tokens, given = (x.detach() for x in delta_inputs(1, 6, (1, 2, 3, 2), N=3))
    _, states = rule(*tokens, initial_state=given if initial else None, cu_seqlens=torch.tensor([0, 4, 4, 6]))
    assert torch.equal(states[1], given[1] if initial else torch.zeros_like(given[1]))
    o, states = rule(*(x[:, :0] for x in tokens), initial_state=given[:1] if initial else None)
    assert o.shape == (1, 0, 2, 2)
    assert torch.equal(states, given[:1] if initial else torch.zeros_like(given[:1]))


def delta_rule_packed(*tensors: Tensor, lengths: tuple[int, ...]) -> Tensor:
    return chunked(*tensors, cu_seqlens=cumulative(lengths))[0]


def conv_packed(x: Tensor, weight: Tensor, lengths: tuple[int, ...]) -> Tensor:
    return causal_conv_silu(x, weight, cu_seqlens=cumulative(lengths))


@pytest.mark.parametrize(
    ("run", "tensors", "per_token"),
    [
        pytest.param(delta_rule_packed, delta_inputs(1, 31, (2, 6, 5, 7), N=3), 5, id="delta-rule"),
        pytest.param(conv_packed, [rand(1, 31, 3, seed=1), rand(3, 4, seed=2)], 1, id="conv"),
        pytest.param(run_mixer, mixer_inputs(31), 6, id="mixer"),
    ],
)
def test_no_leak_between_documents(run: Callable[..., Tensor], tensors: list[Tensor], per_token: int) -> None:
    """Change the last token of the first document: nothing after it moves, not even by 0 * nan."""
    lengths, end = (20, 1, 10), 20
    clean = [x.detach() for x in tensors]
    before = run(*clean, lengths=lengths)
    for change in (1.0, torch.nan):
        changed = [x.clone() for x in clean]
        for x in changed[:per_token]:
            x[:, end - 1] += change
        tokens = [x.requires_grad_() for x in changed[:per_token]]
        after = run(*changed, lengths=lengths)
        assert not torch.equal(before[:, end - 1], after[:, end - 1])
        assert torch.equal(before[:, end:], after[:, end:])
        for grad in torch.autograd.grad(after[:, end:].square().sum(), tokens):
            assert bool(grad[:, end:].isfinite().all()) and torch.count_nonzero(grad[:, end:]) > 0
            assert torch.isnan(after).any() or torch.count_nonzero(grad[:, :end]) == 0


@pytest.mark.parametrize("cuts", [(65,), (1, 63, 1), (20, 0, 45), (16, 17, 32)], ids=str)
def test_composed_shard_summaries_equal_the_direct_run(cuts: tuple[int, ...]) -> None:
    tensors = delta_inputs(2, 65, (2, 6, 5, 7))
    k, v, g, beta, state = tensors[1:]
    shards = zip(*(x.split(cuts, dim=1) for x in (k, v, g, beta)), strict=True)
    total, *rest = (shard_summary(*shard, chunk_size=16) for shard in shards)
    for summary in rest:
        total = compose(total, summary)
    M, S = total
    actual, (_, expected) = M @ state + S, recurrent(*tensors)
    assert_close(actual, expected, FP64, "final state")
    for name, a, e in zip(
        NAMES[1:], gradients((actual,), tensors[1:]), gradients((expected,), tensors[1:]), strict=True
    ):
        assert_close(a, e, FP64, name)


def test_shard_summary_of_packed_documents() -> None:
    tensors = [x.detach() for x in delta_inputs(1, sum(LENGTHS), (2, 6, 5, 7), N=len(LENGTHS))]
    M, S = shard_summary(*tensors[1:5], cu_seqlens=cumulative(LENGTHS), chunk_size=16)
    assert_close(M @ tensors[5] + S, recurrent(*tensors, cu_seqlens=cumulative(LENGTHS))[1], FP64, "final states")
    assert torch.equal(M[0], torch.eye(5, dtype=M.dtype).expand(6, 5, 5))
    assert torch.count_nonzero(S[0]) == 0


# Extremes

EXTREMES = ("g=0", "g=-50", "g=0-and-50", "small-g-after-large", "identical-keys-beta-1.98", "zero-keys", "beta=0")


def extreme(case: str) -> list[Tensor]:
    q, k, v, g, beta, state = (x.detach() for x in delta_inputs(1, 150, (2, 2, 6, 5), dtype=torch.float32))
    if case == "g=0":
        g = torch.zeros_like(g)
    elif case == "g=-50":
        g = torch.full_like(g, -50.0)
    elif case == "g=0-and-50":
        g = torch.where(g < g.median(), -50.0, 0.0)
    elif case == "small-g-after-large":
        g = torch.full_like(g, -1e-3)
        g[:, ::64] = -1e4
    elif case == "identical-keys-beta-1.98":
        k, beta, g = k[:, :1].expand_as(k).clone(), torch.full_like(beta, 1.98), torch.zeros_like(g)
    elif case == "zero-keys":
        q, k = q * 0.0, k * 0.0
    elif case == "beta=0":
        beta = beta * 0.0
    return [x.requires_grad_() for x in (q, k, v, g, beta, state)]


@pytest.mark.parametrize("case", EXTREMES)
def test_extremes_fp32(case: str) -> None:
    tensors = extreme(case)
    outputs, expected = chunked(*tensors, C=64), recurrent(*tensors)
    assert_all_close(outputs, expected, 2 * FP32, "o state")
    grads = gradients(outputs, tensors)
    assert all(x.isfinite().all() for x in grads)
    assert_all_close(grads, gradients(expected, tensors), 3e-5, " ".join(NAMES))  # 7e-6 at beta = 1.98


@pytest.mark.parametrize("rule", [chunked, recurrent])
def test_infinite_decay_starts_a_new_document(rule: Callable[..., tuple[Tensor, Tensor]]) -> None:
    *tokens, state = delta_inputs(1, 40, (2, 2, 6, 5))
    tokens[3].data[:, 21] = -torch.inf
    o, final = rule(*tokens, state)
    o_alone, final_alone = rule(*(x[:, 21:] for x in tokens), torch.zeros_like(state))
    assert_all_close((o[:, 21:], final), (o_alone, final_alone), FP64, "o state")
    assert all(x.isfinite().all() for x in gradients((o, final), [*tokens, state]))


# The pieces around the delta rule


def test_gates_by_hand() -> None:
    a, b = torch.tensor([[[-3.0, 25.0]]]).double(), torch.tensor([[[0.0, 2.0]]]).double()
    A_log, dt_bias = torch.tensor([0.0, 1.0]).double(), torch.tensor([1.0, -1.0]).double()
    g, beta = gates(a, b, A_log, dt_bias)
    softplus = torch.log1p(torch.tensor([-2.0, 24.0], dtype=torch.float64).exp())
    assert_close(g[0, 0], -torch.tensor([1.0, torch.e], dtype=torch.float64) * softplus, 1e-15, "g")
    assert_close(beta[0, 0], 2 / (1 + torch.tensor([0.0, -2.0], dtype=torch.float64).exp()), 1e-15, "beta")
    assert torch.equal(gates(a, b, A_log, dt_bias, allow_neg_eigval=False)[1], beta / 2)


def test_gates_stay_in_fp32_for_bf16_inputs() -> None:
    a, b = rand(1, 5, 3, seed=1, dtype=torch.bfloat16), rand(1, 5, 3, seed=2, dtype=torch.bfloat16)
    A_log, dt_bias = rand(3, seed=3, dtype=torch.float32), rand(3, seed=4, dtype=torch.bfloat16)
    g, beta = gates(a, b, A_log, dt_bias)
    assert (g.dtype, beta.dtype) == (torch.float32, torch.float32)
    expected = gates(a.double(), b.double(), A_log.double(), dt_bias.double())
    assert_all_close((g, beta), expected, 1e-6, "g beta")


def test_l2norm_has_eps_inside_the_root() -> None:
    x = torch.tensor([[3e-3, 4e-3], [0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    y = l2norm(x)
    assert_close(y, x / torch.tensor([[(25e-6 + 1e-6) ** 0.5], [1.0]], dtype=torch.float64), 1e-15, "y")
    assert bool(torch.autograd.grad(y.sum(), x)[0].isfinite().all())
    assert l2norm(x.bfloat16()).dtype == torch.bfloat16


def test_conv_equals_torch_conv1d_and_carries_its_state() -> None:
    x, weight = rand(2, 9, 6, seed=1), rand(6, 1, 4, seed=2)
    expected = F.silu(F.conv1d(F.pad(x.mT, (3, 0)), weight, groups=6)).mT
    y, final = causal_conv_silu(x, weight, output_final_state=True)
    assert_close(y, expected, 1e-14, "y")
    assert torch.equal(final, x[:, -3:].mT)
    assert torch.equal(causal_conv_silu(x, weight[:, 0]), y)
    for cut in (1, 2, 5):
        y_first, state = causal_conv_silu(x[:, :cut], weight, output_final_state=True)
        y_second, state = causal_conv_silu(x[:, cut:], weight, initial_state=state, output_final_state=True)
        assert_all_close((torch.cat([y_first, y_second], 1), state), (y, final), 1e-15, "y state")


@pytest.mark.parametrize("W", [1, 2, 4], ids=lambda W: f"W{W}")
def test_packed_conv_equals_each_document_alone(W: int) -> None:
    x, weight, states = rand(1, sum(LENGTHS), 6, seed=1), rand(6, W, seed=2), rand(len(LENGTHS), 6, W - 1, seed=3)
    packed = causal_conv_silu(x, weight, cu_seqlens=cumulative(LENGTHS), initial_state=states, output_final_state=True)
    alone = [
        causal_conv_silu(document, weight, initial_state=state, output_final_state=True)
        for document, state in zip(x.split(LENGTHS, dim=1), states.split(1), strict=True)
    ]
    expected = torch.cat([y for y, _ in alone], 1), torch.cat([state for _, state in alone])
    assert_all_close(packed, expected, 1e-15, "y states")


def test_gated_rms_norm_casts_once() -> None:
    o, z = rand(2, 3, 8, seed=1, dtype=torch.bfloat16), rand(2, 3, 8, seed=2, dtype=torch.bfloat16)
    weight = rand(8, seed=3, dtype=torch.bfloat16)
    o64, z64 = o.double(), z.double()
    exact = o64 / (o64.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double() * z64 * z64.sigmoid()
    y = gated_rms_norm(o, z, weight)
    assert y.dtype == torch.bfloat16
    # One rounding to bf16 is at most 2^-8 of the value; fp32 work before it may tip a tie.
    assert bool(((y.double() - exact).abs() <= 2**-8 * exact.abs() * 1.001).all())
    small = gated_rms_norm(o64 * 1e-3, z64, weight.double(), eps=1e-2)
    assert_close(small, o64 * 1e-3 / 0.1 * weight.double() * z64 * z64.sigmoid(), 1e-3, "eps under the root")


def test_bf16_inputs_give_bf16_output_and_fp32_state() -> None:
    tensors = [x.detach() for x in delta_inputs(1, 70, (2, 2, 6, 5), dtype=torch.bfloat16)]
    o, state = chunked(*tensors)
    assert (o.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    expected_o, expected_state = recurrent(*tensors)
    assert (expected_o.dtype, expected_state.dtype) == (torch.float64, torch.float64)
    assert_close(o, expected_o, 2**-8, "o")  # one rounding to bf16
    assert_close(state, expected_state, FP32, "state")


# Against transformers


@pytest.fixture(scope="module")
def olmo_hybrid() -> ModuleType:
    return pytest.importorskip("transformers.models.olmo_hybrid.modeling_olmo_hybrid")


@pytest.mark.parametrize("shape", [(3, 3, 5, 7), (2, 6, 8, 4)], ids=["H3-K5-V7", "Hk2-H6-K8-V4"])
def test_delta_rule_equals_transformers(olmo_hybrid: ModuleType, shape: Shape) -> None:
    q, k, v, g, beta, state = (x.detach() for x in delta_inputs(2, 100, shape, dtype=torch.float32))
    theirs = olmo_hybrid.torch_chunk_gated_delta_rule(
        q, k, v, g=g, beta=beta, initial_state=state, output_final_state=True
    )
    assert_all_close(chunked(q, k, v, g, beta, state, C=64), theirs, FP32, "o state")


def test_mixer_equals_transformers(olmo_hybrid: ModuleType) -> None:
    """Their whole layer, fp32: ours between the same projections gives the same output and gradients."""
    config = olmo_hybrid.OlmoHybridConfig(
        hidden_size=24, num_attention_heads=3, num_hidden_layers=4, linear_key_head_dim=6, linear_value_head_dim=10
    )
    torch.manual_seed(0)
    layer = olmo_hybrid.OlmoHybridGatedDeltaNet(config, layer_idx=0)
    layer.o_norm.weight.data.uniform_(0.5, 1.5)
    u = rand(2, 70, 24, seed=1, dtype=torch.float32)
    projections = [layer.q_proj, layer.k_proj, layer.v_proj, layer.a_proj, layer.b_proj, layer.g_proj]
    convs = layer.conv1d.weight.split([18, 18, 30])
    inputs = (*(projection(u) for projection in projections), *convs, layer.A_log, layer.dt_bias, layer.o_norm.weight)
    ours, theirs = layer.o_proj(mixer(*inputs, key_heads=3, value_heads=3)), layer(u)
    names, parameters = zip(*layer.named_parameters(), strict=True)
    assert_close(ours, theirs, FP32, "y")
    # Measured 3e-6: both sides round in fp32.
    assert_all_close(gradients((ours,), parameters), gradients((theirs,), parameters), 2e-5, " ".join(names))


# Errors name the argument, its value and the legal values


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": (1, 6, 1, 4)}, r"q is \(1, 6, 1, 4\); it must be the shape of k, here \(1, 6, 2, 3\)"),
        ({"v": (1, 6, 3, 2)}, r"H is 3; it must be a multiple of the key heads, Hk = 2"),
        ({"v": (1, 5, 4, 2)}, r"v is \(1, 5, 4, 2\); it must be \[B, T, H, V\]"),
        ({"g": (1, 6, 2)}, r"g is \(1, 6, 2\); it must be \[B, T, H\], here \(1, 6, 4\)"),
        ({"beta": (1, 6)}, r"beta is \(1, 6\)"),
        ({"initial_state": (2, 4, 3, 2)}, r"initial_state is .*\[N, H, K, V\], here \(1, 4, 3, 2\)"),
        ({"cu_seqlens": [0, 4, 3, 6]}, r"cu_seqlens is \[0, 4, 3, 6\]; it must be non-decreasing from 0 to T = 6"),
        ({"cu_seqlens": [0, 5]}, r"cu_seqlens is \[0, 5\]"),
        ({"cu_seqlens": [1, 6]}, r"cu_seqlens is \[1, 6\]"),
        ({"cu_seqlens": [0.0, 6.0]}, r"cu_seqlens is torch.float32 of shape \(2,\); it must be int32 or int64"),
        ({"chunk_size": 0}, r"chunk_size is 0; it must be an integer >= 1"),
    ],
    ids=lambda x: "-".join(f"{k}={v}" for k, v in x.items()) if isinstance(x, dict) else "",
)
def test_delta_rule_errors(change: dict[str, object], message: str) -> None:
    shapes = {"q": (1, 6, 2, 3), "k": (1, 6, 2, 3), "v": (1, 6, 4, 2), "g": (1, 6, 4), "beta": (1, 6, 4)}
    given: dict[str, object] = {name: torch.zeros(shape) for name, shape in shapes.items()}
    for name, value in change.items():
        given[name] = torch.tensor(value) if isinstance(value, list) else value
        given[name] = torch.zeros(value) if isinstance(value, tuple) else given[name]
    with pytest.raises(ValueError, match=message):
        gated_delta_rule_chunked(**given)  # type: ignore[arg-type]


def test_other_errors() -> None:
    x = torch.zeros(2, 4, 3)
    with pytest.raises(ValueError, match=r"B is 2; it must be 1 when cu_seqlens is given"):
        causal_conv_silu(x, torch.zeros(3, 4), cu_seqlens=torch.tensor([0, 4]))
    with pytest.raises(ValueError, match=r"weight is \(4, 4\); it must be \[D, W\] or \[D, 1, W\] with D = 3"):
        causal_conv_silu(x, torch.zeros(4, 4))
    with pytest.raises(ValueError, match=r"initial_state is \(2, 3, 4\); it must be \[N, D, W - 1\], here \(2, 3, 3\)"):
        causal_conv_silu(x, torch.zeros(3, 4), initial_state=torch.zeros(2, 3, 4))
    with pytest.raises(ValueError, match=r"z is \(2, 4, 2\)"):
        gated_rms_norm(x, x[..., :2], torch.ones(3))
    with pytest.raises(ValueError, match=r"A_log is \(4,\); it must be \[H\], here \(3,\)"):
        gates(x, x, torch.zeros(4), torch.zeros(3))
    with pytest.raises(ValueError, match=r"qkvz is \(1, 7, 14\); its last dimension must be 9 \(no gate\) or 12"):
        mixer(*mixer_inputs(7), key_heads=1, value_heads=3)
