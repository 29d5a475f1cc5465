"""Hugging Face or OLMo-core to a Megatron torch_dist checkpoint that any parallel layout loads, streamed.

The checkpoint is of the kind Megatron calls a release: training that loads it starts at iteration 0 with a fresh
optimizer. Where optimizer state is brought along it is an ordinary iteration instead, and training goes on from there.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_hybrid.checkpoint import commit
from megatron_hybrid.checkpoint.sidecar import FILE_NAME as SIDECAR_FILE
from megatron_hybrid.checkpoint.sidecar import FORMAT
from megatron_hybrid.tools.cli import ToolError, byte_progress_bar
from megatron_hybrid.tools.convert.adam_state import ADAM_METADATA, STATES, AdamState, adam_state
from megatron_hybrid.tools.convert.dcp_writer import DcpWriter
from megatron_hybrid.tools.convert.hf_source import HfSource, open_hf
from megatron_hybrid.tools.convert.model_flags import training_flags
from megatron_hybrid.tools.convert.olmo_core import OlmoCoreSource, is_olmo_core, open_olmo_core
from megatron_hybrid.tools.convert.output_folder import RECORD_FILE, memory_line, new_folder, record, write_json
from megatron_hybrid.tools.convert.safetensors_folder import ITEM_BYTES
from megatron_hybrid.tools.convert.source import FP32_ISLANDS, Hashes, Source, read_ahead
from megatron_hybrid.tools.convert.tokenizer_files import copy_tokenizer
from megatron_hybrid.tools.dcp_reader import CONFIG_FILE, TRACKER_FILE, iteration_folder_name
from megatron_hybrid.tools.hf_mapping import (
    OPTIONAL_OPTIONS,
    REQUIRED_OPTIONS,
    ModelConfig,
    TensorRule,
    sidecar_values,
    to_megatron,
)

RELEASE = "release"  # Megatron's name for a checkpoint without iteration, optimizer and random state
TOKENIZER_FOLDER = "tokenizer"
#: Megatron's linears keep an extra state, None without FP8; loading asks for it by name and fails where it is missing.
LINEARS = (
    *("self_attention.in_proj", "self_attention.ab_proj", "self_attention.out_proj"),
    *("self_attention.linear_qkv", "self_attention.linear_proj", "self_attention.core_attention"),
    *("self_attention.out_norm", "self_attention.linear_proj.post_layernorm", "mlp.linear_fc2.post_layernorm"),
    *("mlp.linear_fc1", "mlp.linear_fc2", "input_layernorm", "pre_mlp_layernorm"),
)


@dataclass(frozen=True)
class ImportOptions:
    """What `import` is asked to do; `dtype` None keeps every tensor in its stored dtype.

    A_log and dt_bias become fp32 whatever `dtype` says: training holds them so.
    """

    model: Path
    output: Path
    dtype: str | None = None
    config: Path | None = None
    optimizer: bool = False
    global_batch_size: int | None = None
    lr: float = 3e-4
    min_lr: float = 3e-5
    weight_decay: float = 0.1
    true_vocab_size: int | None = None
    follow_symlinks: bool = False
    force: bool = False


def open_source(options: ImportOptions) -> HfSource | OlmoCoreSource:
    """What --model names, whole."""
    if options.model.is_dir() and is_olmo_core(options.model):
        return open_olmo_core(options.model, options.config, options.true_vocab_size)
    if options.optimizer:
        raise ToolError(f"--optimizer: --model {options.model} is no OLMo-core checkpoint and holds no optimizer state")
    return open_hf(options.model, true_vocab_size=options.true_vocab_size, follow_symlinks=options.follow_symlinks)


def import_model(options: ImportOptions) -> str:
    """Writes the Megatron save folder and returns a summary of it in a few lines.

    Raises:
        ToolError: the model is incomplete, damaged or not of this family, or the output is in the way. Nothing is
            left under `options.output` then that was not there before.
    """
    output = options.output.absolute()
    source = open_source(options)
    adam = adam_state(source, options) if options.optimizer else None
    needed_bytes = sum(
        math.prod(rule.megatron_shape) * (ITEM_BYTES[stored_dtype(rule, source, options.dtype)] + (12 if adam else 0))
        for rule in source.rules
    )
    folder = iteration_folder_name(adam.step) if adam else RELEASE
    with new_folder(output, needed_bytes, options.force, [options.model]) as working:
        write_json(working / SIDECAR_FILE, sidecar(source.config))
        (working / TOKENIZER_FOLDER).mkdir()
        if not copy_tokenizer(options.config or source.folder, working / TOKENIZER_FOLDER):
            (working / TOKENIZER_FOLDER).rmdir()
        hashes = write_checkpoint(source, options, adam, working / folder, needed_bytes)
        (working / TRACKER_FILE).write_text(str(adam.step) if adam else RELEASE)
        write_json(working / RECORD_FILE, conversion_record(source, options, folder, hashes))
    names = [name for rule in source.rules for name, _ in rule.hf]
    return (
        f"{output}: {len(names)} tensors, "
        f"{sum(math.prod(rule.megatron_shape) for rule in source.rules):,} parameters, {needed_bytes / 1e9:.2f} GB"
        f"{f', with Adam at step {adam.step}' if adam else ''}\n"
        f"source: {source.folder} ({source.dialect} names)\n"
        f"train with: --load {output} {' '.join([*training_flags(source.config), *(adam.flags() if adam else [])])}\n"
        f"{memory_line()}"
    )


def stored_dtype(rule: TensorRule, source: Source, dtype: str | None) -> str:
    """The dtype a rule's Megatron tensor gets."""
    if rule.megatron.endswith(FP32_ISLANDS):
        return "float32"
    return dtype or source.dtype(rule)


def write_checkpoint(
    source: HfSource | OlmoCoreSource, options: ImportOptions, adam: AdamState | None, folder: Path, total_bytes: int
) -> dict[str, str]:
    """Writes and commits the torch_dist folder; returns the SHA-256 of each tensor as read, by released name."""
    import torch

    folder.mkdir()
    hashes = Hashes(source.check_hash if isinstance(source, HfSource) else None)
    with DcpWriter(folder) as writer, byte_progress_bar("import", total_bytes) as bar:
        for rule, tensors in read_ahead(source):
            for name, tensor in tensors.items():
                hashes.add(name, tensor)
            dtype = getattr(torch, stored_dtype(rule, source, options.dtype))
            merged = to_megatron(rule, tensors, source.config).to(dtype).contiguous()
            writer.add_tensor(rule.megatron, merged)
            bar.update(merged.nbytes)
        for state in STATES if adam else ():
            for rule, tensors in read_ahead(source, state):
                merged = to_megatron(rule, tensors, source.config).float().contiguous()
                writer.add_tensor(f"optimizer.state.{state}.{rule.megatron}", merged)
                bar.update(merged.nbytes)
        for name in extra_states(source.config):
            writer.add_object(f"{name}._extra_state/shard_0_1", [None])
        writer.add_object("common_state/shard_0_1", [common_state(source.config, adam)])
        known = hashes.all()
    # Megatron's own order: this file last, since its presence means that the save has finished.
    write_json(folder / CONFIG_FILE, {"sharded_backend": "torch_dist", "sharded_backend_version": 1})
    commit.adopt(folder, hashes=writer.hashes)  # training loads committed checkpoints only
    return known


def extra_states(config: ModelConfig) -> list[str]:
    """Modules that may ask for an extra state; what nobody asks for does no harm."""
    layers = [f"decoder.layers.{index}.{name}" for index in range(len(config.layer_types)) for name in LINEARS]
    return [*layers, "decoder.final_norm", "output_layer"]


def common_state(config: ModelConfig, adam: AdamState | None) -> dict[str, Any]:
    """What Megatron keeps beside tensors, as far as loading needs it.

    Without `hybrid_layer_pattern` it would take the checkpoint for a GPT's and look for other names; without
    `checkpoint_version` it would reorder query, key and value as its first versions stored them.
    """
    layers = len(config.layer_types)
    args = argparse.Namespace(
        hybrid_layer_pattern=config.hybrid_layer_pattern,
        num_layers=layers,
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        tensor_model_parallel_size=1,
        pipeline_model_parallel_size=1,
        no_save_optim=adam is None,
        no_save_rng=True,
        consumed_train_samples=adam.consumed_samples if adam else 0,
    )
    state: dict[str, Any] = {
        "args": args,
        "checkpoint_version": 3.0,
        "iteration": adam.step if adam else 0,
        "num_floating_point_operations_so_far": 0,
        "content_metadata": {"singleton_local_shards": False, "chained_optim_avoid_prefix": True},
    }
    if adam:
        state |= adam.common_state()
        state["content_metadata"] |= ADAM_METADATA
    return state


def sidecar(config: ModelConfig) -> dict[str, Any]:
    """What the trainer writes beside its checkpoints, for this model."""
    return {"format": FORMAT, **REQUIRED_OPTIONS, **OPTIONAL_OPTIONS, **sidecar_values(config)}


def conversion_record(
    source: HfSource | OlmoCoreSource, options: ImportOptions, folder: str, hashes: dict[str, str]
) -> dict[str, Any]:
    """The content of conversion.json: hashes are of the source's tensors under their released names."""
    return record(
        "import",
        source.folder,
        folder=folder,
        names=source.dialect,
        dtype=options.dtype or "as stored",
        training_flags=training_flags(source.config),
        tensors={
            name: {"dtype": source.dtype(rule), "shape": list(shape), "sha256": hashes[name]}
            for rule in source.rules
            for name, shape in rule.hf
        },
    )
