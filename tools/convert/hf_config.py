"""config.json of a Hugging Face folder: written for a model, and read back into one, with nothing guessed."""

from __future__ import annotations

import importlib.metadata
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_hybrid.tools.cli import ToolError
from megatron_hybrid.tools.convert.output_folder import read_json
from megatron_hybrid.tools.hf_mapping import LAYER_TYPES, SLIDING, ModelConfig, check_config

ARCHITECTURES = {"olmo_hybrid": "OlmoHybridForCausalLM", "olmo3": "Olmo3ForCausalLM"}
OURS_ALONE = {"hybrid_layer_pattern", "true_vocab_size", "rope_theta", "window_size", "window_attn_skip_freq"}
#: What training has no other way to do; a config.json that says otherwise is another model.
FIXED = {"attention_bias": False, "tie_word_embeddings": False, "hidden_act": "silu"}


def hf_config(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """The content of config.json for transformers 5; `dtype` is what from_pretrained loads by default."""
    if config.rope_theta is None:
        rope: dict[str, Any] = {"rope_theta": None}  # NoPE as released; without the key transformers takes 10000
    else:
        rope = {"rope_theta": config.rope_theta, "rope_type": "default"}
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
    """The model that a folder's config.json describes, its defaults filled in by transformers itself.

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
    rope_theta = _rope_theta(values, path)
    from transformers import Olmo3Config, OlmoHybridConfig

    try:
        filled = (OlmoHybridConfig if model_type == "olmo_hybrid" else Olmo3Config)(
            **{key: value for key, value in values.items() if key not in ("model_type", "transformers_version")}
        )
    except Exception as error:  # transformers validates with several types
        raise ToolError(f"{path}: transformers refuses it ({' '.join(str(error).split())[:200]})") from None
    for key, legal in FIXED.items():
        if getattr(filled, key) != legal:
            raise ToolError(f"{path}: {key} {getattr(filled, key)!r} is not supported, legal: {legal!r}")
    return _model_config(filled, rope_theta, true_vocab_size, path)


def _model_config(filled: Any, rope_theta: float | None, true_vocab_size: int | None, path: Path) -> ModelConfig:
    symbols = {name: symbol for symbol, name in LAYER_TYPES.items()} | {SLIDING: "*"}
    types = list(filled.layer_types)
    if foreign := sorted(set(types) - set(symbols)):
        raise ToolError(f"{path}: layer_types has {foreign[0]!r}, legal: {', '.join(symbols)}")
    if len(types) != filled.num_hidden_layers:
        raise ToolError(f"{path}: num_hidden_layers {filled.num_hidden_layers}, but layer_types has {len(types)}")
    linear = {
        name: getattr(filled, name, 1)  # without Gated DeltaNet layers they mean nothing
        for name in ("num_key_heads", "num_value_heads", "key_head_dim", "value_head_dim", "conv_kernel_dim")
        for name in (f"linear_{name}",)
    }
    config = ModelConfig(
        hybrid_layer_pattern="".join(symbols[name] for name in types),
        vocab_size=filled.vocab_size,
        true_vocab_size=true_vocab_size or filled.vocab_size,
        hidden_size=filled.hidden_size,
        intermediate_size=filled.intermediate_size,
        num_attention_heads=filled.num_attention_heads,
        num_key_value_heads=filled.num_key_value_heads or filled.num_attention_heads,
        head_dim=getattr(filled, "head_dim", None) or filled.hidden_size // filled.num_attention_heads,
        **linear,
        linear_allow_neg_eigval=getattr(filled, "linear_allow_neg_eigval", True),
        rms_norm_eps=filled.rms_norm_eps,
        rope_theta=rope_theta,
        max_position_embeddings=filled.max_position_embeddings,
        eos_token_id=filled.eos_token_id,
        pad_token_id=filled.pad_token_id,
        **_windows(types, getattr(filled, "sliding_window", None), path),
    )
    check_config(config, str(path))
    return config


def _rope_theta(values: dict[str, Any], path: Path) -> float | None:
    """rope_theta, None for NoPE. transformers takes 10000 where nothing is said, which no model of this family has."""
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
    if kind not in ("default", None) or scaling:
        raise ToolError(
            f"{path}: rope_type {kind!r}, rope_scaling {scaling!r}: not supported, legal: 'default' and none"
        )
    theta = said["rope_theta"]
    if theta is not None and (isinstance(theta, bool) or not isinstance(theta, int | float) or theta <= 0):
        raise ToolError(f"{path}: rope_theta {theta!r}, legal: null or a number above 0")
    return None if theta is None else float(theta)


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
