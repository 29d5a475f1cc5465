"""What a folder holds, without reading any weights: kind, model, sizes, optimizer state, and the flags to train it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_hybrid.tools.cli import ToolError
from megatron_hybrid.tools.convert.hf_source import HfSource, open_hf
from megatron_hybrid.tools.convert.model_flags import training_flags
from megatron_hybrid.tools.convert.olmo_core import OlmoCoreSource, is_olmo_core, open_olmo_core
from megatron_hybrid.tools.convert.output_folder import RECORD_FILE, read_json
from megatron_hybrid.tools.convert.safetensors_folder import ITEM_BYTES
from megatron_hybrid.tools.convert.source import EXP_AVG, MegatronSource, Source, open_megatron
from megatron_hybrid.tools.dcp_reader import CONFIG_FILE, METADATA_FILE, TRACKER_FILE
from megatron_hybrid.tools.hf_mapping import ModelConfig


@dataclass(frozen=True)
class InfoOptions:
    """What `info` is asked about."""

    folder: Path
    iteration: int | None = None
    config: Path | None = None
    follow_symlinks: bool = False


def info(options: InfoOptions) -> str:
    """A table of what the folder holds.

    Raises:
        ToolError: it holds no model of this family, or the model is not whole; the message says what is wrong.
    """
    source = open_any(options)
    rows = [("folder", str(source.folder)), *_kind_rows(source), *_model_rows(source)]
    width = max(len(label) for label, _ in rows)
    return "\n".join(f"{label:<{width}}  {value}" for label, value in rows)


def open_any(options: InfoOptions) -> Source:
    """The model in a folder of any kind that can be read."""
    folder, iteration = options.folder, options.iteration
    if not folder.is_dir():
        raise ToolError(f"{folder}: no such folder")
    if any((folder / name).exists() for name in (TRACKER_FILE, CONFIG_FILE)) or iteration is not None:
        return open_megatron(folder, iteration)
    if is_olmo_core(folder):
        return open_olmo_core(folder, options.config)
    if (folder / "config.json").exists():
        return open_hf(folder, follow_symlinks=options.follow_symlinks)
    raise ToolError(
        f"{folder}: none of {TRACKER_FILE}, {METADATA_FILE}, config.json is in it; "
        "give a Megatron save folder, an OLMo-core checkpoint or a Hugging Face folder"
    )


def _kind_rows(source: Source) -> Iterator[tuple[str, str]]:
    if isinstance(source, MegatronSource):
        yield "kind", "Megatron torch_dist"
        has_state = f"optimizer.state.{EXP_AVG}.output_layer.weight" in source.checkpoint.tensors
        yield "optimizer state", "yes" if has_state else "no"
        record = source.folder.parent / RECORD_FILE
        if record.is_file():
            yield "imported from", str(read_json(record, "copy it again").get("source"))
    elif isinstance(source, OlmoCoreSource):
        yield "kind", f"OLMo-core, names of its {source.dialect}"
        yield "optimizer state", f"Adam at step {source.check_optimizer():g}" if source.has_optimizer else "no"
    elif isinstance(source, HfSource):
        yield "kind", "Hugging Face"
        dialects = sorted(set(source.renamed.values()))
        yield "names", f"{len(dialects)} of another dialect, first {dialects[0]}" if dialects else "as released"
        yield "SHA-256", "recorded" if source.recorded else "not recorded"


def _model_rows(source: Source) -> Iterator[tuple[str, str]]:
    config = source.config
    yield "architecture", "OLMo-Hybrid" if config.is_hybrid else "OLMo 3"
    yield "layers", f"{len(config.layer_types)}: {shortened(config)}"
    yield "hidden, FFN", f"{config.hidden_size}, {config.intermediate_size}"
    yield "attention heads", f"{config.num_attention_heads} x {config.head_dim}, {config.num_key_value_heads} key/value"
    if config.is_hybrid:
        heads = f"{config.linear_num_key_heads} key, {config.linear_num_value_heads} value"
        sizes = f"K {config.linear_key_head_dim}, V {config.linear_value_head_dim}"
        yield "Gated DeltaNet", f"{heads} heads, {sizes}, convolution {config.linear_conv_kernel_dim}"
    yield "vocabulary", f"{config.vocab_size:,} rows, {config.true_vocab_size:,} tokens"
    yarn = f", YaRN: {config.rope_scaling}" if config.rope_scaling else ""
    yield "rope_theta", "none (NoPE)" if config.rope_theta is None else f"{config.rope_theta:g}{yarn}"
    names = sum(len(rule.hf) for rule in source.rules)
    numbers = {rule: math.prod(rule.megatron_shape) for rule in source.rules}
    yield "parameters", f"{sum(numbers.values()):,} in {names} tensors"
    dtypes: dict[str, int] = {}
    for rule, count in numbers.items():
        dtypes[source.dtype(rule)] = dtypes.get(source.dtype(rule), 0) + count
    yield "dtypes", ", ".join(f"{name} {count:,}" for name, count in sorted(dtypes.items()))
    yield "weights", f"{sum(count * ITEM_BYTES[name] for name, count in dtypes.items()) / 1e9:.3f} GB"
    yield "train with", " ".join(training_flags(config))


def shortened(config: ModelConfig) -> str:
    """A layer pattern with its repeated unit written once."""
    pattern = config.hybrid_layer_pattern.replace("|", "")
    for length in range(1, len(pattern) + 1):
        unit, rest = pattern[:length], len(pattern) % length
        if not rest and unit * (len(pattern) // length) == pattern:
            return f"{unit} x {len(pattern) // length}"
    return pattern
