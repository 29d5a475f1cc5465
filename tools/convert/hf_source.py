"""A Hugging Face folder as a source: any dialect of the names, every tensor checked before the first is read."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_hybrid.tools.cli import ToolError
from megatron_hybrid.tools.convert.hf_config import read_hf_config
from megatron_hybrid.tools.convert.output_folder import RECORD_FILE, read_json
from megatron_hybrid.tools.convert.safetensors_folder import ITEM_BYTES, TensorPlace, read_folder, read_tensor
from megatron_hybrid.tools.convert.source import PARAM
from megatron_hybrid.tools.convert.tokenizer_files import tokenizer_size
from megatron_hybrid.tools.hf_mapping import Layout, ModelConfig, Shape, TensorRule, tensor_rules

if TYPE_CHECKING:
    from torch import Tensor

#: What else a released name is called on disk, by the end of the name; transformers renames some on loading.
ALIASES = (
    # transformers' save_pretrained, and the early test checkpoints: norms of Gated DeltaNet layers, one of attention's.
    ("input_layernorm.weight", "attention_layer_norm.weight"),
    ("post_attention_layernorm.weight", "feedforward_layer_norm.weight"),
    # OLMo-core's exporter since June 2026; transformers loads such a file with random weights and a warning.
    ("linear_attn.o_proj.weight", "linear_attn.out_proj.weight"),
    ("linear_attn.o_norm.weight", "linear_attn.norm.weight"),
)
CONVOLUTIONS = tuple(f"linear_attn.{part}_conv1d.weight" for part in "qkv")


@dataclass(frozen=True)
class HfSource:
    """A Hugging Face folder that was found to be whole. `places` has the released names, `renamed` what they were."""

    folder: Path
    config: ModelConfig
    rules: list[TensorRule]
    places: dict[str, TensorPlace]
    renamed: dict[str, str]
    recorded: dict[str, str] = field(default_factory=dict)  # SHA-256 by name, where the folder says it

    @property
    def dialect(self) -> str:
        """Whose names the folder has, in words."""
        return f"{len(self.renamed)} of another dialect, the rest released" if self.renamed else "released"

    def dtype(self, rule: TensorRule) -> str:
        return self.places[rule.hf[0][0]].dtype

    def read(self, rule: TensorRule, state: str = PARAM) -> dict[str, Tensor]:
        if state != PARAM:
            raise ToolError(f"{self.folder}: a Hugging Face folder holds no optimizer state")
        if rule.layout is Layout.STACKED_ROWS:  # where they belong at once, so that nothing is copied to join them
            import torch

            whole = torch.empty(rule.megatron_shape, dtype=getattr(torch, self.dtype(rule)))
            parts = whole.split([shape[0] for _, shape in rule.hf])
            return {name: read_tensor(self.places[name], part) for (name, _), part in zip(rule.hf, parts, strict=True)}
        return {name: self._read_one(name, shape) for name, shape in rule.hf}

    def check_hash(self, name: str, sha256: str) -> None:
        """Raises ToolError unless a tensor's hash is the one that conversion.json has recorded, if it has one."""
        place = self.places[name]
        if self.recorded.get(place.name, sha256) != sha256:
            raise ToolError(
                f"{place.file}: {place.name} is not what {RECORD_FILE} has recorded (SHA-256); "
                "the file is damaged or was changed, copy it again"
            )

    def _read_one(self, name: str, shape: Shape) -> Tensor:
        if self.places[name].shape != shape:  # save_pretrained's convolutions
            return self._convolution(name)
        return read_tensor(self.places[name])

    def _convolution(self, name: str) -> Tensor:
        """One of q, k and v from a folder that cut them in thirds: joined again and cut where they belong."""
        import torch

        prefix = name[: name.index("linear_attn.")]
        key_rows = self.config.linear_num_key_heads * self.config.linear_key_head_dim
        value_rows = self.config.linear_num_value_heads * self.config.linear_value_head_dim
        joined = torch.cat([read_tensor(self.places[prefix + part]) for part in CONVOLUTIONS])
        parts = joined.split([key_rows, key_rows, value_rows])
        return parts[CONVOLUTIONS.index(name.removeprefix(prefix))].clone()


def open_hf(folder: Path, *, true_vocab_size: int | None = None, follow_symlinks: bool = False) -> HfSource:
    """Opens a Hugging Face folder and checks config, names, shapes, dtypes and file sizes of all tensors.

    Args:
        folder: with config.json and safetensors.
        true_vocab_size: tokens of the tokenizer; None: by the folder's tokenizer.json, else all rows.
        follow_symlinks: whether files may be links, as in a Hugging Face cache.

    Raises:
        ToolError: what is wrong, with the tensor's and the file's name.
    """
    if not folder.is_dir():
        raise ToolError(f"--model {folder}: no such folder; give a folder with config.json and safetensors")
    for name in ("config.json", RECORD_FILE):
        if (folder / name).is_symlink() and not follow_symlinks:
            raise ToolError(f"{folder / name}: it is a symbolic link; give real files, or --follow-symlinks")
    record = read_record(folder)
    true_vocab_size = true_vocab_size or record.get("sidecar", {}).get("true_vocab_size") or tokenizer_size(folder)
    config = read_hf_config(folder, true_vocab_size)
    found = read_folder(folder, follow_symlinks)
    rules = tensor_rules(config)
    places, renamed = _released_names(found, [name for rule in rules for name, _ in rule.hf], folder)
    source = HfSource(folder, config, rules, places, renamed, _hashes(record, folder))
    for rule in rules:
        for name, shape in rule.hf:
            _check_place(source, name, shape)
        dtypes = {places[name].dtype for name, _ in rule.hf}
        if len(dtypes) > 1:
            names = ", ".join(name for name, _ in rule.hf)
            raise ToolError(f"{folder}: {names} have different dtypes ({', '.join(sorted(dtypes))}), not supported")
    return source


def _released_names(
    found: dict[str, TensorPlace], expected: list[str], folder: Path
) -> tuple[dict[str, TensorPlace], dict[str, str]]:
    """The place of each released name, and which were called otherwise; ToolError for a missing or an extra tensor."""
    left = dict(found)
    places, renamed = {}, {}
    for name in expected:
        if name in left:
            places[name] = left.pop(name)
            continue
        for ending, alias in ALIASES:
            other = name.removesuffix(ending) + alias
            if name.endswith(ending) and other in left:
                places[name], renamed[name] = left.pop(other), other
                break
        else:
            close = difflib.get_close_matches(name, left, 1)
            hint = f", but {close[0]} is there" if close else ""
            raise ToolError(f"{folder}: {name} is missing{hint}; the folder is not whole or not of this config.json")
    if left:
        first = next(iter(left.values()))
        raise ToolError(
            f"{first.file}: {first.name} has no place in the model that config.json describes "
            f"({len(left)} such tensors); remove it or correct config.json"
        )
    return places, renamed


def _check_place(source: HfSource, name: str, shape: Shape) -> None:
    place = source.places[name]
    if place.dtype not in ITEM_BYTES:
        raise ToolError(f"{place.file}: {place.name} is {place.dtype}, legal: {', '.join(ITEM_BYTES)}")
    if place.shape == shape:
        return
    if name.endswith(CONVOLUTIONS):
        prefix = name[: name.index("linear_attn.")]
        shapes = [source.places[prefix + part].shape for part in CONVOLUTIONS]
        rows = sum(shape[0] for shape in shapes)
        config = source.config
        key_rows = config.linear_num_key_heads * config.linear_key_head_dim
        value_rows = config.linear_num_value_heads * config.linear_value_head_dim
        third = -(-rows // 3)
        thirds = [third, third, rows - 2 * third]  # how transformers 5.23's save_pretrained cuts its fused convolution
        if rows == 2 * key_rows + value_rows and [s[0] for s in shapes] == thirds:
            return
    raise ToolError(f"{place.file}: {place.name} has shape {list(place.shape)}, but config.json makes it {list(shape)}")


def read_record(folder: Path) -> dict[str, Any]:
    """The conversion.json of a folder that this project has exported; empty for another's."""
    if not (folder / RECORD_FILE).is_file():
        return {}
    values: dict[str, Any] = read_json(folder / RECORD_FILE, "copy it again or remove it")
    if values.get("status") != "complete":
        raise ToolError(f"{folder / RECORD_FILE}: the conversion that wrote this folder did not finish; repeat it")
    return values


def _hashes(record: dict[str, Any], folder: Path) -> dict[str, str]:
    """SHA-256 by tensor, where the folder says it."""
    tensors = record.get("tensors", {})
    if not isinstance(tensors, dict) or not all(isinstance(entry, dict) for entry in tensors.values()):
        raise ToolError(f"{folder / RECORD_FILE}: not a conversion record; copy it again or remove it")
    return {name: str(entry.get("sha256")) for name, entry in tensors.items()}
