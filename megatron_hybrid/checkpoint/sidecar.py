"""`megatron_hybrid.json`: what model a checkpoint folder holds, readable without Megatron and without unpickling."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from megatron_hybrid.config import HybridConfig
from megatron_hybrid.tools.atomic_file import atomic_open

FILE_NAME = "megatron_hybrid.json"
FORMAT = 1


class SidecarError(ValueError):
    """The folder holds another model; the message names the folder, the key and both values."""


def describe(
    args: argparse.Namespace, options: HybridConfig, true_vocab_size: int, eos_token_id: int
) -> dict[str, Any]:
    """The model in the words of transformers' OlmoHybridConfig where that has them.

    Args:
        args: parsed Megatron arguments, sizes without padding for tensor parallelism. `padded_vocab_size` is
            the tokenizer's rounded up to --make-vocab-size-divisible-by: rows of the stored vocabulary matrices.
        true_vocab_size: tokens of the tokenizer.
    """
    has_rope = args.position_embedding_type in ("rope", "yarn")
    # Only there with YaRN: what exports a model without knowing the key would export another one, and refuses.
    yarn = {"rope_scaling": _yarn(args)} if args.position_embedding_type == "yarn" else {}
    return {
        **yarn,
        "format": FORMAT,
        "model_type": "olmo_hybrid",
        "hybrid_layer_pattern": args.hybrid_layer_pattern.replace("|", ""),
        "vocab_size": args.padded_vocab_size,
        "true_vocab_size": true_vocab_size,
        "hidden_size": args.hidden_size,
        "intermediate_size": args.ffn_hidden_size,
        "num_attention_heads": args.num_attention_heads,
        "num_key_value_heads": args.num_query_groups if args.group_query_attention else args.num_attention_heads,
        "head_dim": args.kv_channels,
        "linear_num_key_heads": args.linear_num_key_heads,
        "linear_num_value_heads": args.linear_num_value_heads,
        "linear_key_head_dim": args.linear_key_head_dim,
        "linear_value_head_dim": args.linear_value_head_dim,
        "linear_conv_kernel_dim": args.linear_conv_kernel_dim,
        "linear_allow_neg_eigval": options.gdn_allow_neg_eigval,
        "rms_norm_eps": args.layernorm_epsilon,
        "gdn_norm_eps": options.gdn_norm_epsilon,
        "rope_theta": float(args.rotary_base) if has_rope else None,
        "max_position_embeddings": args.max_position_embeddings,
        "window_size": args.window_size,
        "window_attn_skip_freq": args.window_attn_skip_freq if args.window_size else None,
        "eos_token_id": eos_token_id,
        "pad_token_id": None,
        "norm_placement": options.norm_placement,
        "qk_norm": options.qk_norm_width,
        "output_gate": options.gdn_output_gate,
    }


def _yarn(args: argparse.Namespace) -> dict[str, Any]:
    """In transformers' words; Megatron's defaults where the flags are not given."""
    return {
        "rope_type": "yarn",
        "factor": args.rotary_scaling_factor,
        "original_max_position_embeddings": args.yarn_original_max_position_embeddings or 4096,
        "beta_fast": args.yarn_beta_fast or 32.0,
        "beta_slow": args.yarn_beta_slow or 1.0,
    }


def write(folder: Path, description: dict[str, Any]) -> None:
    """Put the description into a checkpoint folder, whole or not at all.

    Raises:
        SidecarError: the folder already describes another model. The length and the positions may
            change, since training stages change them.
    """
    path = folder / FILE_NAME
    has_checkpoint = (folder / "latest_checkpointed_iteration.txt").exists()
    if path.exists() and has_checkpoint:  # without one, an earlier launch failed before it saved anything
        old = json.loads(path.read_text())
        may_change = {"max_position_embeddings", "rope_theta", "rope_scaling"}
        for key in sorted((set(old) | set(description)) - may_change):
            if old.get(key) != description.get(key):
                raise SidecarError(
                    f"--save {folder}: holds another model ({key}: {old.get(key)!r} there, "
                    f"{description.get(key)!r} here); give another folder"
                )
    with atomic_open(path) as handle:
        handle.write((json.dumps(description, indent=2) + "\n").encode())
