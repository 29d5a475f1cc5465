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
    has_rope = args.position_embedding_type == "rope"
    return {
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


def write(folder: Path, description: dict[str, Any]) -> None:
    """Put the description into a checkpoint folder, whole or not at all.

    Raises:
        SidecarError: the folder already describes another model. `max_position_embeddings` and `rope_theta` may
            change, since training stages change them.
    """
    path = folder / FILE_NAME
    has_checkpoint = (folder / "latest_checkpointed_iteration.txt").exists()
    if path.exists() and has_checkpoint:  # without one, an earlier launch failed before it saved anything
        old = json.loads(path.read_text())
        may_change = {"max_position_embeddings", "rope_theta"}
        for key in sorted((set(old) | set(description)) - may_change):
            if old.get(key) != description.get(key):
                raise SidecarError(
                    f"--save {folder}: holds another model ({key}: {old.get(key)!r} there, "
                    f"{description.get(key)!r} here); give another folder"
                )
    with atomic_open(path) as handle:
        handle.write((json.dumps(description, indent=2) + "\n").encode())
