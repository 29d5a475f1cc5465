"""config.json of a Hugging Face folder: written for a model, and read back into one, with nothing guessed."""

from __future__ import annotations

import importlib.metadata
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from megatron_hybrid.checkpoint.sidecar import FORMAT
from megatron_hybrid.tools.cli import ToolError
from megatron_hybrid.tools.convert.output_folder import read_json
from megatron_hybrid.tools.hf_mapping import (
    LAYER_TYPES,
    REQUIRED_OPTIONS,
    SLIDING,
    YARN,
    ModelConfig,
    config_from_sidecar,
)

ARCHITECTURES = {"olmo_hybrid": "OlmoHybridForCausalLM", "olmo3": "Olmo3ForCausalLM"}
OURS_ALONE = {"hybrid_layer_pattern", "true_vocab_size", "window_size", "window_attn_skip_freq"}
OURS_ALONE |= {"rope_theta", "rope_scaling"}  # rope_parameters there
#: What a config.json need not say, as transformers 5.23 has it; None is derived from other values.
_COMMON: dict[str, Any] = {
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": False,
    "num_key_value_heads": None,
    "head_dim": None,
    "layer_types": None,
}
_HYBRID_SIZES = ("linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim")
DEFAULTS: dict[str, dict[str, Any]] = {
    "olmo_hybrid": {
        **_COMMON,
        "vocab_size": 100352,
        "hidden_size": 3840,
        "num_attention_heads": 30,
        "max_position_embeddings": 65536,
        "rms_norm_eps": 1e-6,
        "pad_token_id": 100277,
        "eos_token_id": 100257,
        "linear_conv_kernel_dim": 4,
        "linear_allow_neg_eigval": True,
        **dict.fromkeys(_HYBRID_SIZES),
    },
    "olmo3": {
        **_COMMON,
        "vocab_size": 50304,
        "hidden_size": 4096,
        "num_attention_heads": 32,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "pad_token_id": 1,
        "eos_token_id": 50279,
        "sliding_window": 4096,
        # Without Gated DeltaNet layers these mean nothing.
        "linear_conv_kernel_dim": 1,
        "linear_allow_neg_eigval": True,
        **dict.fromkeys(_HYBRID_SIZES, 1),
    },
}
#: What training has no other way to do; a config.json that says otherwise is another model.
FIXED = {"attention_bias": False, "tie_word_embeddings": False, "hidden_act": "silu"}


def hf_config(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """The content of config.json for transformers 5; `dtype` is what from_pretrained loads by default."""
    if config.rope_theta is None:
        rope: dict[str, Any] = {"rope_theta": None}  # NoPE as released; without the key transformers takes 10000
    else:
        rope = {"rope_theta": config.rope_theta, **(config.rope_scaling or {"rope_type": "default"})}
    model_type = "olmo_hybrid" if config.is_hybrid else "olmo3"
    values: dict[str, Any] = {
        "architectures": [ARCHITECTURES[model_type]],
        "model_type": model_type,
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "dtype": dtype,
        "initializer_range": 0.02,
        "layer_types": config.layer_types,
        "num_hidden_layers": len(config.layer_types),
        "rope_parameters": rope,
        "transformers_version": importlib.metadata.version("transformers"),
        "use_cache": True,
        **FIXED,
    }
    # The other keys have the same name here and there.
    values |= {name: value for name, value in asdict(config).items() if name not in OURS_ALONE}
    if not config.is_hybrid:
        values = {name: value for name, value in values.items() if not name.startswith("linear_")}
        if config.window_size is not None:
            values["sliding_window"] = config.window_size[0] + 1  # Hugging Face counts the query itself
    if config.head_dim * config.num_attention_heads == config.hidden_size:
        del values["head_dim"]  # the released configuration derives it
    return dict(sorted(values.items()))


def generation_config(config: ModelConfig) -> dict[str, Any]:
    """The content of generation_config.json."""
    return {
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
        "transformers_version": importlib.metadata.version("transformers"),
    }


def read_hf_config(folder: Path, true_vocab_size: int | None) -> ModelConfig:
    """The model that a folder's config.json describes, its defaults filled in as transformers does.

    Args:
        folder: the Hugging Face folder.
        true_vocab_size: tokens of the tokenizer; None for all rows.

    Raises:
        ToolError: no or another model, or one that training cannot express.
    """
    path = folder / "config.json"
    values = read_json(path, "give a folder with a Hugging Face model")
    model_type = values.get("model_type")
    if model_type not in ARCHITECTURES:
        raise ToolError(f"{path}: model_type {model_type!r}, legal: {', '.join(ARCHITECTURES)}")
    for key in ("quantization_config", "auto_map"):
        if values.get(key):
            raise ToolError(
                f"{path}: {key} is set, and a converted model can have none; give the plain bf16 or fp32 model"
            )
    rope_theta, yarn = _positions(values, path)
    filled = _with_defaults(values, model_type, path)
    for key, legal in FIXED.items():
        if filled[key] != legal:
            raise ToolError(f"{path}: {key} {filled[key]!r} is not supported, legal: {legal!r}")
    return _model_config({**filled, "rope_theta": rope_theta, "rope_scaling": yarn}, true_vocab_size, path)


def _with_defaults(values: dict[str, Any], model_type: str, path: Path) -> dict[str, Any]:
    """What transformers makes of a config.json; importing it for that would take longer than the rest."""
    filled = DEFAULTS[model_type] | values
    for name in ("hidden_size", "num_attention_heads", "num_hidden_layers"):
        if type(filled[name]) is not int or filled[name] < 1:
            raise ToolError(f"{path}: {name} must be a number above 0, but is {filled[name]!r}")
    hidden, heads = filled["hidden_size"], filled["num_attention_heads"]
    key_dim = filled["linear_key_head_dim"] or int(0.75 * hidden / heads)
    types = [LAYER_TYPES["*"] if layer % 4 == 3 else LAYER_TYPES["G"] for layer in range(filled["num_hidden_layers"])]
    if model_type == "olmo3":
        types = [SLIDING if name == LAYER_TYPES["G"] else name for name in types]
    elif LAYER_TYPES["*"] not in types:
        types[-1] = LAYER_TYPES["*"]
    derived = {
        "num_key_value_heads": heads,
        "head_dim": hidden // heads,
        "layer_types": types,
        "linear_num_key_heads": heads,
        "linear_num_value_heads": heads,
        "linear_key_head_dim": key_dim,
        "linear_value_head_dim": 2 * key_dim,
    }
    return filled | {key: value for key, value in derived.items() if filled[key] is None}


def _model_config(filled: dict[str, Any], true_vocab_size: int | None, path: Path) -> ModelConfig:
    symbols = {name: symbol for symbol, name in LAYER_TYPES.items()} | {SLIDING: "*"}
    types = filled["layer_types"]
    foreign = [name for name in types if name not in symbols] if isinstance(types, list) else [types]
    if foreign:
        raise ToolError(f"{path}: layer_types has {foreign[0]!r}, legal: {', '.join(symbols)}")
    if len(types) != filled["num_hidden_layers"]:
        raise ToolError(f"{path}: num_hidden_layers {filled['num_hidden_layers']}, but layer_types has {len(types)}")
    values = {
        "format": FORMAT,
        **REQUIRED_OPTIONS,
        **{field.name: filled[field.name] for field in fields(ModelConfig) if field.name in filled},
        "hybrid_layer_pattern": "".join(symbols[name] for name in types),
        "true_vocab_size": true_vocab_size or filled["vocab_size"],
        **_windows(types, filled.get("sliding_window"), path),
    }
    return config_from_sidecar(values, str(path))


def _positions(values: dict[str, Any], path: Path) -> tuple[float | None, dict[str, Any] | None]:
    """rope_theta, None for NoPE, and YaRN, None for none.

    transformers takes 10000 where nothing is said, which no model of this family has.
    """
    rope = values.get("rope_parameters")
    if isinstance(rope, dict) and set(rope) == {"full_attention", "sliding_attention"}:
        if rope["full_attention"] != rope["sliding_attention"]:
            raise ToolError(f"{path}: rope_parameters differ between full and sliding attention, not supported")
        rope = rope["full_attention"]
    said = rope if isinstance(rope, dict) else values
    if "rope_theta" not in said:
        raise ToolError(
            f"{path}: it does not say rope_theta, and transformers would turn rotary embeddings on with 10000; write "
            '"rope_parameters": {"rope_theta": null} for none, as released, or the value the model was trained with'
        )
    kind = said.get("rope_type", "default") if isinstance(rope, dict) else "default"
    scaling = values.get("rope_scaling")
    yarn = {key: value for key, value in said.items() if key != "rope_theta"} if kind == "yarn" else None
    if scaling or (set(yarn) != YARN if yarn else kind not in ("default", None)):
        raise ToolError(
            f"{path}: rope_type {kind!r}, rope_scaling {scaling!r}: not supported, legal: 'default' and none, or "
            f"rope_parameters of rope_type 'yarn' with {', '.join(sorted(YARN - {'rope_type'}))} and nothing else"
        )
    theta = said["rope_theta"]
    if theta is not None and (isinstance(theta, bool) or not isinstance(theta, int | float) or theta <= 0):
        raise ToolError(f"{path}: rope_theta {theta!r}, legal: null or a number above 0")
    return (None if theta is None else float(theta)), yarn


def _windows(types: list[str], sliding_window: int | None, path: Path) -> dict[str, Any]:
    """window_size and window_attn_skip_freq that give these layers; ToolError for a pattern no frequency makes."""
    windowed = [index for index, name in enumerate(types) if name == SLIDING]
    if not windowed:
        return {}
    if not sliding_window or sliding_window < 2:
        raise ToolError(f"{path}: sliding_window {sliding_window!r}, legal with sliding_attention layers: 2 and more")
    full = [index for index in range(len(types)) if index not in windowed]
    freq = full[0] + 1 if full else None
    if [index for index in range(len(types)) if freq is None or (index + 1) % freq] != windowed:
        raise ToolError(f"{path}: layer_types: full attention must be every Nth layer, but is in layers {full}")
    return {"window_size": (sliding_window - 1, 0), "window_attn_skip_freq": freq}
