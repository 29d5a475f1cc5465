"""Generation, one token at a time: the layers' own work and state, captured in a CUDA graph. No sampling, no tokenizer.

Letters: B rows (1), D hidden, F FFN width, H heads, K, V key and value dims of Gated DeltaNet, d head dim of attention,
T tokens of context.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from megatron_hybrid.kernels.gated_delta import decode_step
from megatron_hybrid.tools.gpu_bench.harness import synchronize

Layer = Callable[[torch.Tensor], torch.Tensor]


class Decoder:
    """Random weights in bf16 and the state of `context` tokens: what a token costs depends on sizes alone."""

    def __init__(self, args: argparse.Namespace, context: int) -> None:
        self.args, self.context = args, context
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.state_bytes = 0
        pattern = args.hybrid_layer_pattern
        self.layers = [self._gdn() if s == "G" else self._attention(n) for n, s in enumerate(pattern, start=1)]
        self.output = self._weight(args.padded_vocab_size, args.hidden_size)
        self.x = torch.randn(1, args.hidden_size, device=self.device, dtype=torch.bfloat16)

    def _weight(self, *shape: int) -> torch.Tensor:
        return 0.02 * torch.randn(*shape, device=self.device, dtype=torch.bfloat16)

    def _state(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        state = torch.randn(*shape, device=self.device, dtype=dtype)
        self.state_bytes += state.numel() * state.element_size()
        return state

    def _mlp(self) -> Layer:
        args = self.args
        up, down = self._weight(2 * args.ffn_hidden_size, args.hidden_size), None
        down = self._weight(args.hidden_size, args.ffn_hidden_size)

        def mlp(x: torch.Tensor) -> torch.Tensor:
            gate, value = F.linear(x, up).chunk(2, dim=-1)
            return F.linear(F.silu(gate) * value, down)

        return self._with_norm(mlp)

    def _with_norm(self, inner: Layer) -> Layer:
        weight = torch.ones(self.args.hidden_size, device=self.device, dtype=torch.bfloat16)
        return lambda x: x + F.rms_norm(inner(x), (x.shape[-1],), weight, 1e-6)

    def _gdn(self) -> Layer:
        a = self.args
        H, K, V, D = a.linear_num_value_heads, a.linear_key_head_dim, a.linear_value_head_dim, a.hidden_size
        channels = 2 * a.linear_num_key_heads * K + H * V
        into, ab, out = self._weight(channels + H * V, D), self._weight(2 * H, D), self._weight(D, H * V)
        window = self._state(1, channels, a.linear_conv_kernel_dim - 1)
        state = self._state(1, H, K, V, dtype=torch.float32)
        conv, norm = self._weight(channels, 1, a.linear_conv_kernel_dim), torch.ones_like(self._weight(V))
        A_log, dt_bias = torch.zeros(H, device=self.device), torch.full((H,), -3.0, device=self.device)

        def mixer(x: torch.Tensor) -> torch.Tensor:
            y = decode_step(
                F.linear(x, into),
                F.linear(x, ab),
                window,
                state,
                conv,
                A_log,
                dt_bias,
                norm,
                num_key_heads=a.linear_num_key_heads,
            )
            return F.linear(y, out)

        first, second = self._with_norm(mixer), self._mlp()
        return lambda x: second(first(x))

    def _attention(self, number: int) -> Layer:
        from megatron.core.transformer.utils import is_layer_window_attention

        a = self.args
        heads, d, D = a.num_attention_heads, a.kv_channels, a.hidden_size
        windowed = is_layer_window_attention(a.window_size, a.window_attn_skip_freq, number)
        keys = min(self.context, a.window_size[0] + 1) if windowed else self.context
        qkv, out = self._weight(3 * heads * d, D), self._weight(D, heads * d)
        k, v = (self._state(1, heads, keys, d) for _ in range(2))

        def mixer(x: torch.Tensor) -> torch.Tensor:
            query, key, value = F.linear(x, qkv).view(1, 3, heads, d).unbind(1)
            k[:, :, -1], v[:, :, -1] = key, value
            y = F.scaled_dot_product_attention(query[:, :, None], k, v)
            return F.linear(y.reshape(1, heads * d), out)

        first, second = self._with_norm(mixer), self._mlp()
        return lambda x: second(first(x))

    def token(self) -> torch.Tensor:
        x = self.x
        for layer in self.layers:
            x = layer(x)
        return F.linear(x, self.output)

    @torch.no_grad()
    def measure(self, tokens: int = 50) -> list[float]:
        """Milliseconds of each token."""
        run: Callable[[], Any] = self.token
        for _ in range(3):
            run()
        if torch.cuda.is_available():
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.token()
            run = graph.replay
        times = []
        for _ in range(tokens):
            synchronize()
            began = time.perf_counter()
            run()
            synchronize()
            times.append((time.perf_counter() - began) * 1e3)
        return times
