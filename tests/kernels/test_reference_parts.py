"""The pieces around the delta rule, both beside transformers, and what the reference refuses."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

from megatron_hybrid.kernels.reference import (
    causal_conv_silu,
    gated_delta_rule_chunked,
    gated_rms_norm,
    gates,
    l2norm,
)
from tests.kernels.reference_inputs import (
    FP32,
    LENGTHS,
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
    with pytest.raises(ValueError, match=r"qkvz is \(1, 7, 14\); it must be .*, here \[1, 7, 9 or 12\]"):
        mixer(*mixer_inputs(7), key_heads=1, value_heads=3)
