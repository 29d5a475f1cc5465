"""FLOPs per token of every part of an OLMo-Hybrid, from sizes alone.

Letters: D hidden, F FFN width, H value heads (Hk key heads), K key dim, V value dim, C chunk, W convolution width;
h attention heads (hk key/value heads), d their dim; T sequence length; R rows of the output layer.

All counts are forward, of multiplications and additions (a product of [m, k] and [k, n] is 2·m·k·n), of the whole
model, over all ranks. Backward is counted as `BACKWARD` = 2 times forward: one product for the input's gradient, one
for the weight's. Not counted: norms, activations, rotary embedding, gates, residual additions.
"""

from __future__ import annotations

import argparse
import ast
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

#: Backward FLOPs over forward FLOPs. Exact for linears; the chunked delta rule's backward takes 2.3 times its forward,
#: attention's 2.5 where scores are computed again.
BACKWARD = 2

#: Tokens in a chunk of the gated delta rule.
CHUNK = 64

#: Rows of OLMo's embedding and output layer: 100,278 tokens, padded.
OLMO_VOCABULARY_ROWS = 100352

#: Elementwise work of the cross entropy, per logit: maximum, subtraction, exponential, sum.
_LOSS_PER_LOGIT = 4


class SizeError(ValueError):
    """A size that is missing or cannot be read; the message names its flag."""


@dataclass(frozen=True)
class Sizes:
    """What FLOPs depend on. window: (layers it applies to as Megatron's skip frequency, keys a query sees) or None."""

    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    gdn_key_heads: int
    gdn_value_heads: int
    key_dim: int
    value_dim: int
    conv_width: int
    vocabulary_rows: int = OLMO_VOCABULARY_ROWS
    gated_mlp: bool = True
    output_gate: bool = True
    window_keys: int | None = None
    window_skip: int | tuple[int, ...] | None = None

    @classmethod
    def from_args(cls, args: argparse.Namespace, vocabulary_rows: int | None = None) -> Sizes:
        """Sizes of a namespace with Megatron's names. `vocabulary_rows` replaces the namespace's padded_vocab_size.

        Raises:
            SizeError: hidden size, heads or FFN width are missing; with a `G` in the pattern, Gated DeltaNet's sizes.
        """
        gdn = "G" in (args.hybrid_layer_pattern or "")

        def size(name: str, needed: bool = True) -> int:
            value = getattr(args, name)
            if needed and not value:
                raise SizeError(f"--{name.replace('_', '-')}: missing; FLOPs need it")
            return value or 0

        heads, window = size("num_attention_heads"), args.window_size
        return cls(
            hidden=size("hidden_size"),
            ffn=size("ffn_hidden_size"),
            heads=heads,
            kv_heads=size("num_query_groups") if args.group_query_attention else heads,
            head_dim=args.kv_channels or args.hidden_size // heads,
            gdn_key_heads=size("linear_num_key_heads", gdn),
            gdn_value_heads=size("linear_num_value_heads", gdn),
            key_dim=size("linear_key_head_dim", gdn),
            value_dim=size("linear_value_head_dim", gdn),
            conv_width=size("linear_conv_kernel_dim", gdn),
            vocabulary_rows=vocabulary_rows or args.padded_vocab_size or OLMO_VOCABULARY_ROWS,
            gated_mlp=args.swiglu,
            output_gate=args.gdn_output_gate,
            window_keys=window[0] + 1 if window else None,
            window_skip=_skip(args.window_attn_skip_freq),
        )

    @classmethod
    def from_flags(cls, flags: Sequence[str]) -> Sizes:
        """Sizes of a flat list of flags, before Megatron is imported; other flags are ignored.

        The rows are --padded-vocab-size, or --vocab-size and one more for the end of document, rounded up to
        --make-vocab-size-divisible-by times TP as Megatron does; without either, OLMo's 100,352.
        """
        args = _peek(flags)
        rows = args.padded_vocab_size
        if rows is None and args.vocab_size:
            multiple = args.make_vocab_size_divisible_by * args.tensor_model_parallel_size
            rows = -(-(args.vocab_size + 1) // multiple) * multiple
        return cls.from_args(args, rows)

    def windowed(self, layer_number: int) -> bool:
        """Whether an attention layer (counted from 1 over all layers) has the sliding window; Megatron's rule."""
        if self.window_keys is None:
            return False
        if self.window_skip is None:
            return True
        if isinstance(self.window_skip, int):
            return layer_number % self.window_skip != 0
        return bool(self.window_skip[layer_number - 1])


def parameters(flags: Sequence[str]) -> int:
    """Parameters of the model that a flat list of flags describes, both vocabulary matrices included.

    The vocabulary's rows are as `Sizes.from_flags` takes them.
    """
    return model_parameters(Sizes.from_flags(flags), (_peek(flags).hybrid_layer_pattern or "").replace("|", ""))


def model_parameters(s: Sizes, pattern: str) -> int:
    """Parameters of a model of these sizes, one layer per symbol; QK-norm is over the full width."""
    keys, values = s.gdn_key_heads * s.key_dim, s.gdn_value_heads * s.value_dim
    projections = 2 * keys + (3 if s.output_gate else 2) * values + 2 * s.gdn_value_heads
    gdn = s.hidden * projections + s.conv_width * (2 * keys + values) + 2 * s.gdn_value_heads + s.value_dim
    heads, groups = s.heads * s.head_dim, s.kv_heads * s.head_dim
    attention = 2 * s.hidden * (heads + groups) + heads + groups
    mlp_and_norms = (3 if s.gated_mlp else 2) * s.hidden * s.ffn + 2 * s.hidden
    layers = sum({"G": gdn, "*": attention}[symbol] + mlp_and_norms for symbol in pattern)
    return layers + s.hidden + 2 * s.vocabulary_rows * s.hidden


def _skip(value: Any) -> int | tuple[int, ...] | None:
    if value is None or isinstance(value, int):
        return value
    return tuple(value)


def _skip_frequency(text: str) -> int | tuple[int, ...]:
    try:
        value = ast.literal_eval(text)
        return value if isinstance(value, int) else tuple(int(item) for item in value)
    except (ValueError, SyntaxError, TypeError):
        raise SizeError(
            f"--window-attn-skip-freq {text}: write an integer or a plain list of 0 and 1, as [1,1,1,0]"
        ) from None


def _window(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.strip("()").split(","))


def _peek(flags: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--hybrid-layer-pattern")
    for name in (
        *("hidden-size", "ffn-hidden-size", "num-attention-heads", "num-query-groups", "kv-channels"),
        *("linear-num-key-heads", "linear-num-value-heads", "linear-key-head-dim", "linear-value-head-dim"),
        *("linear-conv-kernel-dim", "vocab-size", "padded-vocab-size"),
    ):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--make-vocab-size-divisible-by", type=int, default=128)
    parser.add_argument("--tensor-model-parallel-size", type=int, default=1)
    parser.add_argument("--window-size", type=_window)
    parser.add_argument("--window-attn-skip-freq", type=str)
    parser.add_argument("--swiglu", action="store_true")
    parser.add_argument("--group-query-attention", action="store_true")
    parser.add_argument("--gdn-output-gate", action=argparse.BooleanOptionalAction, default=True)
    try:
        args = parser.parse_known_args(list(flags))[0]
    except argparse.ArgumentError as error:
        raise SizeError(str(error)) from None
    if args.window_attn_skip_freq is not None:
        args.window_attn_skip_freq = _skip_frequency(args.window_attn_skip_freq)
    return args


def mean_keys(sequence_tokens: int, window_keys: int | None = None) -> float:
    """Keys a query sees on average: itself and all before it, at most `window_keys` of them.

    (w(w+1)/2 + (T − w)·w) / T with w = min(T, window); without a window (T + 1)/2, the causal half of the square.
    """
    window = min(sequence_tokens, window_keys or sequence_tokens)
    return (window * (window + 1) / 2 + (sequence_tokens - window) * window) / sequence_tokens


def gdn_projections(s: Sizes) -> int:
    """2·D·(2·Hk·K + 2·H·V + 2·H) in, for q, k, v, z and a, b; 2·H·V·D out. Without the output gate one H·V less."""
    values = s.gdn_value_heads * s.value_dim
    into = 2 * s.gdn_key_heads * s.key_dim + (2 if s.output_gate else 1) * values + 2 * s.gdn_value_heads
    return 2 * s.hidden * (into + values)


def gdn_convolution(s: Sizes) -> int:
    """2·W·(2·Hk·K + H·V): one depthwise tap a channel."""
    return 2 * s.conv_width * (2 * s.gdn_key_heads * s.key_dim + s.gdn_value_heads * s.value_dim)


def gdn_rule(s: Sizes, chunk: int = CHUNK) -> int:
    """H·(6·K·V + 4·C·(K + V) + 2·C²): what the chunked forward needs.

    Per chunk and head: three products with the K×V state (K·S, Q·S and the update, 2·C·K·V each), two C×C by V
    (T·Y, P·U, 2·C²·V each), two that give a C×C (K·Kᵀ, Q·Kᵀ, 2·C²·K each) and the triangular inverse, counted 2·C³;
    the sum is divided by C. C×C matrices count in full, as kernels compute them, though half of each is zero.
    7B: 12.3 MFLOP per chunk and head. The recurrence token by token would be 8·H·K·V.
    """
    return s.gdn_value_heads * (6 * s.key_dim * s.value_dim + 4 * chunk * (s.key_dim + s.value_dim) + 2 * chunk * chunk)


def attention_projections(s: Sizes) -> int:
    """2·D·d·(h + 2·hk) in, 2·h·d·D out."""
    return 2 * s.hidden * s.head_dim * (2 * s.heads + 2 * s.kv_heads)


def attention_core(s: Sizes, sequence_tokens: int, windowed: bool = False) -> float:
    """4·h·d·(mean keys): scores and their product with the values, of the keys a query may see only."""
    return 4 * s.heads * s.head_dim * mean_keys(sequence_tokens, s.window_keys if windowed else None)


def mlp(s: Sizes) -> int:
    """6·D·F gated (gate, up, down), 4·D·F otherwise."""
    return (6 if s.gated_mlp else 4) * s.hidden * s.ffn


def layer_parts(s: Sizes, symbol: str, sequence_tokens: int, windowed: bool = False) -> dict[str, float]:
    """Forward FLOPs per token of one layer, `G` or `*`, by part."""
    if symbol == "G":
        mixer: dict[str, float] = {
            "gdn_proj": gdn_projections(s),
            "gdn_conv": gdn_convolution(s),
            "gdn_rule": gdn_rule(s),
        }
    else:
        mixer = {
            "attn_proj": attention_projections(s),
            "attn_core": attention_core(s, sequence_tokens, windowed),
        }
    return {**mixer, "mlp": mlp(s)}


def embedding_parts(s: Sizes) -> dict[str, float]:
    """0 FLOPs: the embedding is a lookup of 2·D bytes a token in bf16, and a scatter of as much in backward.

    At 7B that is 7.7 kB a token, some microseconds of a microbatch; a layer moves hundreds of times as much.
    """
    return {"embedding": 0}


def output_parts(s: Sizes) -> dict[str, float]:
    """The output layer, 2·D·R, and the loss, 4·R elementwise."""
    return {"output": 2 * s.hidden * s.vocabulary_rows, "loss": _LOSS_PER_LOGIT * s.vocabulary_rows}


def model_parts(s: Sizes, pattern: str, sequence_tokens: int) -> Mapping[str, float]:
    """Forward FLOPs per token of the whole model, by part; `|` in the pattern is ignored."""
    total: dict[str, float] = {}
    layers = enumerate(pattern.replace("|", ""), start=1)
    parts = [layer_parts(s, symbol, sequence_tokens, s.windowed(number)) for number, symbol in layers]
    for each in (*parts, embedding_parts(s), output_parts(s)):
        for name, value in each.items():
            total[name] = total.get(name, 0) + value
    return total


def training_flops_per_token(s: Sizes, pattern: str, sequence_tokens: int) -> float:
    """Forward and backward FLOPs per token. Recomputed activations do not count (they are no part of the model)."""
    return (1 + BACKWARD) * sum(model_parts(s, pattern, sequence_tokens).values())
