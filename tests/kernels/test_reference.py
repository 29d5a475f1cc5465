"""The reference against its own definition, finite differences, and itself cut up differently."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

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
from tests.kernels.reference_inputs import (
    FP32,
    FP64,
    LENGTHS,
    NAMES,
    Shape,
    assert_all_close,
    assert_close,
    chunked,
    cumulative,
    delta_inputs,
    gradients,
    mixer,
    mixer_inputs,
    rand,
    recurrent,
)

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
