"""Converts a Megatron torch_dist checkpoint of an OLMo-Hybrid model to a Hugging Face folder.

    python -m megatron_hybrid.tools.convert export --checkpoint SAVE_FOLDER --output HF_FOLDER

Needs no GPU, no Megatron and no process group. Tensors are streamed, so host memory holds one output shard and one
Megatron tensor. The folder is written as HF_FOLDER.tmp and renamed when it is complete; a run that stops leaves
nothing under the final name and can simply be repeated.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import math
import platform
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_hybrid import __version__
from megatron_hybrid.checkpoint.sidecar import FILE_NAME as SIDECAR_FILE
from megatron_hybrid.tools.atomic_file import flush_to_disk, fsync_folder
from megatron_hybrid.tools.cli import ToolError, byte_progress_bar, run_cli
from megatron_hybrid.tools.dcp_reader import TorchDistCheckpoint, find_iteration
from megatron_hybrid.tools.hf_mapping import (
    ModelConfig,
    Shape,
    TensorRule,
    check_stored_shape,
    config_from_sidecar,
    tensor_rules,
    to_hf,
)

if TYPE_CHECKING:
    from torch import Tensor

RECORD_FILE = "conversion.json"
MODEL_PREFIXES = ("embedding.", "decoder.", "output_layer.")  # every model tensor's name starts with one of these
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
SIZE_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class ExportOptions:
    """What `export` is asked to do; `dtype` None keeps every tensor in its stored dtype."""

    checkpoint: Path
    output: Path
    iteration: int | None = None
    dtype: str | None = None
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


@dataclass(frozen=True)
class Source:
    """A checkpoint that was found to be whole and to belong to its configuration."""

    checkpoint: TorchDistCheckpoint
    config: ModelConfig
    sidecar: dict[str, Any]
    rules: list[TensorRule]


def export(options: ExportOptions) -> str:
    """Writes the Hugging Face folder and returns a summary of it in a few lines.

    Raises:
        ToolError: the checkpoint is incomplete, damaged or of a model that transformers cannot express, or the
            output is in the way. Nothing is left under `options.output` then that was not there before.
    """
    output = options.output.resolve()
    check_output(output, options.force)
    source = open_source(options.checkpoint, options.iteration)
    shards = plan_shards(planned_tensors(source, options.dtype), options.max_shard_bytes)
    working = make_working_folder(output, sum(t.size_bytes for shard in shards for t in shard))
    try:
        # First of all, so that a folder left by a killed run is known to be ours.
        write_json(working / RECORD_FILE, {"status": "incomplete"})
        hashes = write_shards(source, options.dtype, shards, working)
        files = check_written(shards, working)
        write_json(working / "config.json", hf_config(source.config, shards[0][0].dtype))
        write_json(working / "generation_config.json", generation_config(source.config))
        tokenizer_note = write_tokenizer_files(options.tokenizer_model, source.config, working)
        write_json(working / RECORD_FILE, conversion_record(source, options, shards, hashes, tokenizer_note))
        publish(working, output)
    except BaseException:
        shutil.rmtree(working, ignore_errors=True)
        raise
    tensors = [tensor for shard in shards for tensor in shard]
    return (
        f"{output}: {len(tensors)} tensors, {sum(math.prod(t.shape) for t in tensors):,} parameters, "
        f"{sum(t.size_bytes for t in tensors) / 1e9:.2f} GB in {len(files)} "
        f"{'file' if len(files) == 1 else 'files'}\nsource: {source.checkpoint.folder}\n"
        f"tokenizer: {tokenizer_note}\npeak host memory: {peak_memory_bytes() / 1e9:.2f} GB"
    )


def open_source(checkpoint: Path, iteration: int | None) -> Source:
    """Opens a checkpoint with its sidecar and checks names, shapes, chunks and file sizes of all model tensors."""
    folder = find_iteration(checkpoint, iteration)
    config, sidecar = read_sidecar(folder)
    reader = TorchDistCheckpoint(folder)
    rules = tensor_rules(config)
    for rule in rules:
        stored = reader.stored(rule.megatron)
        if stored.dtype not in ITEM_BYTES:
            raise ToolError(f"{folder}: {stored.name} is {stored.dtype}, legal: {', '.join(ITEM_BYTES)}")
        check_stored_shape(rule, stored.shape)
        reader.check(rule.megatron)
    expected = {rule.megatron for rule in rules}
    foreign = [n for n in reader.tensors if n.startswith(MODEL_PREFIXES) and n not in expected]
    if foreign:
        raise ToolError(
            f"{folder}: {len(foreign)} model tensors have no place in the Hugging Face model, the first is "
            f"{foreign[0]}; the sidecar {SIDECAR_FILE} does not belong to this checkpoint"
        )
    return Source(reader, config, sidecar, rules)


def read_sidecar(iteration_folder: Path) -> tuple[ModelConfig, dict[str, Any]]:
    """The configuration beside a checkpoint: in the iteration's folder or else in the one above."""
    for folder in (iteration_folder, iteration_folder.resolve().parent):
        path = folder / SIDECAR_FILE
        if path.is_file():
            try:
                values = json.loads(path.read_text())
            except ValueError as error:
                raise ToolError(f"{path}: not JSON ({error}); copy it again from the training run") from None
            if not isinstance(values, dict):
                raise ToolError(f"{path}: a JSON object was expected, but it holds a {type(values).__name__}")
            return config_from_sidecar(values, str(path)), values
    raise ToolError(
        f"{iteration_folder}: no {SIDECAR_FILE} in it or in the folder above; "
        "the trainer writes it beside the iterations, copy it there"
    )


def planned_tensors(source: Source, dtype: str | None) -> Iterator[PlannedTensor]:
    """Every output tensor in the order in which it is written."""
    for rule in source.rules:
        for name, shape in rule.hf:
            yield PlannedTensor(name, shape, dtype or source.checkpoint.stored(rule.megatron).dtype)


def plan_shards(tensors: Iterator[PlannedTensor], max_shard_bytes: int) -> list[list[PlannedTensor]]:
    """Consecutive tensors per file; only a tensor that is larger by itself makes a file exceed the limit."""
    shards: list[list[PlannedTensor]] = [[]]
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


def converted_tensors(source: Source, dtype: str | None) -> Iterator[tuple[str, Tensor]]:
    """Reads, splits and casts tensor by tensor, in the order of the plan; each owns its memory."""
    import torch

    for rule in source.rules:
        stored = source.checkpoint.read(rule.megatron)
        for name, part in to_hf(rule, stored, source.config).items():
            tensor = part.to(getattr(torch, dtype)) if dtype else part
            tensor = tensor.contiguous()
            if tensor.untyped_storage().nbytes() != tensor.nbytes:
                tensor = tensor.clone()
            yield name, tensor


def write_shards(source: Source, dtype: str | None, shards: list[list[PlannedTensor]], folder: Path) -> dict[str, str]:
    """Writes the safetensors files; returns the SHA-256 of each tensor's bytes by name."""
    from safetensors.torch import save_file

    hashes: dict[str, str] = {}
    stream = converted_tensors(source, dtype)
    with byte_progress_bar("export", sum(t.size_bytes for shard in shards for t in shard)) as bar:
        for file_name, shard in zip(shard_names(len(shards)), shards, strict=True):
            tensors: dict[str, Tensor] = {}
            for planned in shard:
                name, tensor = next(stream)
                found = PlannedTensor(name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
                if found != planned:
                    raise ToolError(f"{name}: {found} was produced where {planned} was planned; this is a defect")
                tensors[name] = tensor
                hashes[name] = sha256_of(tensor)
                bar.update(planned.size_bytes)
            save_file(tensors, folder / file_name, metadata={"format": "pt"})
            # save_file makes files that only their owner can read; these get the permissions of any other file.
            (folder / file_name).chmod((folder / RECORD_FILE).stat().st_mode)
            with open(folder / file_name, "rb") as handle:
                flush_to_disk(handle)
    return hashes


def sha256_of(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes as safetensors stores them."""
    import torch

    return hashlib.sha256(tensor.reshape(-1).view(torch.uint8).numpy().data).hexdigest()


def check_written(shards: list[list[PlannedTensor]], folder: Path) -> list[str]:
    """Reads the files' headers back and, for several files, writes the index from what they hold."""
    weight_map: dict[str, str] = {}
    files = shard_names(len(shards))
    for file_name, shard in zip(files, shards, strict=True):
        found = read_header(folder / file_name)
        if found != {planned.name: planned.shape for planned in shard}:
            raise ToolError(f"{folder / file_name}: it does not hold what was written; check the disk and repeat")
        weight_map.update(dict.fromkeys(found, file_name))
    if len(files) > 1:
        total_bytes = sum(planned.size_bytes for shard in shards for planned in shard)
        index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(folder / "model.safetensors.index.json", index)
    return files


def read_header(path: Path) -> dict[str, Shape]:
    """Names and shapes in a safetensors file; ToolError if the file cannot be opened."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as handle:
            return {name: tuple(handle.get_slice(name).get_shape()) for name in handle.keys()}  # noqa: SIM118 not a dict
    except SafetensorError as error:
        raise ToolError(f"{path}: unreadable ({error}); check the disk and repeat") from None


def hf_config(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """The content of config.json for transformers 5; `dtype` is what from_pretrained loads by default."""
    if config.rope_theta is None:
        rope: dict[str, Any] = {"rope_theta": None}  # NoPE as released; without the key transformers takes 10000
    else:
        rope = {"rope_theta": config.rope_theta, "rope_type": "default"}
    values: dict[str, Any] = {
        "architectures": ["OlmoHybridForCausalLM"],
        "model_type": "olmo_hybrid",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "dtype": dtype,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "layer_types": config.layer_types,
        "num_hidden_layers": len(config.layer_types),
        "rope_parameters": rope,
        "tie_word_embeddings": False,
        "transformers_version": importlib.metadata.version("transformers"),
        "use_cache": True,
    }
    # The other keys have the same name here and there.
    ours_alone = {"hybrid_layer_pattern", "true_vocab_size", "rope_theta"}
    values |= {name: value for name, value in asdict(config).items() if name not in ours_alone}
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


def write_tokenizer_files(model_file: Path | None, config: ModelConfig, folder: Path) -> str:
    """Writes the tokenizer, if one is given; returns what was done in words."""
    from megatron_hybrid.tools.hf_tokenizer import write_tokenizer

    if model_file is None:
        return "none written, --tokenizer-model was not given"
    written = write_tokenizer(
        model_file,
        folder,
        vocab_rows=config.true_vocab_size,
        eos_id=config.eos_token_id,
        pad_id=config.pad_token_id,
        max_length=config.max_position_embeddings,
    )
    if written.exact:
        return "AutoTokenizer gives the ids of SentencePiece (compared on source code and periodic text)"
    return f"tokenizer.model copied only, AutoTokenizer cannot load it: {written.reason}"


def conversion_record(
    source: Source,
    options: ExportOptions,
    shards: list[list[PlannedTensor]],
    hashes: dict[str, str],
    tokenizer_note: str,
) -> dict[str, Any]:
    """The content of conversion.json. It holds no time, so a repeated export gives the same folder."""
    folder = source.checkpoint.folder.resolve()
    digits = re.fullmatch(r"iter_(\d+)", folder.name)
    packages = ("torch", "safetensors", "transformers", "tokenizers", "sentencepiece")
    return {
        "status": "complete",
        "format": 1,
        "source": str(folder),
        "iteration": int(digits[1]) if digits else None,
        "sidecar": source.sidecar,
        "dtype": options.dtype or "as stored",
        "tokenizer": tokenizer_note,
        "versions": {
            "megatron_hybrid": __version__,
            "python": platform.python_version(),
            **{package: importlib.metadata.version(package) for package in packages},
        },
        "tensors": {
            planned.name: {"dtype": planned.dtype, "shape": list(planned.shape), "sha256": hashes[planned.name]}
            for shard in shards
            for planned in shard
        },
    }


def check_output(output: Path, force: bool) -> None:
    """Raises ToolError when something is in the way of `output` or of the names used while it is written."""
    if output.exists() and not output.is_dir():
        raise ToolError(f"--output {output}: it is a file; give a folder")
    if output.is_dir() and any(output.iterdir()):
        if not force:
            raise ToolError(f"--output {output}: it is not empty; give another folder, or --force to replace it")
        if not is_model_folder(output):
            raise ToolError(
                f"--output {output}: --force replaces earlier exports only, and it holds no config.json or "
                f"{RECORD_FILE}; remove it yourself or give another folder"
            )
    for leftover in (beside(output, ".tmp"), beside(output, ".replaced")):
        if leftover.exists() and not (leftover.is_dir() and is_model_folder(leftover)):
            raise ToolError(f"{leftover}: it is in the way and is not from an earlier export; move it")


def make_working_folder(output: Path, needed_bytes: int) -> Path:
    """Makes the empty folder `output`.tmp on a disk with `needed_bytes` free; one that was left over is removed."""
    working = beside(output, ".tmp")
    if working.exists():
        shutil.rmtree(working)
    output.parent.mkdir(parents=True, exist_ok=True)
    free_bytes = shutil.disk_usage(output.parent).free
    if free_bytes < needed_bytes:
        raise ToolError(
            f"--output {output}: {needed_bytes / 1e9:.1f} GB are needed, {free_bytes / 1e9:.1f} GB are free there"
        )
    working.mkdir()
    return working


def beside(output: Path, suffix: str) -> Path:
    """The folder next to `output` whose name has `suffix` after it."""
    return output.with_name(output.name + suffix)


def is_model_folder(folder: Path) -> bool:
    """Whether a folder holds a model or an unfinished export of one, or is empty, and so may be replaced."""
    return (folder / "config.json").is_file() or (folder / RECORD_FILE).is_file() or not any(folder.iterdir())


def publish(working: Path, output: Path) -> None:
    """Gives the finished folder its name. An earlier export is moved aside first, and back if that fails."""
    replaced = beside(output, ".replaced")
    if output.exists():
        if replaced.exists():
            shutil.rmtree(replaced)
        output.rename(replaced)
    try:
        working.rename(output)
    except OSError:
        if replaced.exists():
            replaced.rename(output)
        raise
    if replaced.exists():
        shutil.rmtree(replaced)
    fsync_folder(output.parent)


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Writes readable JSON with a final newline."""
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def peak_memory_bytes() -> int:
    """The most host memory this process has held."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def parse_size(text: str) -> int:
    """Bytes in a size such as 5GB (10^9), 512MiB (2^20) or 1000000; for argparse."""
    found = re.fullmatch(r"(\d+)\s*([A-Za-z]*)", text.strip())
    if found is None or found[2].upper() not in SIZE_UNITS or int(found[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; legal: a number above 0 with KB, MB, GB, KiB, MiB, GiB")
    return int(found[1]) * SIZE_UNITS[found[2].upper()]


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m megatron_hybrid.tools.convert", description=(__doc__ or "").splitlines()[0]
    )
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("export", help="Megatron torch_dist to Hugging Face")
    command.add_argument(
        "--checkpoint", type=Path, required=True, help="Megatron save folder (its newest iteration) or an iter_ folder"
    )
    command.add_argument("--output", type=Path, required=True, help="Hugging Face folder to make")
    command.add_argument("--iteration", type=int, help="which iteration of the save folder; default: the newest")
    command.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="cast every tensor, A_log and dt_bias too; default: as stored",
    )
    command.add_argument(
        "--tokenizer-model", type=Path, help="SentencePiece model that preprocessed the data; its files are written too"
    )
    command.add_argument(
        "--max-shard-size", type=parse_size, default="5GB", help="largest safetensors file; default: %(default)s"
    )
    command.add_argument("--force", action="store_true", help="replace an earlier export in --output")
    return parser


def main() -> None:
    """Entry point; see the module's docstring."""
    arguments = build_parser().parse_args()
    options = ExportOptions(
        checkpoint=arguments.checkpoint,
        output=arguments.output,
        iteration=arguments.iteration,
        dtype=arguments.dtype,
        tokenizer_model=arguments.tokenizer_model,
        max_shard_bytes=arguments.max_shard_size,
        force=arguments.force,
    )
    print(export(options))


if __name__ == "__main__":
    run_cli(main)
