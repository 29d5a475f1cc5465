"""Megatron to an OLMo-core distributed checkpoint, with Adam's moments and step if asked for, streamed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_hybrid.checkpoint import masters
from megatron_hybrid.tools.cli import ToolError, byte_progress_bar
from megatron_hybrid.tools.convert.adam_state import STATES
from megatron_hybrid.tools.convert.common_state import adam_groups, folder_iteration
from megatron_hybrid.tools.convert.dcp_writer import DcpWriter
from megatron_hybrid.tools.convert.hf_config import hf_config
from megatron_hybrid.tools.convert.olmo_core import STATE, WHOLE_MODEL, core_names, stored_name
from megatron_hybrid.tools.convert.output_folder import RECORD_FILE, memory_line, new_folder, record, write_json
from megatron_hybrid.tools.convert.source import OPTIMIZER, PARAM, Hashes, MegatronSource, open_megatron, read_ahead

CONFIG_FOLDER = "huggingface"  # config.json under a name of OLMo-core's own would be taken for OLMo-core's


@dataclass(frozen=True)
class OlmoCoreOptions:
    """What an export to OLMo-core is asked to do."""

    checkpoint: Path
    output: Path
    iteration: int | None = None
    optimizer: bool = False
    force: bool = False


def export_olmo_core(options: OlmoCoreOptions) -> str:
    """Writes the folder, of the kind that OLMo-core loads without trainer state, and returns a summary.

    Parameters are fp32, from the optimizer's own copies where those are asked for.

    Raises:
        ToolError: the checkpoint is incomplete, damaged or without Adam's state, or the output is in the way.
    """
    output = options.output.absolute()
    source = open_megatron(options.checkpoint, options.iteration)
    groups = adam_groups(source.checkpoint) if options.optimizer else []
    states = STATES if groups else (PARAM,)
    for rule in source.rules if groups else ():
        for state in STATES:
            source.checkpoint.check(f"optimizer.state.{state}.{rule.megatron}")
    if groups and (fault := masters.fault(source.checkpoint)):
        raise ToolError(fault)
    parameters = sum(math.prod(shape) for rule in source.rules for _, shape in rule.hf)
    total_bytes = 4 * len(states) * parameters
    with new_folder(output, total_bytes, options.force, [options.checkpoint]) as working:
        (working / CONFIG_FOLDER).mkdir()
        write_json(working / CONFIG_FOLDER / "config.json", hf_config(source.config, "float32"))
        hashes = write_states(source, groups, working, total_bytes)
        write_json(working / RECORD_FILE, conversion_record(source, groups, hashes))
    step = f", with Adam at step {adam_step(groups):g}" if groups else ""
    return (
        f"{output}: {len(hashes)} tensors, {parameters:,} parameters, {total_bytes / 1e9:.2f} GB{step}\n"
        f"source: {source.folder}\n{memory_line()}"
    )


def write_states(
    source: MegatronSource, groups: list[dict[str, Any]], folder: Path, total_bytes: int
) -> dict[str, str]:
    """Writes parameters, and with groups moments, step and settings; returns the hashes of the tensors."""
    import torch

    names = core_names(source.config, "HEAD")
    hashes = Hashes()
    with DcpWriter(folder) as writer, byte_progress_bar("export", total_bytes) as bar:
        for state in STATES if groups else (PARAM,):
            for _, tensors in read_ahead(source, OPTIMIZER + state if groups else state):
                for name, tensor in tensors.items():
                    key = stored_name(names[name], state)
                    tensor = tensor.float()
                    hashes.add(key, tensor)
                    writer.add_tensor(key, tensor)
                    bar.update(tensor.nbytes)
        for name in names.values() if groups else ():
            writer.add_tensor(stored_name(name, "step"), torch.tensor(float(adam_step(groups))))
            for setting, value in group_settings(name, groups).items():
                writer.add_object(f"{STATE.replace('state', 'param_groups')}{name}.{setting}", value)
        return hashes.all()


def adam_step(groups: list[dict[str, Any]]) -> float:
    """The step that all groups share; ToolError if they do not."""
    steps = {group["step"] for group in groups}
    if len(steps) > 1 or not all(isinstance(step, int | float) for step in steps):
        raise ToolError(f"Megatron's parameter groups have different steps: {sorted(map(str, steps))}")
    return next(iter(steps))


def group_settings(name: str, groups: list[dict[str, Any]]) -> dict[str, Any]:
    """OLMo-core's settings of one parameter. Its rule of weight decay is Ai2's: none for the embedding only."""
    group = max(groups, key=lambda group: group["weight_decay"])
    decay = 0.0 if name == WHOLE_MODEL["model.embed_tokens.weight"] else group["weight_decay"]
    betas = tuple(group["betas"])
    lr = group["max_lr"]
    return {"lr": lr, "initial_lr": lr, "betas": betas, "eps": group["eps"], "weight_decay": decay}


def conversion_record(source: MegatronSource, groups: list[dict[str, Any]], hashes: dict[str, str]) -> dict[str, Any]:
    """The content of conversion.json."""
    return record(
        "export to OLMo-core",
        source.folder,
        iteration=folder_iteration(source.folder),
        optimizer_step=adam_step(groups) if groups else None,
        sidecar=source.sidecar,
        sha256=hashes,
    )
