"""Token by token through `decode_step`, beside the whole sequence through the mixer core's reference in fp64."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from megatron_hybrid.kernels import gated_delta

WIDTH = 4  #: of the convolution


class Decoded(NamedTuple):
    y: Tensor  #: [B, T, H, V]
    state: Tensor  #: [B, H, K, V], after the last token
    conv_state: Tensor  #: [B, D, W - 1], after the last token


class Sequence:
    """Rows in the middle of a generation: inputs of T tokens, and the states that earlier tokens left.

    Args:
        shape: Hk, H, K, V.
        dtype: of what the projections give and of the weights; gates and state are fp32, as in the model.
    """

    def __init__(
        self, B: int, T: int, shape: tuple[int, int, int, int], gate: bool, dtype: torch.dtype, device: str
    ) -> None:
        self.shape = Hk, H, K, V = shape
        generator = torch.Generator().manual_seed(0)

        def rand(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator).to(device)

        D = 2 * Hk * K + H * V
        dt = torch.linspace(-6.9, -2.3, H, device=device).exp()
        self.qkvz, self.ab = rand(B, T, D + H * V * gate).to(dtype), rand(B, T, 2 * H).to(dtype)
        self.conv_state, self.state = rand(B, D, WIDTH - 1).to(dtype), 0.1 * rand(B, H, K, V)
        self.weights = (
            (0.3 * rand(D, WIDTH)).to(dtype),
            torch.linspace(0.05, 16, H, device=device).log(),
            dt + torch.log(-torch.expm1(-dt)),
            (1 + 0.1 * rand(V)).to(dtype),
        )

    def one_by_one(self, backend: str, allow_neg_eigval: bool = True) -> Decoded:
        """Rows of a token are views of the sequence: their stride is its length."""
        Hk, H, _, V = self.shape
        state, conv_state = self.state.clone(), self.conv_state.clone()
        tokens = zip(self.qkvz.unbind(1), self.ab.unbind(1), strict=True)
        y = [
            gated_delta.decode_step(
                qkvz, ab, conv_state, state, *self.weights, num_key_heads=Hk, allow_neg_eigval=allow_neg_eigval,
                backend=backend,
            )
            for qkvz, ab in tokens
        ]  # fmt: skip
        return Decoded(torch.stack(y, 1).unflatten(2, (H, V)), state, conv_state)

    def at_once(self, allow_neg_eigval: bool = True) -> Decoded:
        """In fp64."""
        Hk, H, K, V = self.shape
        D = self.conv_state.shape[1]
        tensors = (x.double() for x in (self.qkvz, self.ab, *self.weights))
        y, state = gated_delta.mixer_core(
            *tensors, num_key_heads=Hk, num_value_heads=H, key_dim=K, value_dim=V, allow_neg_eigval=allow_neg_eigval,
            conv_halo=self.conv_state.double(), initial_state=self.state.double(), output_final_state=True,
            backend="reference",
        )  # fmt: skip
        assert state is not None
        inputs = torch.cat([self.conv_state, self.qkvz[..., :D].transpose(1, 2)], dim=2)
        return Decoded(y.unflatten(2, (H, V)), state, inputs[..., 1 - WIDTH :])


def check(sequence: Sequence, y_bound: float, state_bound: float, backend: str = "triton", **options: bool) -> None:
    """Same bits twice; every head of y and of the last state, and every token of y, within bounds (RMS over RMS).

    The inputs that the convolution keeps are the last ones, bit for bit.
    """
    actual, again = (sequence.one_by_one(backend, **options) for _ in range(2))
    expected = sequence.at_once(**options)
    assert all(torch.equal(x, y) for x, y in zip(actual, again, strict=True)), "same input, other bits"
    assert torch.equal(actual.conv_state, expected.conv_state)
    parts = {
        "head of y": (actual.y, expected.y, 2, y_bound),
        "token of y": (actual.y, expected.y, 1, y_bound),
        "row of y": (actual.y, expected.y, 0, y_bound),
        "head of the state": (actual.state, expected.state, 1, state_bound),
    }
    problems = []
    for what, (x, right, dim, bound) in parts.items():
        pairs = zip(x.double().unbind(dim), right.unbind(dim), strict=True)
        errors = [((a - e).norm() / e.norm()).item() for a, e in pairs]
        worst = max(range(len(errors)), key=lambda i: errors[i] if errors[i] == errors[i] else float("inf"))
        if not errors[worst] <= bound:
            problems.append(f"{what} {worst}: {errors[worst]:.2e}, at most {bound}")
    assert not problems, "; ".join(problems)
