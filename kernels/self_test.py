"""Two seconds before training: the kernels of this machine's GPU against the reference, forward and all gradients.

The same comparison decides for `tools/tune_kernels`. Its inputs are chosen so that rounding alone stays well below the
bounds: values with a mean add up instead of cancelling, an output near zero is not blown up by its norm, and the
gradient of y leans towards what more decay would do to y, since the gradients of A_log and dt_bias are sums over all
tokens that nearly cancel otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from megatron_hybrid.kernels import gated_delta

#: RMS error over RMS value in bf16, the bounds of the test suite; "evaluated": y of a run without gradients.
TOLERANCES = {
    "y": 0.005, "evaluated": 0.005, "o": 0.005, "final": 0.005,
    "qkvz": 0.007, "q": 0.007, "k": 0.007, "v": 0.007, "conv_weight": 0.007, "norm_weight": 0.007,
    "initial_state": 0.007, "ab": 0.015, "a": 0.015, "b": 0.015, "A_log": 0.015, "dt_bias": 0.015,
}  # fmt: skip
#: Of one token after the other: the state is fp32 throughout.
DECODED = {"y": 0.005, "state": 1e-4}
HEADS = 2
#: One state kept in so many chunks makes the row so long that a document has two stretches; from here on one does.
MOST_CHUNKS = 64

NORM_EPS = 1e-4

Leaves = dict[str, Any]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """RMS of the difference over RMS of the expected tensor; nan if either has one."""
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def documents(states_every: int) -> list[int]:
    """Lengths: two shorter than the convolution, one that fills a chunk in part, one of two stretches of states."""
    return [1, 3, 64 * min(max(states_every, 2), MOST_CHUNKS) + 66, 40]


class Inputs:
    """Of one mixer core with heads of two decay rates, in fp32 and rounded to `dtype`."""

    def __init__(self, K: int, V: int, device: torch.device, dtype: torch.dtype, lengths: Sequence[int]) -> None:
        self.generator = torch.Generator(device).manual_seed(0)
        self.device, self.dtype, self.lengths = device, dtype, lengths
        H, T, D = HEADS, sum(lengths), HEADS * (2 * K + V)
        qkvz = self.rand(1, T, D + H * V)
        qkvz[..., 2 * H * K : D] += 0.3
        self.leaves: Leaves = {
            "qkvz": qkvz.to(dtype),
            "ab": torch.cat([self.rand(1, T, H), self.rand(1, T, H) - 3], dim=-1).to(dtype),
            "conv_weight": (0.3 + 0.3 * self.rand(D, 4)).to(dtype),
            "A_log": torch.linspace(-3, 2, H, device=device),
            "dt_bias": torch.full((H,), -3.0, device=device),
            "norm_weight": (1 + 0.1 * self.rand(V)).to(dtype),
        }
        self.sizes = {"num_key_heads": H, "num_value_heads": H, "key_dim": K, "value_dim": V}

    def rand(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, device=self.device)

    @property
    def cu_seqlens(self) -> Tensor:
        return torch.tensor((0, *self.lengths), dtype=torch.int32, device=self.device).cumsum(0, dtype=torch.int32)


def leaning(forward: Callable[[Leaves], Tensor], leaves: Leaves, noise: Tensor) -> Tensor:
    """A gradient of forward's output [B, T, H, V]: noise, and as much of what more decay does to each head."""
    exact = {name: x.double() for name, x in leaves.items()}
    with torch.no_grad():
        change = forward(exact | {"dt_bias": exact["dt_bias"] + 0.5}) - forward(exact)
    return noise + change / change.square().mean((0, 1, 3), keepdim=True).sqrt()


def gradients(forward: Callable[[Leaves], Tensor], leaves: Leaves, dy: Tensor) -> Leaves:
    """y and the gradients of all leaves."""
    leaves = {name: x.detach().requires_grad_() for name, x in leaves.items()}
    y = forward(leaves)
    found = torch.autograd.grad(y, list(leaves.values()), dy.to(y.dtype))
    return {"y": y.detach()} | dict(zip(leaves, found, strict=True))


def refuse_other_bits(first: Leaves, second: Leaves) -> None:
    """Raises RuntimeError: a race, not rounding."""
    changing = [name for name, x in second.items() if not torch.equal(first[name], x)]
    if changing:
        raise RuntimeError(f"kernels gave different bits for the same input twice: {', '.join(changing)}")


def mixer_results(
    K: int, V: int, device: torch.device, dtype: torch.dtype = torch.bfloat16, *, packed: bool = True,
    lengths: Sequence[int] | None = None, **kept: Any,
) -> tuple[Leaves, Leaves]:  # fmt: skip
    """A mixer core's y, last states and all gradients: of the kernels in `dtype`, of the reference in fp64.

    packed: documents of `lengths`, else one of as many tokens, which the kernels go through in pieces. kept:
    states_every or keep_intermediates, as training has them: each is compiled into other kernels.

    Training asks for no last states, so they come from a further run, without gradients as an evaluation is.

    Raises RuntimeError when the same input gives different bits twice.
    """
    from megatron_hybrid.kernels.triton_problem import cut_finely

    inputs = Inputs(K, V, device, dtype, lengths or documents(kept.get("states_every", 0)))
    options: dict[str, Any] = inputs.sizes | {
        "cu_seqlens": inputs.cu_seqlens if packed else None,
        "norm_eps": NORM_EPS,
    }

    def forward(backend: str) -> Callable[[Leaves], Tensor]:
        def run(leaves: Leaves) -> Tensor:
            with cut_finely():
                y, _ = gated_delta.mixer_core(**leaves, **options, **kept, backend=backend)
            return y.unflatten(2, (HEADS, V))

        return run

    noise = inputs.rand(1, sum(inputs.lengths), HEADS, V)
    dy = leaning(forward("reference"), inputs.leaves, noise).to(dtype)
    first, second = (gradients(forward("triton"), inputs.leaves, dy) for _ in range(2))
    refuse_other_bits(first, second)
    exact = {name: x.double() for name, x in inputs.leaves.items()}
    expected = gradients(forward("reference"), exact, dy)
    for backend, leaves, found in (("triton", inputs.leaves, first), ("reference", exact, expected)):
        with torch.no_grad(), cut_finely():
            y, final = gated_delta.mixer_core(**leaves, **options, output_final_state=True, backend=backend)
        assert final is not None
        found |= {"evaluated": y, "final": final}
    return first, expected


def mixer_errors(K: int, V: int, device: torch.device, *dtype: torch.dtype, **options: Any) -> dict[str, float]:
    """Of `mixer_results`, by tensor."""
    actual, expected = mixer_results(K, V, device, *dtype, **options)
    return {name: relative_error(actual[name], x) for name, x in expected.items()}


def delta_rule_errors(
    K: int, V: int, device: torch.device, dtype: torch.dtype = torch.bfloat16, *, lengths: Sequence[int] | None = None
) -> dict[str, float]:
    """The same for the delta rule by itself, which normalises q and k in a kernel that no mixer launches: for
    `tools/tune_kernels` alone."""
    inputs = Inputs(K, V, device, dtype, lengths or documents(0))
    T = sum(inputs.lengths)
    leaves = inputs.leaves
    a, b = leaves["ab"].chunk(2, dim=-1)
    given: Leaves = {
        "q": (0.3 + inputs.rand(1, T, HEADS, K)).to(dtype),
        "k": (0.3 + inputs.rand(1, T, HEADS, K)).to(dtype),
        "v": (0.3 + inputs.rand(1, T, HEADS, V)).to(dtype),
        "a": a,
        "b": b,
        "A_log": leaves["A_log"],
        "dt_bias": leaves["dt_bias"],
    }

    def forward(backend: str) -> Callable[[Leaves], Tensor]:
        return lambda leaves: gated_delta.gated_delta_rule(**leaves, cu_seqlens=inputs.cu_seqlens, backend=backend)[0]

    do = leaning(forward("reference"), given, inputs.rand(1, T, HEADS, V)).to(dtype)
    first, second = (gradients(forward("triton"), given, do) for _ in range(2))
    refuse_other_bits(first, second)
    expected = gradients(forward("reference"), {name: x.double() for name, x in given.items()}, do)
    return {"o" if name == "y" else name: relative_error(first[name], x) for name, x in expected.items()}


def decode_errors(
    K: int, V: int, device: torch.device, dtype: torch.dtype = torch.bfloat16, tokens: int = 4
) -> dict[str, float]:
    """Errors of y and the state over some tokens of two rows, one after the other, in `dtype` against fp64."""
    inputs = Inputs(K, V, device, dtype, [2 * tokens])
    rows = {name: x for name, x in inputs.leaves.items() if name not in ("qkvz", "ab")}
    qkvz, ab = (inputs.leaves[name].unflatten(1, (2, tokens))[0] for name in ("qkvz", "ab"))
    window = inputs.rand(2, HEADS * (2 * K + V), 3).to(dtype)
    state = 0.1 * inputs.rand(2, HEADS, K, V)

    def run(backend: str, wanted: torch.dtype | None) -> Leaves:
        past, running = (x.clone() if wanted is None else x.to(wanted, copy=True) for x in (window, state))
        fixed: dict[str, Any] = {name: x if wanted is None else x.to(wanted) for name, x in rows.items()}
        y = [
            gated_delta.decode_step(
                qkvz[:, t].to(wanted or dtype), ab[:, t].to(wanted or dtype), past, running, **fixed,
                num_key_heads=HEADS, backend=backend,
            )
            for t in range(tokens)
        ]  # fmt: skip
        return {"y": torch.stack(y), "state": running}

    first, second = run("triton", None), run("triton", None)
    refuse_other_bits(first, second)
    return {name: relative_error(first[name], x) for name, x in run("reference", torch.float64).items()}


def beyond(errors: dict[str, float], bounds: dict[str, float] | None = None) -> str:
    """Names and sizes of the errors beyond their bounds, nan among them; empty when there is none."""
    bounds = TOLERANCES if bounds is None else bounds
    return "; ".join(
        f"{name} {error:.4f} (at most {bounds[name]})" for name, error in errors.items() if not error <= bounds[name]
    )


def errors_of_both(
    K: int, V: int, device: torch.device, dtype: torch.dtype = torch.bfloat16, **kept: Any
) -> dict[str, float]:
    """`mixer_errors` of one document and of several packed, the larger of both."""
    dense, packed = (mixer_errors(K, V, device, dtype, packed=packed, **kept) for packed in (False, True))
    return {name: max(error, packed[name], key=_nan_last) for name, error in dense.items()}


def _nan_last(error: float) -> float:
    """max of nan and a number depends on their order."""
    return error if error == error else float("inf")


def self_test(
    K: int, V: int, device: torch.device | None = None, dtype: torch.dtype = torch.bfloat16, **kept: Any
) -> dict[str, float]:
    """`errors_of_both`; raises RuntimeError when the kernels of these head sizes are not right on this device."""
    device = device or torch.device("cuda")
    errors = errors_of_both(K, V, device, dtype, **kept)
    if wrong := beyond(errors):
        where = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
        raise RuntimeError(
            f"Gated DeltaNet kernels fail their self-test on {where}, K = {K}, V = {V}, {dtype}: {wrong}. "
            "Train with the reference backend, and report GPU, driver and triton version"
        )
    return errors


@cache
def before_training(backend: str | None, dtype: torch.dtype, K: int, V: int, **kept: Any) -> dict[str, float]:
    """Gates training on a GPU: the kernels take this dtype, have a checked launch here, and pass their self-test.

    Returns the self-test's errors, none where there is nothing to check: without a GPU or with another backend.
    Raises ValueError for the dtype, RuntimeError where the kernels are not right.
    """
    if not torch.cuda.is_available() or backend not in (None, "triton"):
        return {}
    if dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"--gdn-backend triton: takes bf16 or fp16, not {dtype}; add --bf16, or take reference")
    return self_test(K, V, dtype=dtype, **kept)
