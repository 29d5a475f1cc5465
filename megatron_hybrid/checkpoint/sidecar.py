"""`megatron_hybrid.json`: what model a checkpoint folder holds, readable without Megatron and without unpickling."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_hybrid.checkpoint.commit import COMPLETE
from megatron_hybrid.config import HybridConfig
from megatron_hybrid.tools.atomic_file import atomic_open

FILE_NAME = "megatron_hybrid.json"
FORMAT = 1

#: What a training stage may change.
POSITIONS = ("max_position_embeddings", "rope_theta", "rope_scaling")

#: Of the tokenizer, not of the weights: a converter knows other things of it than a run does.
TOKENIZER = ("true_vocab_size", "eos_token_id", "pad_token_id")

_NONE_WHERE_ABSENT = ("rope_scaling", "window_size", "window_attn_skip_freq")
_OF_GDN = ("linear_", "gdn_", "output_gate")

#: Where the key does not say which flag sets it.
_FLAGS = {
    "vocab_size": "--padded-vocab-size, --make-vocab-size-divisible-by",
    "intermediate_size": "--ffn-hidden-size",
    "num_key_value_heads": "--num-query-groups",
    "head_dim": "--kv-channels",
    "linear_num_key_heads": "--linear-num-key-heads",
    "linear_num_value_heads": "--linear-num-value-heads",
    "linear_conv_kernel_dim": "--linear-conv-kernel-dim",
    "linear_allow_neg_eigval": "--gdn-allow-neg-eigval",
    "rms_norm_eps": "--norm-epsilon",
    "gdn_norm_eps": "--gdn-norm-epsilon",
    "rope_theta": "--position-embedding-type, --rotary-base",
    "rope_scaling": "--position-embedding-type, --rotary-scaling-factor, --yarn-...",
    "qk_norm": "--qk-norm-width",
    "output_gate": "--gdn-output-gate",
}


class SidecarError(ValueError):
    """The folder holds another model; the message names the folder, the key and both values."""


@dataclass(frozen=True)
class Comparison:
    """Texts 'key (flag): value there, value here'.

    Attributes:
        model: what makes it another model.
        stage: positions, length and tokenizer, which a later stage may change.
        unknown: lines that say what could not be compared.
    """

    model: tuple[str, ...] = ()
    stage: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()


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


def compare(folder: Path, description: dict[str, Any]) -> Comparison:
    """What `folder` says of its model otherwise than the flags of this run do.

    Raises:
        SidecarError: its sidecar cannot be read.
    """
    path = folder / FILE_NAME
    try:
        there = json.loads(path.read_bytes())
        if not isinstance(there, dict):
            raise ValueError
    except FileNotFoundError:
        return Comparison(unknown=(f"{folder}: no {FILE_NAME}: not known whether it holds the model of these flags",))
    except ValueError:
        raise SidecarError(
            f"{path}: not a JSON object; copy it from the run, or remove it if you know that the model is the same"
        ) from None
    here = json.loads(json.dumps(description))  # so that tuples are lists, as there
    model: list[str] = []
    stage: list[str] = []
    absent: list[str] = []
    for key in sorted(set(there) | set(here)):
        if key.startswith(_OF_GDN) and "G" not in here["hybrid_layer_pattern"]:
            continue
        if key not in there and key not in _NONE_WHERE_ABSENT:
            absent.append(key)
        elif there.get(key) != here.get(key):
            flag = f" ({_FLAGS[key]})" if key in _FLAGS else ""
            text = f"{key}{flag}: {there.get(key)!r} there, {here.get(key)!r} here"
            (stage if key in (*POSITIONS, *TOKENIZER) else model).append(text)
    unknown = (f"{path}: without {', '.join(absent)}: not compared with this run's",) if absent else ()
    return Comparison(tuple(model), tuple(stage), unknown)


def holds_checkpoints(folder: Path) -> bool:
    """Whether a complete checkpoint lies in it, whatever its pointer file says."""
    return any((path / COMPLETE).exists() for path in (*folder.glob("iter_*"), folder / "release"))


def check_own(folder: Path, description: dict[str, Any]) -> tuple[str, ...]:
    """Refuse to save into a folder that holds another model's checkpoints; returns what could not be compared.

    Raises:
        SidecarError: one line. Positions and length count: a training stage has a folder of its own.
    """
    if not holds_checkpoints(folder):  # an earlier launch failed before it saved anything
        return ()
    found = compare(folder, description)
    if found.model:
        raise SidecarError(
            f"--save {folder}: holds another model ({'; '.join((*found.model, *found.stage))}; there: "
            f"{folder / FILE_NAME}, here: the flags); give another folder"
        )
    if found.stage:
        raise SidecarError(
            f"--save {folder}: holds the model at other positions, or of another tokenizer ({'; '.join(found.stage)}; "
            f"there: {folder / FILE_NAME}, here: the flags); give the flags it was trained with, or for a new stage "
            "--pretrained-checkpoint with a --save and --load of its own"
        )
    return found.unknown


def write(folder: Path, description: dict[str, Any]) -> None:
    """Put the description into a checkpoint folder, whole or not at all."""
    with atomic_open(folder / FILE_NAME) as handle:
        handle.write((json.dumps(description, indent=2) + "\n").encode())
