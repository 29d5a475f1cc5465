"""Megatron or OLMo-core to a Hugging Face folder with the released names, streamed tensor by tensor."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_hybrid.tools.cli import ToolError, byte_progress_bar
from megatron_hybrid.tools.convert.common_state import folder_iteration
from megatron_hybrid.tools.convert.hf_config import generation_config, hf_config
from megatron_hybrid.tools.convert.in_order import InOrder, workers
from megatron_hybrid.tools.convert.output_folder import RECORD_FILE, memory_line, new_folder, record, write_json
from megatron_hybrid.tools.convert.safetensors_folder import (
    INDEX_FILE,
    ITEM_BYTES,
    SafetensorsWriter,
    read_header,
)
from megatron_hybrid.tools.convert.source import FP32_ISLANDS, READERS, MegatronSource, open_megatron
from megatron_hybrid.tools.convert.tokenizer_files import write_tokenizer_files
from megatron_hybrid.tools.direct_io import Stream
from megatron_hybrid.tools.hf_mapping import Layout, Shape, TensorRule

if TYPE_CHECKING:
    from tqdm import tqdm


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


def planned_tensors(source: MegatronSource, options: ExportOptions) -> Iterator[PlannedTensor]:
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


def write_shards(source: MegatronSource, shards: Shards, folder: Path) -> dict[str, str]:
    """Writes the safetensors files; returns the SHA-256 of each tensor's bytes by name."""
    with byte_progress_bar("export", sum(t.size_bytes for shard in shards for t in shard)) as bar:
        output = ShardsOutput(source, shards, folder, bar)
        threads = InOrder("convert", len(source.rules), workers())
        try:
            # lm_head, the last, first: it is large, and at the end one thread would be left alone with it.
            for rule in (source.rules[-1], *source.rules[:-1]):
                threads.submit(output.write, rule)
            threads.finish()
        finally:
            threads.stop()
            output.close()
    return output.hashes()


class ShardsOutput:
    """The safetensors files of an export, written rule by rule by several threads."""

    def __init__(self, source: MegatronSource, shards: Shards, folder: Path, bar: tqdm[Any]) -> None:
        self._source, self._bar, self._lock = source, bar, threading.Lock()
        self._in_memory = threading.Semaphore(READERS)
        self._planned = {tensor.name: tensor for shard in shards for tensor in shard}
        self._writers: dict[str, SafetensorsWriter] = {}
        for file_name, shard in zip(shard_names(len(shards)), shards, strict=True):
            writer = SafetensorsWriter(folder / file_name, {t.name: (t.dtype, t.shape) for t in shard})
            self._writers |= dict.fromkeys((t.name for t in shard), writer)

    def write(self, rule: TensorRule) -> None:
        """Writes the tensors of a rule, piece by piece where the stored bytes are theirs one after the other."""
        planned = [self._planned[name] for name, _ in rule.hf]
        unchanged = rule.layout is not Layout.GROUPED_QKV and planned[0].dtype == self._source.dtype(rule)
        if unchanged and (pieces := self._source.checkpoint.pieces(rule.megatron)):
            stream = Stream(pieces)
            for tensor in planned:
                self._writers[tensor.name].write_pieces(tensor.name, stream.take(tensor.size_bytes))
            stream.finish()
        else:
            with self._in_memory:
                self._write_from_memory(rule)
        with self._lock:
            self._bar.update(sum(tensor.size_bytes for tensor in planned))

    def _write_from_memory(self, rule: TensorRule) -> None:
        import torch

        for name, tensor in self._source.read(rule).items():
            self._writers[name].write(name, tensor.to(getattr(torch, self._planned[name].dtype)))

    def hashes(self) -> dict[str, str]:
        """SHA-256 by name, when all is written."""
        return {name: writer.hashes[name] for name, writer in self._writers.items()}

    def close(self) -> None:
        """Closes the files as they are; whole ones are closed already."""
        for writer in set(self._writers.values()):
            writer.close()


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
