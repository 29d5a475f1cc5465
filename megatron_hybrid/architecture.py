"""Megatron's flags of another model than these layers build: they would be ignored, or be lost in an export."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

#: Specs that are built anew with the plugin's flags; any other --spec is taken as it is.
OWN_SPECS = (
    ("megatron_hybrid.layer_specs.olmo_hybrid", "olmo_hybrid_stack_spec"),
    ("megatron_hybrid.layer_specs.olmo3", "olmo3_stack_spec"),
)

#: Without these Megatron's defaults are another model.
_REQUIRED = {
    "swiglu": "the MLPs here are gated by SiLU",
    "disable-bias-linear": "no linear here has a bias",
    "untie-embeddings-and-output-weights": "embedding and output layer are two matrices here",
}

#: {flag whose value must be given: an example, Megatron's default, which is none of these models'}
_REQUIRED_VALUE = {
    "hidden-dropout": ("0", "0.1"),
    "attention-dropout": ("0", "0.1"),
    "norm-epsilon": ("1e-6", "1e-5"),
    "rotary-base": ("500000", "10000"),
}

#: Flags without a value.
_ABSENT = (
    *("qk-layernorm", "qk-l2-norm", "use-rope-scaling", "rotary-interleaved", "multi-latent-attention", "use-mup"),
    *("attention-output-gate", "add-qkv-bias", "apply-layernorm-1p", "apply-residual-connection-post-layernorm"),
    *("quick-geglu", "squared-relu", "openai-gelu", "no-yarn-correction-range-round-to-int"),
)

#: {flag with a value: what is legal}; None: nothing is.
_LEGAL: dict[str, tuple[str, ...] | None] = {
    "normalization": ("RMSNorm",),
    "position-embedding-type": ("rope", "yarn", "none"),
    "softmax-type": ("vanilla",),
    "experimental-attention-variant": None,
    "activation-func-clamp-value": None,
    "no-rope-freq": None,
    "rope-scaling-factor": None,
    "heterogeneous-layers-config-path": None,
    "heterogeneous-layers-config-encoded-json": None,
}

#: {flag with a number: the only one}
_NUMBER = {
    "rotary-percent": 1.0,
    "rotary-seq-len-interpolation-factor": 1.0,
    "glu-linear-offset": 0.0,
    "num-experts": 0.0,
    "mtp-num-layers": 0.0,
    "mscale": 1.0,
    "mscale-all-dim": 0.0,
}

_DROPOUT = ("hidden-dropout", "attention-dropout")

_INSTEAD = {
    **dict.fromkeys(("qk-layernorm", "qk-l2-norm"), "; choose with --qk-norm-width full|head|none"),
    **dict.fromkeys(
        ("use-rope-scaling", "rope-scaling-factor", "rotary-seq-len-interpolation-factor"),
        "; to stretch positions take --position-embedding-type yarn",
    ),
}

_YARN = ("rotary-scaling-factor", "yarn-original-max-position-embeddings", "yarn-beta-fast", "yarn-beta-slow")


def problems(flags: Sequence[str]) -> Iterator[str]:
    """One line for each flag that is missing, or that these layers do not have; nothing with a --spec of one's own."""
    given = given_flags(flags)
    if "spec" in given and tuple(given["spec"]) not in OWN_SPECS:
        return
    yield from _missing(given)
    for name, values in given.items():
        value = " ".join(values)
        flag = f"--{name} {value}".rstrip()
        none = f"{flag}: these layers have no such thing, it would be ignored or lost in an export; leave it out"
        if name in _ABSENT or (name in _NUMBER and number(value) != _NUMBER[name]):
            yield none + _INSTEAD.get(name, "")
        elif name in _DROPOUT and number(value) != 0:
            yield f"{flag}: these models have no dropout; legal: 0"
        elif name in _LEGAL and value not in (_LEGAL[name] or ()):
            legal = ", ".join(_LEGAL[name] or ())
            yield f"{flag}: legal here: {legal}" if legal else none + _INSTEAD.get(name, "")
    stretched = [name for name in _YARN if name in given]
    if stretched and given.get("position-embedding-type") != ["yarn"]:
        yield (
            f"--{stretched[0]} {' '.join(given[stretched[0]])}: does nothing without --position-embedding-type yarn; "
            "add it, or leave this out"
        )


def _missing(given: dict[str, list[str]]) -> Iterator[str]:
    for name, reason in _REQUIRED.items():
        if name not in given:
            yield f"--{name}: missing; {reason}, and Megatron's default is another model: add it"
    if "normalization" not in given:
        yield "--normalization: missing; add --normalization RMSNorm (Megatron's default is LayerNorm)"
    if not {"position-embedding-type", "use-rotary-position-embeddings"} & given.keys():
        yield "--position-embedding-type: missing; add rope, yarn or none (Megatron's default is learned_absolute)"
    for name, (example, default) in _REQUIRED_VALUE.items():
        if name not in given and (name != "rotary-base" or given.get("position-embedding-type") != ["none"]):
            yield f"--{name}: missing; add it, as --{name} {example} (Megatron's default is {default})"
    groups = given.get("num-query-groups")
    if groups and groups != given.get("num-attention-heads") and "group-query-attention" not in given:
        yield f"--num-query-groups {' '.join(groups)}: ignored as it is; add --group-query-attention"


def given_flags(flags: Sequence[str]) -> dict[str, list[str]]:
    """{flag without its dashes: its values}, in order; the last of a flag given twice, as argparse."""
    found: dict[str, list[str]] = {}
    values: list[str] = []
    for word in flags:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            found.pop(name, None)
            found[name] = values = [value] * bool(equals)
        else:
            values.append(word)
    return found


def number(text: str) -> float | None:
    """None where it is none, as Megatron's parser will say."""
    try:
        return float(text)
    except ValueError:
        return None
