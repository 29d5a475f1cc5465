"""Megatron or OLMo-core to a Hugging Face folder with the released names, streamed tensor by tensor."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_hybrid.tools.cli import ToolError, byte_progress_bar
from megatron_hybrid.tools.convert.common_state import folder_iteration
from megatron_hybrid.tools.convert.hf_config import generation_config, hf_config
from megatron_hybrid.tools.convert.output_folder import RECORD_FILE, memory_line, new_folder, record, write_json
from megatron_hybrid.tools.convert.safetensors_folder import (
    INDEX_FILE,
    ITEM_BYTES,
    SafetensorsWriter,
    read_header,
)
from megatron_hybrid.tools.convert.source import FP32_ISLANDS, MegatronSource, Source, open_megatron, read_ahead
from megatron_hybrid.tools.convert.tokenizer_files import write_tokenizer_files
from megatron_hybrid.tools.hf_mapping import Shape


@dataclass(frozen=True)
class ExportOptions:
    """What `export` is asked to do.

    `dtype` None keeps every tensor in its stored dtype. Another one leaves A_log and dt_bias as they are stored,
    unless `match_release`, which makes every tensor bf16, as in Ai2's release.
    """

    checkpoint: Path
    output: Path
    iteration: int | None = None
    dtype: str | None = None
    match_release: bool = False
    tokenizer_model: Path | None = None
    max_shard_bytes: int = 5 * 10**9
    force: bool = False


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the output, known before any is read."""

    name: str
    shape: Shape
    dtype: str

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


Shards = list[list[PlannedTensor]]


def export(options: ExportOptions) -> str:
    """Writes the Hugging Face folder and returns a summary of it in a few lines.

    Raises:
        ToolError: the checkpoint is incomplete, damaged or of a model that transformers cannot express, or the
            output is in the way. Nothing is left under `options.output` then that was not there before.
    """
    if options.match_release and options.dtype not in (None, "bfloat16"):
        raise ToolError(f"--dtype {options.dtype}: --match-release makes every tensor bfloat16; give one of the two")
    output = options.output.absolute()
    source = open_megatron(options.checkpoint, options.iteration)
    shards = plan_shards(planned_tensors(source, options), options.max_shard_bytes)
    tensors = [tensor for shard in shards for tensor in shard]
    with new_folder(output, sum(t.size_bytes for t in tensors), options.force) as working:
        # Before the weights: what is wrong with a tokenizer shows at once.
        write_json(working / "config.json", hf_config(source.config, tensors[0].dtype))
        write_json(working / "generation_config.json", generation_config(source.config))
        tokenizer_note = write_tokenizer_files(options.tokenizer_model, source.config, working)
        hashes = write_shards(source, shards, working)
        files = check_written(shards, working)
        write_json(working / RECORD_FILE, conversion_record(source, options, tensors, hashes, tokenizer_note))
    return (
        f"{output}: {len(tensors)} tensors, {sum(math.prod(t.shape) for t in tensors):,} parameters, "
        f"{sum(t.size_bytes for t in tensors) / 1e9:.2f} GB in {len(files)} "
        f"{'file' if len(files) == 1 else 'files'}\nsource: {source.folder}\n"
        f"tokenizer: {tokenizer_note}\n{memory_line()}"
    )


def planned_tensors(source: Source, options: ExportOptions) -> Iterator[PlannedTensor]:
    """Every output tensor in the order in which it is written."""
    for rule in source.rules:
        for name, shape in rule.hf:
            dtype = options.dtype or source.dtype(rule)
            if name.endswith(FP32_ISLANDS):
                dtype = source.dtype(rule)
            yield PlannedTensor(name, shape, "bfloat16" if options.match_release else dtype)


def plan_shards(tensors: Iterable[PlannedTensor], max_shard_bytes: int) -> Shards:
    """Consecutive tensors per file; only a tensor that is larger by itself makes a file exceed the limit."""
    shards: Shards = [[]]
    filled_bytes = 0
    for tensor in tensors:
        if shards[-1] and filled_bytes + tensor.size_bytes > max_shard_bytes:
            shards.append([])
            filled_bytes = 0
        shards[-1].append(tensor)
        filled_bytes += tensor.size_bytes
    return shards


def shard_names(count: int) -> list[str]:
    """File names as transformers expects them."""
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def write_shards(source: Source, shards: Shards, folder: Path) -> dict[str, str]:
    """Writes the safetensors files; returns the SHA-256 of each tensor's bytes by name."""
    import torch

    hashes: dict[str, str] = {}
    stream = (item for _, tensors in read_ahead(source) for item in tensors.items())
    with byte_progress_bar("export", sum(t.size_bytes for shard in shards for t in shard)) as bar:
        for file_name, shard in zip(shard_names(len(shards)), shards, strict=True):
            writer = SafetensorsWriter(folder / file_name, {t.name: (t.dtype, t.shape) for t in shard})
            complete = False
            try:
                for planned in shard:
                    name, tensor = next(stream)
                    if (name, tuple(tensor.shape)) != (planned.name, planned.shape):
                        raise ToolError(f"{planned.name}: {name} {list(tensor.shape)} came instead; this is a defect")
                    writer.write(name, tensor.to(getattr(torch, planned.dtype)))
                    bar.update(planned.size_bytes)
                complete = True
            finally:
                writer.close(complete)
            hashes |= writer.hashes
    return hashes


def check_written(shards: Shards, folder: Path) -> list[str]:
    """Reads the files' headers back and, for several files, writes the index from what they hold."""
    weight_map: dict[str, str] = {}
    files = shard_names(len(shards))
    for file_name, shard in zip(files, shards, strict=True):
        found = {name: (place.dtype, place.shape) for name, place in read_header(folder / file_name).items()}
        if found != {planned.name: (planned.dtype, planned.shape) for planned in shard}:
            raise ToolError(f"{folder / file_name}: it does not hold what was written; check the disk and repeat")
        weight_map.update(dict.fromkeys(found, file_name))
    if len(files) > 1:
        total_bytes = sum(planned.size_bytes for shard in shards for planned in shard)
        index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(folder / INDEX_FILE, index)
    return files


def conversion_record(
    source: MegatronSource,
    options: ExportOptions,
    tensors: list[PlannedTensor],
    hashes: dict[str, str],
    tokenizer_note: str,
) -> dict[str, Any]:
    """The content of conversion.json. It holds no time, so a repeated export gives the same folder."""
    return record(
        "export",
        source.folder,
        iteration=folder_iteration(source.folder.resolve()),
        sidecar=source.sidecar,
        dtype="bfloat16, as released" if options.match_release else options.dtype or "as stored",
        tokenizer=tokenizer_note,
        tensors={
            planned.name: {"dtype": planned.dtype, "shape": list(planned.shape), "sha256": hashes[planned.name]}
            for planned in tensors
        },
    )
