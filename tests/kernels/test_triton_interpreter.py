"""The Triton kernels in triton's interpreter against the reference: every code path, small shapes, fp32.

The interpreter computes in fp32 what a GPU rounds to bf16, so these tests hold to fp32 tolerances; what rounding does
is measured by test_triton_gpu.py. Errors are RMS of the difference over RMS of the expected tensor.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_hybrid.kernels import configs, gated_delta, reference
from megatron_hybrid.modules.recompute import Recomputed
from tests.kernels import decoding, pieces, wrong_calls

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1",
    reason="needs TRITON_INTERPRET=1 from the start, since triton reads it on import; tests/run.sh runs them so",
)

FP32 = 3e-6  # measured at most 1e-6
SUMS = 1e-4  # A_log and dt_bias: sums over all tokens that cancel; measured at most 2e-5
Shape = tuple[int, int, int, int]  # Hk, H, K, V
SMALL: Shape = (1, 2, 16, 32)
# Empty documents at both ends and inside, lengths 1 to 3, boundaries inside, at and across chunks of 64.
LENGTHS = (0, 1, 2, 64, 0, 130, 0)


def rand(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cumulative(lengths: Sequence[int]) -> Tensor:
    return torch.tensor((0, *lengths), dtype=torch.int32).cumsum(0, dtype=torch.int32)


def delta_inputs(B: int, T: int, shape: Shape, N: int | None = None) -> dict[str, Tensor]:
    Hk, H, K, V = shape
    return {
        "q": rand(B, T, Hk, K, seed=1),
        "k": rand(B, T, Hk, K, seed=2),
        "v": rand(B, T, H, V, seed=3),
        "a": rand(B, T, H, seed=4),
        "b": rand(B, T, H, seed=5),
        "A_log": rand(H, seed=6) * 0.5,
        "dt_bias": rand(H, seed=7) - 3.0,  # g about -0.1: the relative error of exp(G) in fp32 is |G| 6e-8
        "initial_state": rand(B if N is None else N, H, K, V, seed=8),
    }


def mixer_inputs(B: int, T: int, shape: Shape, gate: bool = True, W: int = 4) -> dict[str, Tensor]:
    Hk, H, K, V = shape
    D = 2 * Hk * K + H * V
    return {
        "qkvz": rand(B, T, D + gate * H * V, seed=1),
        "ab": rand(B, T, 2 * H, seed=2),
        "conv_weight": rand(D, 1, W, seed=3) * 0.5,
        "A_log": rand(H, seed=4) * 0.5,
        "dt_bias": rand(H, seed=5) - 3.0,
        "norm_weight": 1.0 + 0.1 * rand(V, seed=6),
    }


def error(actual: Tensor, expected: Tensor) -> float:
    difference = (actual.double() - expected.double()).norm()
    return (difference / expected.double().norm().clamp_min(1e-30)).item()


def compare(function: str, inputs: dict[str, Tensor], **options: object) -> None:
    """Outputs and every gradient of one function of gated_delta.py, triton in fp32 against the reference in fp64."""
    results = []
    for backend, dtype in (("reference", torch.float64), ("triton", torch.float32)):
        leaves = {name: x.to(dtype).requires_grad_() for name, x in inputs.items()}
        outputs = getattr(gated_delta, function)(**leaves, **options, backend=backend)
        outputs = [x for x in outputs if x is not None]
        weights = [rand(*x.shape, seed=20 + i).to(x.dtype) for i, x in enumerate(outputs)]
        gradients = torch.autograd.grad(outputs, list(leaves.values()), weights)
        results.append((outputs, gradients))
    (expected, expected_gradients), (actual, actual_gradients) = results
    for i, (x, y) in enumerate(zip(actual, expected, strict=True)):
        assert x.shape == y.shape
        assert error(x, y) <= FP32, f"output {i}: {error(x, y):.1e}"
    for name, x, y in zip(inputs, actual_gradients, expected_gradients, strict=True):
        tolerance = SUMS if name in ("A_log", "dt_bias") else FP32
        assert error(x, y) <= tolerance, f"gradient of {name}: {error(x, y):.1e}"


@pytest.mark.parametrize("T", [1, 63, 64, 65, 130], ids=lambda T: f"T{T}")
def test_delta_rule_dense(T: int) -> None:
    compare("gated_delta_rule", delta_inputs(2 if T == 1 else 1, T, (1, 1, 16, 32)), output_final_state=True)


#: What is kept for the backward.
POLICIES: dict[str, dict[str, Any]] = {
    "every0": {}, "every1": {"states_every": 1}, "every2": {"states_every": 2}, "all": {"keep_intermediates": True},
}  # fmt: skip


@pytest.mark.parametrize("policy", POLICIES)
def test_delta_rule_packed(policy: str) -> None:
    inputs = delta_inputs(1, sum(LENGTHS), SMALL, N=len(LENGTHS))
    options = {"output_final_state": True, "cu_seqlens": cumulative(LENGTHS)}
    compare("gated_delta_rule", inputs, **options, **POLICIES[policy])


@pytest.mark.parametrize(
    "shape", [(1, 1, 96, 192), (1, 1, 16, 16), (1, 1, 112, 80), (1, 2, 48, 32), (1, 1, 256, 256)],
    ids=["K96-V192", "K16-V16", "K112-V80", "K48-V32-grouped", "K256-V256"],
)  # fmt: skip
def test_head_sizes(shape: Shape) -> None:
    compare("gated_delta_rule", delta_inputs(1, 66, shape), output_final_state=True)


@pytest.mark.parametrize(
    "policy", [{"states_every": 1}, {"states_every": 3}, {"keep_intermediates": True}], ids=["every1", "every3", "all"]
)
def test_kept_dense(policy: dict[str, Any]) -> None:
    compare("gated_delta_rule", delta_inputs(1, 260, (1, 1, 16, 16)), output_final_state=True, **policy)


def test_beta_below_one_own_scale_and_normalised_inputs() -> None:
    inputs = delta_inputs(1, 70, SMALL)
    inputs |= {name: reference.l2norm(inputs[name]) for name in "qk"}
    compare("gated_delta_rule", inputs, qk_l2norm=False, allow_neg_eigval=False, scale=0.3)


def test_without_gradient_of_the_output() -> None:
    """Only the final state is used downstream."""
    grads = []
    for backend, dtype in (("reference", torch.float64), ("triton", torch.float32)):
        inputs = {name: x.to(dtype).requires_grad_() for name, x in delta_inputs(1, 66, SMALL).items()}
        _, final = gated_delta.gated_delta_rule(**inputs, output_final_state=True, backend=backend)
        assert final is not None
        grads.append(torch.autograd.grad(final.square().sum(), [inputs["k"], inputs["v"], inputs["initial_state"]]))
    for x, y in zip(*grads, strict=True):
        assert error(y, x) <= FP32


@pytest.mark.parametrize(
    "change",
    [
        {"k": lambda x: x[:, :1].expand_as(x).clone(), "b": lambda x: torch.full_like(x, 4.6)},
        {"a": lambda x: torch.full_like(x, -60.0)},
        {"A_log": lambda x: torch.full_like(x, 4.0), "dt_bias": lambda x: torch.zeros_like(x)},
        {"a": lambda x: torch.where(torch.arange(x.shape[1])[None, :, None] % 7 == 0, 30.0, -30.0).to(x)},
        {"b": lambda x: torch.full_like(x, -30.0)},
        {"k": torch.zeros_like, "q": torch.zeros_like},
    ],
    ids=["identical keys, beta 1.98", "no decay", "g about -38", "mixed decay", "beta about 0", "zero keys"],
)
def test_extremes(change: dict) -> None:
    inputs = delta_inputs(1, 66, (1, 1, 16, 16))
    for name, f in change.items():
        inputs[name] = f(inputs[name])
    leaves = {name: x.float().requires_grad_() for name, x in inputs.items()}
    doubles = {name: x.double().requires_grad_() for name, x in inputs.items()}
    o, _ = gated_delta.gated_delta_rule(**leaves, backend="triton")
    expected, _ = gated_delta.gated_delta_rule(**doubles, backend="reference")
    # Identical keys: 64 alternating terms nearly cancel. Strong gates: exponents are differences of running sums up to
    # 64 * 40 in fp32, good to 2e-4.
    tolerance = 5e-4 if "a" in change or "A_log" in change else 2e-5
    assert error(o, expected) <= tolerance
    weight = rand(*o.shape, seed=9)
    actual = torch.autograd.grad(o, list(leaves.values()), weight.float())
    for x, y, name in zip(actual, torch.autograd.grad(expected, list(doubles.values()), weight), leaves, strict=True):
        assert x.isfinite().all(), name
        bound = 3 * tolerance * y.norm() + 1e-6 * weight.norm()
        if name == "A_log":  # the sum of dg g over the tokens: what rounds in dg counts |g| times
            bound += 1e-7 * reference.gates(*(doubles[n] for n in ("a", "b", "A_log", "dt_bias")))[0].abs().sum()
        assert (x.double() - y).norm() <= bound, name


def test_strided_views_are_read_in_place() -> None:
    """q, k, v and the gates as slices of projections laid out [T, B, D], as Megatron leaves them."""
    Hk, H, K, V = SMALL
    projected = rand(70, 2, 2 * Hk * K + H * V + 6, seed=1).float()
    ab = rand(70, 2, 2 * H, seed=2).float().transpose(0, 1)
    parts = projected.transpose(0, 1).split([Hk * K, Hk * K, H * V, 6], dim=-1)
    q, k = (x.unflatten(2, (Hk, K)) for x in parts[:2])
    v = parts[2].unflatten(2, (H, V))
    inputs = delta_inputs(2, 70, SMALL)
    A_log, dt_bias = inputs["A_log"].float(), inputs["dt_bias"].float()
    strided, _ = gated_delta.gated_delta_rule(q, k, v, *ab.chunk(2, dim=-1), A_log, dt_bias, backend="triton")
    dense = [x.contiguous() for x in (q, k, v, *ab.chunk(2, dim=-1))]
    contiguous, _ = gated_delta.gated_delta_rule(*dense, A_log, dt_bias, backend="triton")
    assert torch.equal(strided, contiguous)


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("shape", [(1, 1, 32, 48), (1, 2, 16, 16)], ids=["K32-V48", "grouped"])
def test_mixer_core(shape: Shape, packed: bool) -> None:
    Hk, H, K, V = shape
    lengths = (0, 1, 66, 2, 0)
    T = sum(lengths) if packed else 6
    compare(
        "mixer_core", mixer_inputs(1 if packed else 2, T, shape), num_key_heads=Hk, num_value_heads=H, key_dim=K,
        value_dim=V, cu_seqlens=cumulative(lengths) if packed else None,
    )  # fmt: skip


@pytest.mark.parametrize("W", [2, 4], ids=lambda W: f"W{W}")
def test_mixer_core_continues_a_document(W: int) -> None:
    """conv_halo, initial and final state, with gradients to both; documents shorter than the halo too."""
    Hk, H, K, V = SMALL
    lengths = (1, 5, 0, 2)
    inputs = mixer_inputs(1, sum(lengths), SMALL, W=W)
    D = 2 * Hk * K + H * V
    inputs |= {"conv_halo": rand(len(lengths), D, W - 1, seed=11), "initial_state": rand(4, H, K, V, seed=12)}
    compare(
        "mixer_core", inputs, num_key_heads=Hk, num_value_heads=H, key_dim=K, value_dim=V,
        cu_seqlens=cumulative(lengths), output_final_state=True, keep_intermediates=W == 2,
    )  # fmt: skip


def test_mixer_core_without_gate() -> None:
    Hk, H, K, V = SMALL
    sizes = {"num_key_heads": Hk, "num_value_heads": H, "key_dim": K, "value_dim": V}
    compare("mixer_core", mixer_inputs(1, 5, SMALL, gate=False), states_every=1, **sizes)


@pytest.mark.parametrize("function", ["gated_delta_rule", "mixer_core"])
def test_keeping_intermediates_changes_no_bit(function: str) -> None:
    """Every gradient has the bits of computing all again, and twice so: no backward writes to what is kept."""
    Hk, H, K, V = 1, 1, 16, 32
    lengths = (1, 0, 66)
    inputs = delta_inputs(1, sum(lengths), (Hk, H, K, V), N=len(lengths))
    sizes: dict[str, int] = {}
    if function == "mixer_core":
        halo = {"conv_halo": rand(len(lengths), 2 * Hk * K + H * V, 3, seed=11)}
        inputs = mixer_inputs(1, sum(lengths), (Hk, H, K, V)) | {"initial_state": inputs["initial_state"]} | halo
        sizes = {"num_key_heads": Hk, "num_value_heads": H, "key_dim": K, "value_dim": V}
    leaves = {name: x.float().requires_grad_() for name, x in inputs.items()}
    found = []
    for keep in (False, True):
        outputs = getattr(gated_delta, function)(
            **leaves, **sizes, cu_seqlens=cumulative(lengths), output_final_state=True, keep_intermediates=keep,
            backend="triton",
        )  # fmt: skip
        weights = [rand(*x.shape, seed=20 + i).float() for i, x in enumerate(outputs)]
        for _ in range(1 + keep):
            gradients = torch.autograd.grad(outputs, list(leaves.values()), weights, retain_graph=True)
            found.append({"o": outputs[0]} | dict(zip(leaves, gradients, strict=True)))
    for other in found[1:]:
        assert [name for name, x in found[0].items() if not torch.equal(x, other[name])] == []


def test_pieces_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row in three pieces, the last one of 13 tokens, begun from a state and a halo; whatever is kept."""
    Hk, H, K, V = shape = (1, 1, 16, 16)
    inputs = mixer_inputs(1, 64 * 2 + 13, shape)
    inputs |= {"conv_halo": rand(1, 2 * Hk * K + H * V, 3, seed=11), "initial_state": rand(1, H, K, V, seed=12)}
    inputs = {name: x.float() for name, x in inputs.items()}
    sizes = {"num_key_heads": Hk, "num_value_heads": H, "key_dim": K, "value_dim": V}
    count, whole = pieces.results(monkeypatch, 1, "mixer_core", inputs, **sizes)
    assert count == 1
    for kept in pieces.POLICIES:
        count, cut = pieces.results(monkeypatch, 3, "mixer_core", inputs, **sizes, **kept)
        assert count == 3
        assert [name for name, x in whole.items() if not torch.equal(x, cut[name])] == [], kept


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_shard_summary(packed: bool) -> None:
    lengths = (0, 66, 1, 3)
    inputs = delta_inputs(1, 70, (1, 1, 16, 32))
    del inputs["q"], inputs["initial_state"]
    compare("shard_summary", inputs, cu_seqlens=cumulative(lengths) if packed else None)


def test_shard_summary_has_launches_for_its_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU they are those of (K, V), though the backward carries K + V columns."""
    monkeypatch.setattr(configs, "current_key", lambda: ("sm_90", "3.6"))
    inputs = delta_inputs(1, 40, (1, 1, 64, 64))
    del inputs["q"], inputs["initial_state"]
    compare("shard_summary", inputs)


def test_decode_continues_the_mixer() -> None:
    """Tokens one by one after a prefix give what the whole sequence gives."""
    Hk, H, K, V = 1, 2, 16, 48
    inputs = {name: x.float() for name, x in mixer_inputs(1, 8, (Hk, H, K, V)).items()}
    sizes = {"num_key_heads": Hk, "num_value_heads": H, "key_dim": K, "value_dim": V, "backend": "triton"}
    whole, final = gated_delta.mixer_core(**inputs, **sizes, output_final_state=True)
    start = 5
    prefix = inputs | {name: inputs[name][:, :start] for name in ("qkvz", "ab")}
    _, state = gated_delta.mixer_core(**prefix, **sizes, output_final_state=True)
    assert state is not None and final is not None
    D = inputs["conv_weight"].shape[0]
    conv_state = inputs["qkvz"][:, start - 3 : start, :D].transpose(1, 2).contiguous()
    weights = [inputs[name] for name in ("conv_weight", "A_log", "dt_bias", "norm_weight")]
    for backend in ("triton", "reference"):
        conv, running = conv_state.clone(), state.clone()
        for t in range(start, 8):
            y = gated_delta.decode_step(
                inputs["qkvz"][:, t], inputs["ab"][:, t], conv, running, *weights, num_key_heads=Hk, backend=backend
            )
            assert error(y, whole[:, t]) <= FP32, (backend, t)
        assert error(running, final) <= FP32, backend


@pytest.mark.parametrize("gate", [True, False], ids=["gate", "no gate"])
def test_decode_token_by_token(gate: bool) -> None:
    """What test_decode_gpu.py asks of a GPU; in bf16 the interpreter rounds y towards zero."""
    for dtype, y_bound in ((torch.float32, FP32), (torch.bfloat16, 0.005)):
        decoding.check(decoding.Sequence(2, 4, (2, 4, 48, 48), gate, dtype, "cpu"), y_bound, FP32)


def every_other(x: Tensor) -> Tensor:
    """The same values, two apart in memory, with others between them."""
    return torch.stack([x, rand(*x.shape, seed=99).to(x)], dim=-1)[..., 0]


@pytest.mark.parametrize("function", wrong_calls.DIMENSIONS)
def test_any_strides(function: str) -> None:
    """Inputs and parameters are read where they are, or copied; never as if they were dense."""
    results = []
    for change in (lambda x: x, every_other):
        given = wrong_calls.legal(function)
        changed = {
            name: change(x)
            for name, x in given.items()
            if isinstance(x, Tensor) and x.is_floating_point() and name not in ("state", "conv_state")
        }
        assert changed.keys() > {"A_log", "dt_bias"}
        out = wrong_calls.call(function, given | changed, "triton")
        results.append([out] if isinstance(out, Tensor) else [x for x in out if x is not None])
    for dense, strided in zip(*results, strict=True):
        assert torch.equal(dense, strided)


@pytest.mark.parametrize("name", ["state", "conv_state"])
def test_what_a_step_updates_is_dense(name: str) -> None:
    given = wrong_calls.legal("decode_step")
    given[name] = every_other(given[name])
    before = given[name].clone()
    with pytest.raises(ValueError, match=rf"^{name} has strides .* must be contiguous"):
        wrong_calls.call("decode_step", given, "triton")
    assert torch.equal(given[name], before)


@pytest.mark.parametrize("function", wrong_calls.DIMENSIONS)
def test_what_is_changed_below_was_legal(function: str) -> None:
    wrong_calls.call(function, wrong_calls.legal(function), "triton")


@wrong_calls.CASES
def test_wrong_arguments(function: str, change: wrong_calls.Change, said: str) -> None:
    wrong_calls.check(function, change, said, "triton")


def test_backends_are_never_swapped(caplog: pytest.LogCaptureFixture) -> None:
    x = torch.zeros(1, dtype=torch.float32)
    assert gated_delta.choose_backend(None, x) == "reference"
    with pytest.raises(ValueError, match="must be one of"):
        gated_delta.choose_backend("cuda", x)
    with pytest.raises(RuntimeError, match="not installed"):
        gated_delta.choose_backend("fla", x)


@pytest.mark.parametrize("size", [8, 40, 272])
def test_head_sizes_that_are_refused(size: int) -> None:
    from megatron_hybrid.kernels.triton_tiles import split_dim

    with pytest.raises(ValueError, match="multiples of 16"):
        split_dim(size)


@pytest.mark.parametrize("size", range(16, 257, 16))
def test_split_covers_with_powers_of_two(size: int) -> None:
    from megatron_hybrid.kernels.triton_tiles import split_dim

    first, second = split_dim(size)
    assert first & (first - 1) == 0 and second & (second - 1) == 0
    assert size <= first + second <= max(32, size * 4 // 3)


def test_bytes_kept_for_the_backward() -> None:
    """What docs/recipe.md and docs/kernels.md count per token; what --recompute-modules gdn_norm_out leaves of it."""
    (Hk, H, K, V), B, T, size = SMALL, 1, 128, 4  # fp32 here; the docs count bf16
    x = {name: value.float().requires_grad_() for name, value in mixer_inputs(B, T, SMALL).items()}
    weights = {name: value for name, value in x.items() if name not in ("qkvz", "ab")}
    out_weight = rand(8, H * V, seed=9).float().requires_grad_()

    def kept(policy: str, recompute: bool = False) -> tuple[float, Tensor]:
        def core(qkvz: Tensor, ab: Tensor) -> Tensor:
            return gated_delta.mixer_core(
                qkvz, ab, **weights, num_key_heads=Hk, num_value_heads=H, key_dim=K, value_dim=V, backend="triton",
                **POLICIES[policy],
            )[0]  # fmt: skip

        saved: list[Tensor] = []
        ours = {value.untyped_storage().data_ptr() for value in (*weights.values(), out_weight)}
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            if recompute:
                recomputed = Recomputed(core, x["qkvz"], x["ab"])
                out = recomputed.output @ out_weight.t()
                recomputed.discard_until(out)
                saved += recomputed._inputs
            else:
                out = core(x["qkvz"], x["ab"]) @ out_weight.t()
        storages = {id_: s.nbytes() for s in (t.untyped_storage() for t in saved) if (id_ := s.data_ptr()) not in ours}
        out.square().sum().backward()
        gradients = torch.cat([value.grad.flatten() for value in (*x.values(), out_weight)])
        for value in (*x.values(), out_weight):
            value.grad = None
        return sum(storages.values()) / (B * T), gradients

    inputs = size * (2 * Hk * K + 2 * H * V + 2 * H)
    states = H * K * V / 64
    common = inputs + size * H * V + (64 * size + 20) * H
    some, expected = kept("every2")
    assert some == pytest.approx(common + 4 * states / 2, abs=1)
    less, found = kept("all", recompute=True)
    assert less == inputs
    assert torch.equal(found, expected)
    whole, found = kept("all")
    besides = size * (2 * Hk * K + H * K + 2 * H * V + 64 * H) + 8 * Hk  # q, k, scaled q, u, o, P; 1 / norms
    assert whole == pytest.approx(common + size * states + besides, abs=1)
    assert torch.equal(found, expected)
