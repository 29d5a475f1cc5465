"""Whether a Megatron checkpoint and a Hugging Face folder are the same model, as one table.

Weights are compared bit by bit in both directions of the map; the models themselves are compared by running them, each
in a process of its own: Megatron's, and transformers', which shares no code with this project.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_hybrid.checkpoint.commit import COMPLETE
from megatron_hybrid.checkpoint.discovery import fault_of
from megatron_hybrid.tools.cli import ToolError, byte_progress_bar
from megatron_hybrid.tools.convert.hf_config import read_hf_config
from megatron_hybrid.tools.convert.hf_source import read_record
from megatron_hybrid.tools.convert.output_folder import RECORD_FILE
from megatron_hybrid.tools.convert.safetensors_folder import ITEM_BYTES, TensorPlace, read_folder, read_tensor
from megatron_hybrid.tools.convert.source import FP32_ISLANDS, MegatronSource, open_megatron, sha256_of
from megatron_hybrid.tools.convert.verify_models import compare_models
from megatron_hybrid.tools.convert.verify_rows import Row
from megatron_hybrid.tools.dcp_reader import TorchDistCheckpoint
from megatron_hybrid.tools.hf_mapping import hf_tensor_shapes, to_hf, to_megatron

if TYPE_CHECKING:
    from torch import Tensor

SHOWN = 4  # names shown of those that differ
CONFIG_MAY_DIFFER = {"true_vocab_size", "max_position_embeddings", "eos_token_id", "pad_token_id"}


@dataclass(frozen=True)
class VerifyOptions:
    """What `verify` is asked to do."""

    checkpoint: Path
    model: Path
    iteration: int | None = None
    text: Path | None = None
    tolerance: float = 1e-4
    weights_only: bool = False


def verify(options: VerifyOptions) -> list[Row]:
    """Every comparison, in the order in which they are shown.

    Raises:
        ToolError: one of the two cannot be read at all.
    """
    if options.weights_only and options.text:
        raise ToolError(f"--text {options.text}: with --weights-only no model reads it; give one of the two")
    source = open_megatron(options.checkpoint, options.iteration)
    _check_files(source.checkpoint)
    if not options.model.is_dir():
        raise ToolError(f"--model {options.model}: no such folder; give a folder with config.json and safetensors")
    places = read_folder(options.model, follow_symlinks=True)
    rows = [_config_row(source, options.model), *_structure_rows(source, places)]
    rows += _weight_rows(source, places, options.model)
    names = ("logits", "logits, packed", "32 greedy tokens", "perplexity")
    if options.weights_only:
        return [*rows, *(Row(name, None, "not run: --weights-only") for name in names)]
    if any(row.holds is False for row in rows[:4]):
        return [*rows, *(Row(name, False, "not run: the rows above must hold first") for name in names)]
    return [*rows, *compare_models(source, options.model, options.text, options.tolerance)]


def _check_files(checkpoint: TorchDistCheckpoint) -> None:
    """Sizes of all files, those of the optimizer too, which no row reads.

    Raises:
        ToolError: a file is missing, shorter than `.metadata` says, or not of the size that the save's manifest says.
    """
    for name in checkpoint.tensors:
        checkpoint.check(name)
    for name in checkpoint.objects:
        with checkpoint.open_object(name):
            pass
    if (checkpoint.folder / COMPLETE).exists() and (fault := fault_of(checkpoint.folder)):
        raise ToolError(f"{checkpoint.folder}: {fault}; use another iteration or copy it again")


def table(rows: list[Row]) -> str:
    """The rows as aligned text."""
    words = {True: "holds", False: "FAILS", None: "-"}
    name_width = max(len(row.name) for row in rows)
    return "\n".join(f"{row.name:<{name_width}}  {words[row.holds]:<5}  {row.what}" for row in rows)


def _config_row(source: MegatronSource, folder: Path) -> Row:
    """config.json against the sidecar."""
    theirs, ours = read_hf_config(folder, None), source.config
    differing = [
        f"{name}: {getattr(ours, name)!r} in the checkpoint, {getattr(theirs, name)!r} in config.json"
        for name in type(ours).__dataclass_fields__
        if name not in CONFIG_MAY_DIFFER and _meaning(ours, name) != _meaning(theirs, name)
    ]
    return Row("config", not differing, "; ".join(differing) or "config.json describes the checkpoint")


def _meaning(config: object, name: str) -> object:
    """A value as far as it means something: stage marks do not, nor do Gated DeltaNet's sizes in an OLMo 3."""
    value = getattr(config, name)
    if name == "hybrid_layer_pattern":
        return value.replace("|", "")
    return None if name.startswith("linear_") and not config.is_hybrid else value  # type: ignore[attr-defined]


def _structure_rows(source: MegatronSource, places: dict[str, TensorPlace]) -> Iterator[Row]:
    """Names, shapes and dtypes against what the configuration makes: at 7B the 523 released ones."""
    expected = hf_tensor_shapes(source.config)
    problems = [f"{name} is missing" for name in expected if name not in places]
    problems += [f"{name} is extra" for name in places if name not in expected]
    yield _row("names", problems, f"{len(expected)}, all as released")
    shapes = [
        f"{name} is {list(places[name].shape)} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in places and places[name].shape != shape
    ]
    yield _row("shapes", shapes, f"{sum(math.prod(shape) for shape in expected.values()):,} parameters")
    plain = Counter(place.dtype for name, place in places.items() if not name.endswith(FP32_ISLANDS))
    common = plain.most_common(1)[0][0] if plain else ""
    legal = {common, "float32"}
    dtypes = [
        f"{name} is {place.dtype}"
        for name, place in places.items()
        if place.dtype not in ({common} if not name.endswith(FP32_ISLANDS) else legal) or place.dtype not in ITEM_BYTES
    ]
    islands = sorted({place.dtype for name, place in places.items() if name.endswith(FP32_ISLANDS)})
    yield _row("dtypes", dtypes, f"{common}; A_log and dt_bias {', '.join(islands) or 'absent'}")


def _weight_rows(source: MegatronSource, places: dict[str, TensorPlace], folder: Path) -> list[Row]:
    """Every tensor against the checkpoint, bit by bit, and against the recorded SHA-256."""
    recorded = read_record(folder).get("tensors", {})
    differing: list[str] = []
    hashes: list[str] = []
    total_bytes = sum(place.size_bytes for place in places.values())
    with byte_progress_bar("verify", total_bytes) as bar:
        for rule in source.rules:
            stored = source.checkpoint.read(rule.megatron)
            parts = to_hf(rule, stored, source.config)
            names = [name for name, shape in rule.hf if name in places and places[name].shape == shape]
            tensors = {name: read_tensor(places[name]) for name in names if places[name].dtype in ITEM_BYTES}
            equal = len(tensors) == len(rule.hf)
            for name, tensor in tensors.items():
                if where := first_difference(parts[name].to(tensor.dtype), tensor):
                    differing.append(f"{name} differs in {where}")
                    equal = False
                if name in recorded and sha256_of(tensor) != recorded[name].get("sha256"):
                    hashes.append(name)
                bar.update(tensor.nbytes)
            if equal:  # and the other way: the folder's tensors make the checkpoint's
                made = to_megatron(rule, tensors, source.config)
                if where := first_difference(stored[: len(made)].to(made.dtype), made):
                    differing.append(f"{rule.megatron} differs in {where}")
    compared = f"{len(places)} tensors bit-equal to the checkpoint's, both ways"
    rows = [_row("weights", differing, compared)]
    if recorded:
        rows.append(_row("SHA-256", hashes, f"{len(recorded)} as {RECORD_FILE} says"))
    return rows


def first_difference(expected: Tensor, found: Tensor) -> str:
    """Where two tensors of one shape and dtype differ, bit by bit, in words; empty if they are the same."""
    import torch

    width = {4: torch.int32, 2: torch.int16}[found.element_size()]
    one, other = expected.reshape(-1).view(width), found.reshape(-1).view(width)
    if torch.equal(one, other):
        return ""
    different = one != other
    count = int(different.sum())
    if found.dim() < 2:
        return f"{count} of {found.numel()} elements"
    rows = different.view(found.shape[0], -1).any(1).nonzero().flatten()
    return f"{count:,} of {found.numel():,} elements, rows {int(rows[0])} to {int(rows[-1])}"


def _row(name: str, problems: list[str], otherwise: str) -> Row:
    """A row that holds where there is no problem, and names the first ones where there is."""
    if not problems:
        return Row(name, True, otherwise)
    more = f"; {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
    return Row(name, False, "; ".join(problems[:SHOWN]) + more)
