"""The map between released Hugging Face OLMo-Hybrid tensors and this project's Megatron torch_dist tensors.

Pure data and pure functions, no files and no Megatron: `tensor_rules` lists, for a configuration, every Megatron
tensor with the Hugging Face tensors it is made of and the layout that relates them; `to_hf` and `to_megatron` apply
one rule in the two directions and are exact inverses. The names are those of the released checkpoint on disk (523
tensors at 7B), not those of transformers' modules, which differ (fused conv, renamed norms).

Shape letters: D hidden, F ffn, H attention heads, G key/value groups, hd attention head dim,
K key dim and V value dim of Gated DeltaNet, Hk and Hv its key and value heads, Vp padded vocabulary rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from enum import Enum
from typing import TYPE_CHECKING, Any

from megatron_hybrid.checkpoint.sidecar import FORMAT
from megatron_hybrid.tools.cli import ToolError

if TYPE_CHECKING:
    from torch import Tensor

Shape = tuple[int, ...]
LAYER_TYPES = {"G": "linear_attention", "*": "full_attention"}
SLIDING = "sliding_attention"
# What transformers' two models can express, key by key; anything else has no Hugging Face form.
REQUIRED_OPTIONS = {"model_type": "olmo_hybrid", "norm_placement": "released", "qk_norm": "full", "output_gate": True}
OPTIONAL_OPTIONS = {"gdn_norm_eps": 1e-5}
ATTENTION, MLP = "self_attention.", "mlp."  # prefixes inside a Megatron layer

#: Keys of `ModelConfig.rope_scaling`, transformers' names.
YARN = {"rope_type", "factor", "original_max_position_embeddings", "beta_fast", "beta_slow"}


@dataclass(frozen=True)
class ModelConfig:
    """A model's dimensions and options, with the keys of the sidecar that the trainer writes beside its weights.

    `vocab_size` is the true vocabulary rounded up to a multiple of 128, whatever tensor parallelism padded the
    stored tensors to; `rope_theta` None means no position embedding at all (NoPE). `window_size` (tokens to the left
    and to the right, the query not counted) holds in all attention layers but every `window_attn_skip_freq`th.
    `rope_scaling` is YaRN in transformers' words, with the keys of `YARN`.
    A pattern without `G` is the transformer baseline, OLMo 3, whose `linear_` sizes mean nothing.
    """

    hybrid_layer_pattern: str
    vocab_size: int
    true_vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    linear_num_key_heads: int
    linear_num_value_heads: int
    linear_key_head_dim: int
    linear_value_head_dim: int
    linear_conv_kernel_dim: int
    linear_allow_neg_eigval: bool
    rms_norm_eps: float
    rope_theta: float | None
    max_position_embeddings: int
    eos_token_id: int | None
    pad_token_id: int | None
    window_size: tuple[int, int] | None = None
    window_attn_skip_freq: int | None = None
    rope_scaling: dict[str, Any] | None = None

    @property
    def is_hybrid(self) -> bool:
        """Whether there are Gated DeltaNet layers; without, it is an OLMo 3."""
        return "G" in self.hybrid_layer_pattern

    @property
    def layer_types(self) -> list[str]:
        """Hugging Face's name for each layer, in order; `|` marks pipeline stages and is no layer."""
        symbols = self.hybrid_layer_pattern.replace("|", "")
        return [
            SLIDING if symbol == "*" and self.has_window(index) else LAYER_TYPES[symbol]
            for index, symbol in enumerate(symbols)
        ]

    def has_window(self, layer: int) -> bool:
        """Whether attention in a layer, counted from 0, sees `window_size` only: Megatron's rule."""
        freq = self.window_attn_skip_freq
        return self.window_size is not None and (freq is None or (layer + 1) % freq != 0)


OLMO_HYBRID_7B = ModelConfig(
    hybrid_layer_pattern="GGG*" * 8,
    vocab_size=100352,
    true_vocab_size=100278,
    hidden_size=3840,
    intermediate_size=11008,
    num_attention_heads=30,
    num_key_value_heads=30,
    head_dim=128,
    linear_num_key_heads=30,
    linear_num_value_heads=30,
    linear_key_head_dim=96,
    linear_value_head_dim=192,
    linear_conv_kernel_dim=4,
    linear_allow_neg_eigval=True,
    rms_norm_eps=1e-6,
    rope_theta=None,
    max_position_embeddings=65536,
    eos_token_id=100257,
    pad_token_id=100277,
)


class Layout(Enum):
    """How the Hugging Face tensors of a rule make its Megatron tensor."""

    SAME = "the same tensor"
    VOCAB_ROWS = "the same rows; Megatron's tensor may have padding rows after them"
    STACKED_ROWS = "rows of the first, then rows of the second"
    GROUPED_QKV = "per key/value group: query rows of its heads, its key rows, its value rows"


@dataclass(frozen=True)
class TensorRule:
    """One Megatron tensor and the Hugging Face tensors it consists of.

    `hf` gives names and shapes in the order of the layout; `megatron_shape` is without vocabulary padding.
    """

    megatron: str
    megatron_shape: Shape
    hf: tuple[tuple[str, Shape], ...]
    layout: Layout = Layout.SAME


def config_from_sidecar(values: Mapping[str, Any], source: str) -> ModelConfig:
    """Checks the content of a `megatron_hybrid.json` and returns it as a configuration.

    Args:
        values: the parsed JSON object.
        source: the file's name, for messages.

    Raises:
        ToolError: a key is missing, unknown or of the wrong type, or the model has no Hugging Face form.
    """
    if values.get("format") != FORMAT:
        raise ToolError(
            f"{source}: format {values.get('format')!r} is not supported, legal: {FORMAT}; "
            "convert with the version of megatron_hybrid that wrote the checkpoint"
        )
    options = REQUIRED_OPTIONS | OPTIONAL_OPTIONS
    for key, legal in options.items():
        if key not in values and key in REQUIRED_OPTIONS:
            raise ToolError(f"{source}: key {key!r} is missing, legal: {legal!r}; write the file with the trainer")
        value = values.get(key, legal)
        if value != legal or type(value) is not type(legal):
            raise ToolError(
                f"{source}: {key} {value!r} cannot be expressed by transformers' OlmoHybridForCausalLM, "
                f"legal: {legal!r}; such a model has no Hugging Face form and can only be used in Megatron"
            )
    known = {field.name: field for field in fields(ModelConfig)}
    unknown = sorted(set(values) - set(known) - set(options) - {"format"})
    if unknown:
        raise ToolError(
            f"{source}: unknown key {unknown[0]!r}; it may change the model, so it is not ignored; "
            f"legal: {', '.join(sorted([*known, *options, 'format']))}"
        )
    missing = sorted(set(known) - {"window_size", "window_attn_skip_freq", "rope_scaling"} - set(values))
    if missing:
        raise ToolError(f"{source}: key {missing[0]!r} is missing; write the file with the trainer")
    given = {name: values[name] for name in known if name in values}
    window, yarn = given.pop("window_size", None), given.pop("rope_scaling", None)
    for name, value in given.items():
        _check_type(value, str(known[name].type), f"{source}: {name}")
    config = ModelConfig(**given, window_size=_window(window, source), rope_scaling=_yarn(yarn, source))
    _check_config(config, source)
    return config


def sidecar_values(config: ModelConfig) -> dict[str, Any]:
    """A configuration with the keys of a sidecar: the inverse of `config_from_sidecar`."""
    return {field.name: getattr(config, field.name) for field in fields(ModelConfig)}


def _check_type(value: object, declared: str, name: str) -> None:
    """Raises ToolError unless `value` is of the `declared` field type ('int', 'float | None', …)."""
    legal: dict[str, tuple[type, ...]] = {"int": (int,), "float": (float, int), "str": (str,), "bool": (bool,)}
    base, _, optional = declared.partition(" | ")
    if value is None and optional:
        return
    if not isinstance(value, legal[base]) or (isinstance(value, bool) and base != "bool"):
        raise ToolError(f"{name} must be {declared}, but is {value!r}")
    is_dimension = base == "float" or (base == "int" and not optional)  # an optional int is a token id
    if is_dimension and isinstance(value, int | float) and not value > 0:
        raise ToolError(f"{name} must be above 0, but is {value!r}")


def _window(value: object, source: str) -> tuple[int, int] | None:
    """A sidecar's window_size: nothing, or tokens to the left and none to the right."""
    if value is None:
        return None
    if isinstance(value, list | tuple) and len(value) == 2 and type(value[0]) is int and value[0] > 0 and value[1] == 0:
        return value[0], 0
    raise ToolError(f"{source}: window_size {value!r} cannot be expressed by transformers, legal: null or [LEFT, 0]")


def _yarn(value: object, source: str) -> dict[str, Any] | None:
    """A sidecar's rope_scaling: nothing, or all that makes YaRN's frequencies; its attention factor follows."""
    if value is None:
        return None
    if isinstance(value, dict) and set(value) == YARN and value["rope_type"] == "yarn":
        for name in sorted(YARN - {"rope_type"}):
            whole = name == "original_max_position_embeddings"
            _check_type(value[name], "int" if whole else "float", f"{source}: rope_scaling: {name}")
        return dict(value)
    raise ToolError(
        f"{source}: rope_scaling {value!r}: legal: null, or rope_type 'yarn' with {', '.join(sorted(YARN))}"
    )


def _check_config(config: ModelConfig, source: str) -> None:
    """Raises ToolError for values that are each legal but do not make a model together."""
    foreign = sorted(set(config.hybrid_layer_pattern) - set(LAYER_TYPES) - {"|"})
    if foreign:
        raise ToolError(
            f"{source}: hybrid_layer_pattern {config.hybrid_layer_pattern!r} has the symbol {foreign[0]!r}, "
            "which transformers has no layer for; legal: G and *, with | between stages"
        )
    if "*" not in config.hybrid_layer_pattern:
        raise ToolError(
            f"{source}: hybrid_layer_pattern {config.hybrid_layer_pattern!r} needs at least one *; "
            "transformers refuses the model otherwise"
        )
    if config.window_size is not None and config.is_hybrid:
        raise ToolError(
            f"{source}: window_size {list(config.window_size)} cannot be expressed by transformers' "
            "OlmoHybridForCausalLM, legal: null; such a model has no Hugging Face form and can only be used in Megatron"
        )
    if config.rope_scaling and config.rope_theta is None:
        raise ToolError(f"{source}: rope_scaling without rope_theta; write the file with the trainer")
    if not config.is_hybrid and config.rope_theta is None:
        raise ToolError(f"{source}: rope_theta None cannot be expressed by transformers' Olmo3ForCausalLM")
    for large, small in (
        ("num_attention_heads", "num_key_value_heads"),
        ("linear_num_value_heads", "linear_num_key_heads"),
    ):
        if getattr(config, large) % getattr(config, small):
            raise ToolError(
                f"{source}: {large} {getattr(config, large)} is no multiple of {small} {getattr(config, small)}"
            )
    if config.true_vocab_size > config.vocab_size:
        raise ToolError(f"{source}: true_vocab_size {config.true_vocab_size} is above vocab_size {config.vocab_size}")
    for name in ("eos_token_id", "pad_token_id"):
        token_id = getattr(config, name)
        if token_id is not None and not 0 <= token_id < config.vocab_size:
            raise ToolError(f"{source}: {name} {token_id} is outside the vocabulary, 0 to {config.vocab_size - 1}")


def tensor_rules(config: ModelConfig) -> list[TensorRule]:
    """All tensors of a model, in the order of the layers; the Hugging Face names within are unique."""
    embedding = (config.vocab_size, config.hidden_size)
    rules = [
        TensorRule(
            "embedding.word_embeddings.weight",
            embedding,
            (("model.embed_tokens.weight", embedding),),
            Layout.VOCAB_ROWS,
        )
    ]
    for index, layer_type in enumerate(config.layer_types):
        layer_rules = _gdn_layer_rules if layer_type == LAYER_TYPES["G"] else _attention_layer_rules
        for rule in layer_rules(config):
            rules.append(
                TensorRule(
                    f"decoder.layers.{index}.{rule.megatron}",
                    rule.megatron_shape,
                    tuple((f"model.layers.{index}.{name}", shape) for name, shape in rule.hf),
                    rule.layout,
                )
            )
    rules.append(_same("decoder.final_norm.weight", "model.norm.weight", (config.hidden_size,)))
    rules.append(TensorRule("output_layer.weight", embedding, (("lm_head.weight", embedding),), Layout.VOCAB_ROWS))
    return rules


def _same(megatron: str, hf: str, shape: Shape) -> TensorRule:
    return TensorRule(megatron, shape, ((hf, shape),))


def _gdn_layer_rules(config: ModelConfig) -> Iterator[TensorRule]:
    """A pre-norm Gated DeltaNet layer: 18 Hugging Face tensors."""
    hidden = config.hidden_size
    key_rows = config.linear_num_key_heads * config.linear_key_head_dim  # Hk·K
    value_rows = config.linear_num_value_heads * config.linear_value_head_dim  # Hv·V
    value_heads = config.linear_num_value_heads
    taps = config.linear_conv_kernel_dim
    yield _same("input_layernorm.weight", "input_layernorm.weight", (hidden,))
    for part, name, rows in (
        ("in_proj.weight.query", "q_proj", key_rows),
        ("in_proj.weight.key", "k_proj", key_rows),
        ("in_proj.weight.value", "v_proj", value_rows),
        ("in_proj.weight.z", "g_proj", value_rows),
        ("ab_proj.weight.alpha", "a_proj", value_heads),
        ("ab_proj.weight.beta", "b_proj", value_heads),
    ):
        yield _same(ATTENTION + part, f"linear_attn.{name}.weight", (rows, hidden))
    for part, name, rows in (
        ("query", "q_conv1d", key_rows),
        ("key", "k_conv1d", key_rows),
        ("value", "v_conv1d", value_rows),
    ):
        yield _same(f"{ATTENTION}conv1d.weight.{part}", f"linear_attn.{name}.weight", (rows, 1, taps))
    yield _same(ATTENTION + "A_log", "linear_attn.A_log", (value_heads,))
    yield _same(ATTENTION + "dt_bias", "linear_attn.dt_bias", (value_heads,))
    yield _same(ATTENTION + "out_norm.weight", "linear_attn.o_norm.weight", (config.linear_value_head_dim,))
    yield _same(ATTENTION + "out_proj.weight", "linear_attn.o_proj.weight", (hidden, value_rows))
    # The same Hugging Face name is the norm after the branch in an attention layer.
    yield _same("pre_mlp_layernorm.weight", "post_attention_layernorm.weight", (hidden,))
    yield from _mlp_rules(config)


def _attention_layer_rules(config: ModelConfig) -> Iterator[TensorRule]:
    """An attention layer with norms after its branches: 11 Hugging Face tensors."""
    hidden = config.hidden_size
    q_rows = config.num_attention_heads * config.head_dim
    kv_rows = config.num_key_value_heads * config.head_dim
    yield TensorRule(
        ATTENTION + "linear_qkv.weight",
        (q_rows + 2 * kv_rows, hidden),
        tuple(
            (f"self_attn.{name}_proj.weight", (rows, hidden))
            for name, rows in (("q", q_rows), ("k", kv_rows), ("v", kv_rows))
        ),
        Layout.GROUPED_QKV,
    )
    yield _same(ATTENTION + "qk_norm.q_weight", "self_attn.q_norm.weight", (q_rows,))
    yield _same(ATTENTION + "qk_norm.k_weight", "self_attn.k_norm.weight", (kv_rows,))
    yield _same(ATTENTION + "linear_proj.weight", "self_attn.o_proj.weight", (hidden, q_rows))
    yield _same(ATTENTION + "linear_proj.post_layernorm.weight", "post_attention_layernorm.weight", (hidden,))
    yield from _mlp_rules(config)
    yield _same(MLP + "linear_fc2.post_layernorm.weight", "post_feedforward_layernorm.weight", (hidden,))


def _mlp_rules(config: ModelConfig) -> Iterator[TensorRule]:
    hidden, ffn = config.hidden_size, config.intermediate_size
    yield TensorRule(
        MLP + "linear_fc1.weight",
        (2 * ffn, hidden),
        (("mlp.gate_proj.weight", (ffn, hidden)), ("mlp.up_proj.weight", (ffn, hidden))),
        Layout.STACKED_ROWS,
    )
    yield _same(MLP + "linear_fc2.weight", "mlp.down_proj.weight", (hidden, ffn))


def hf_tensor_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Names and shapes of the released Hugging Face layout, in the order in which they are written."""
    return dict(pair for rule in tensor_rules(config) for pair in rule.hf)


def parameter_count(config: ModelConfig) -> int:
    """Parameters of the Hugging Face model, both vocabulary matrices included."""
    return sum(math.prod(shape) for shape in hf_tensor_shapes(config).values())


def check_stored_shape(rule: TensorRule, shape: Shape) -> None:
    """Raises ToolError unless a Megatron tensor of `shape` fits `rule`; vocabulary padding rows are allowed."""
    expected = rule.megatron_shape
    if shape == expected:
        return
    if rule.layout is Layout.VOCAB_ROWS and shape[1:] == expected[1:]:
        if shape[0] > expected[0]:
            return
        raise ToolError(
            f"{rule.megatron}: {shape[0]} stored rows are fewer than vocab_size {expected[0]}; "
            "the sidecar megatron_hybrid.json does not belong to this checkpoint"
        )
    raise ToolError(
        f"{rule.megatron}: stored shape {list(shape)}, but the configuration makes it {list(expected)}; "
        "the sidecar megatron_hybrid.json does not belong to this checkpoint"
    )


def to_hf(rule: TensorRule, tensor: Tensor, config: ModelConfig) -> dict[str, Tensor]:
    """The Hugging Face tensors in a Megatron tensor: views where the layout allows, values never change.

    Raises:
        ToolError: the tensor's shape does not fit the rule.
    """
    check_stored_shape(rule, tuple(tensor.shape))
    names = [name for name, _ in rule.hf]
    if rule.layout is Layout.SAME:
        return {names[0]: tensor}
    if rule.layout is Layout.VOCAB_ROWS:
        return {names[0]: tensor[: config.vocab_size]}
    if rule.layout is Layout.STACKED_ROWS:
        return dict(zip(names, tensor.split([shape[0] for _, shape in rule.hf]), strict=True))
    grouped = tensor.unflatten(0, (config.num_key_value_heads, -1))
    parts = grouped.split(_qkv_rows_of_a_group(config), dim=1)
    return {name: part.flatten(0, 1) for name, part in zip(names, parts, strict=True)}


def to_megatron(
    rule: TensorRule, tensors: Mapping[str, Tensor], config: ModelConfig, vocab_rows: int | None = None
) -> Tensor:
    """The Megatron tensor of a rule from its Hugging Face tensors: the inverse of `to_hf`.

    Args:
        rule: which tensor.
        tensors: at least the Hugging Face tensors of the rule, by name.
        config: the model.
        vocab_rows: rows that vocabulary matrices are padded to with zeros; None for no padding.

    Raises:
        ToolError: a tensor is missing or has another shape than the configuration makes.
    """
    import torch

    parts = []
    for name, shape in rule.hf:
        if name not in tensors:
            raise ToolError(f"{name}: missing, but {rule.megatron} is made of it")
        if tuple(tensors[name].shape) != shape:
            raise ToolError(f"{name}: shape {list(tensors[name].shape)}, but the configuration makes it {list(shape)}")
        parts.append(tensors[name])
    if rule.layout is Layout.SAME:
        return parts[0]
    if rule.layout is Layout.VOCAB_ROWS:
        padding = (vocab_rows or config.vocab_size) - config.vocab_size
        if padding < 0:
            raise ToolError(f"{rule.megatron}: {vocab_rows} rows cannot hold vocab_size {config.vocab_size}")
        return torch.nn.functional.pad(parts[0], (0, 0, 0, padding)) if padding else parts[0]
    if rule.layout is Layout.STACKED_ROWS:
        return _stacked(parts)
    groups = config.num_key_value_heads
    return torch.cat([part.unflatten(0, (groups, -1)) for part in parts], dim=1).flatten(0, 1)


def _stacked(parts: list[Tensor]) -> Tensor:
    """Their rows one after the other, without a copy where they lie so in one piece of memory."""
    import torch

    first, end = parts[0], parts[0].data_ptr()
    for part in parts:
        alike = part.dtype == first.dtype and part.is_contiguous()
        if (
            not alike
            or part.data_ptr() != end
            or part.untyped_storage().data_ptr() != first.untyped_storage().data_ptr()
        ):
            return torch.cat(parts)
        end += part.nbytes
    return first.as_strided((sum(len(part) for part in parts), *first.shape[1:]), first.stride())


def _qkv_rows_of_a_group(config: ModelConfig) -> list[int]:
    """Rows of query, key and value in one key/value group of `linear_qkv`."""
    heads_per_group = config.num_attention_heads // config.num_key_value_heads
    return [heads_per_group * config.head_dim, config.head_dim, config.head_dim]
