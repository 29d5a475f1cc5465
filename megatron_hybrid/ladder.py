"""The scaling ladder as presets: `ladder-SIZE-KIND`, 60M to 1B in six arrangements of layers.

Every number but the sizes follows from N, the parameters without the input embedding, by OLMo-core's rules. Sizes,
placement of attention and the counts of N that the tests compare with: OLMo-core's ladder scripts.
"""

from __future__ import annotations

from collections.abc import Mapping

from megatron_hybrid.flops import OLMO_VOCABULARY_ROWS, parameters

#: {size: (hidden, heads, layers, FFN width)}
SIZES = {
    "60m": (384, 8, 8, 1536),
    "100m": (512, 8, 12, 2048),
    "190m": (768, 12, 12, 3072),
    "370m": (1024, 16, 16, 4096),
    "600m": (1280, 16, 16, 5120),
    "760m": (1536, 16, 16, 6144),
    "1b": (2048, 16, 16, 8192),
}

KINDS = ("3to1", "1to1", "7to1", "middle", "gdn", "transformer")

SEQUENCE_TOKENS = 8192

#: Global batches are rounded to so many sequences, for 8 data-parallel ranks of one sequence each.
BATCH_MULTIPLE = 8

#: A period of WSD-S ends at so many times 20·N tokens.
PERIODS = (0.5, 1, 2, 4, 8)


def pattern(kind: str, layers: int) -> str:
    """`G` and `*`. In hybrids the last layer is attention always; `middle`: a quarter of the layers in the middle."""
    if kind in ("gdn", "transformer"):
        return ("G" if kind == "gdn" else "*") * layers
    if kind == "middle":
        count = layers // 4
        first = (layers - count) // 2
        attention = {*range(first, first + count)}
    else:
        period = int(kind[0]) + 1
        attention = {*range(period - 1, layers, period)}
    return "".join("*" if i in attention | {layers - 1} else "G" for i in range(layers))


def batch_tokens(n: int) -> int:
    """The batch that a model of N parameters should have; presets round it to whole sequences."""
    return round(2048 * 160 * (n / 108e6) ** (2 / 3))


def learning_rate(n: int) -> float:
    return 0.0047 / 2 * (n / 108e6) ** (-1 / 3)


def _preset(size: str, kind: str) -> Mapping[str, str | int | float | bool | list[str]]:
    hidden, heads, layers, ffn = SIZES[size]
    model: dict[str, str | int | float | bool | list[str]] = {
        "hybrid-layer-pattern": pattern(kind, layers),
        "num-layers": layers,
        "hidden-size": hidden,
        "ffn-hidden-size": ffn,
        "num-attention-heads": heads,
        "kv-channels": hidden // heads,
        "seq-length": SEQUENCE_TOKENS,
        "max-position-embeddings": SEQUENCE_TOKENS,
        "spec": ["megatron_hybrid.layer_specs.olmo_hybrid", "olmo_hybrid_stack_spec"],
    }
    if kind != "transformer":
        model |= {
            "linear-num-key-heads": heads,
            "linear-num-value-heads": heads,
            "linear-key-head-dim": 128,  # three quarters of hidden / heads, rounded up to a multiple of 128
            "linear-value-head-dim": 256,
            "linear-conv-kernel-dim": 4,
        }
    flags = [f"--{name}={value}" for name, value in model.items() if not isinstance(value, list)]
    n = parameters([*flags, "--swiglu"]) - OLMO_VOCABULARY_ROWS * hidden
    sequences = max(1, round(batch_tokens(n) / SEQUENCE_TOKENS / BATCH_MULTIPLE)) * BATCH_MULTIPLE
    batch = sequences * SEQUENCE_TOKENS
    ends = [round(share * 20 * n / batch) for share in PERIODS]
    return {
        **model,
        "lr": learning_rate(n),
        "min-lr": 0.0,
        "lr-decay-style": "WSD",
        "lr-wsd-decay-style": "linear",
        "lr-wsd-decay-iters": round(0.1 * (ends[-1] - ends[-2])),
        "wsds-periods": ",".join(map(str, ends)),
        "lr-warmup-iters": round(n / batch),
        "train-iters": ends[-1],
        "global-batch-size": sequences,
        "micro-batch-size": 1,
        "adam-beta2": 0.95 if batch >= 524288 else 0.99,
    }


def ladder(family: Mapping, training: Mapping) -> dict[str, Mapping]:
    """The presets. family, training: what all of them share."""
    return {f"ladder-{size}-{kind}": {**family, **training, **_preset(size, kind)} for size in SIZES for kind in KINDS}
