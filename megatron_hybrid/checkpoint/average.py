"""The mean of checkpoints ("souping"): weights, fp32 master weights and Adam's moments, tensor by tensor.

torch_dist checkpoints hold global tensors, so the sources may have been saved under different parallel layouts. No
process group, model or GPU is needed, and no more than two tensors or so are in memory.

    python -m megatron_hybrid.checkpoint.average --checkpoint RUN@1000 --checkpoint RUN@2000 --output FOLDER
"""

from __future__ import annotations

import argparse
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_hybrid.checkpoint import commit, discovery, masters
from megatron_hybrid.checkpoint.masters import MASTER, OPTIMIZER
from megatron_hybrid.checkpoint.sidecar import FILE_NAME as SIDECAR_FILE
from megatron_hybrid.tools.cli import Parser, ToolError, byte_progress_bar, run_cli
from megatron_hybrid.tools.convert.dcp_writer import DcpWriter
from megatron_hybrid.tools.convert.output_folder import RECORD_FILE, check_apart, new_folder, read_json, write_json
from megatron_hybrid.tools.convert.to_megatron import RELEASE, common_state
from megatron_hybrid.tools.dcp_reader import CONFIG_FILE, FLOAT_DTYPES, METADATA_FILE, TRACKER_FILE, TorchDistCheckpoint
from megatron_hybrid.tools.hf_mapping import config_from_sidecar

if TYPE_CHECKING:
    from torch import Tensor

SUM_TOLERANCE = 1e-6  # of the weights' sum: decimal fractions such as 0.1 are not exact


@dataclass(frozen=True)
class AverageOptions:
    """What is asked for. `checkpoints` are DIR or DIR@ITERATION; `weights` None for the uniform mean."""

    checkpoints: tuple[str, ...]
    output: Path
    weights: tuple[float, ...] | None = None
    optimizer: bool = True
    force: bool = False


def average(options: AverageOptions) -> str:
    """Writes the mean as a committed checkpoint and returns a summary of it.

    With optimizer state it is an ordinary iteration, that of the first source, whose schedule, consumed samples and
    random state it has. Without, it is a release: iteration 0, nothing but weights.

    Raises:
        ToolError: see the messages. Nothing is left under `options.output` then that was not there before.
    """
    check_weights(options.weights, len(options.checkpoints))
    folders = [find_source(text) for text in options.checkpoints]
    output = options.output.resolve()
    check_apart(output, folders)  # before every byte is read
    described = same_model(folders)
    sources = [TorchDistCheckpoint(folder) for folder in folders]
    names = common_names(sources, options.optimizer)
    for folder in folders:  # every byte, as training does before it loads
        if faults := discovery.damaged_files(folder):
            raise ToolError(f"{faults[0]}; use another iteration or copy it again")
    for source in sources:
        if fault := masters.fault(source):
            raise ToolError(fault)
    total_bytes = sum(stored_bytes(sources[0], name) for name in names)
    name = folders[0].name if options.optimizer else RELEASE
    with new_folder(output, total_bytes, options.force, folders) as working:
        write_json(working / SIDECAR_FILE, described)
        hashes = write_mean(sources, names, options, described, working / name)
        commit.adopt(working / name, first_s_description(folders[0]) if options.optimizer else {}, hashes)
        (working / TRACKER_FILE).write_text(RELEASE if name == RELEASE else str(iteration_of(folders[0])))
        write_json(working / RECORD_FILE, record(options, folders, working / name, names))
    return f"{output}: the mean of {len(folders)} checkpoints, {len(names)} tensors, {total_bytes / 1e9:.3f} GB"


def check_weights(weights: Sequence[float] | None, count: int) -> None:
    """Raises ToolError for fewer than two checkpoints or weights that make no mean of them."""
    if count < 2:
        raise ToolError(
            f"--checkpoint: given {count} time(s); a mean needs two or more, each with its own --checkpoint"
        )
    if weights is None:
        return
    text = ",".join(f"{weight:g}" for weight in weights)
    if len(weights) != count:
        raise ToolError(
            f"--weights {text}: {len(weights)} weights for {count} checkpoints; give one for each, in order"
        )
    if not all(math.isfinite(weight) and weight >= 0 for weight in weights):
        raise ToolError(f"--weights {text}: legal: finite numbers of 0 or more (Adam's second moment is no less)")
    if abs(sum(weights) - 1) > SUM_TOLERANCE:
        raise ToolError(f"--weights {text}: their sum is {sum(weights):.9g}, legal: 1; divide each by it")


def find_source(text: str) -> Path:
    """The committed folder that DIR or DIR@ITERATION means: an iteration's own folder, or the newest in a save folder.

    Raises:
        ToolError: there is none, or a newer one in the folder is unusable, so that another would be taken unasked.
    """
    root, iteration = Path(text), None
    head, at, digits = text.rpartition("@")
    if at and not root.exists():
        if not (head and digits.isascii() and digits.isdigit()):
            raise ToolError(f"--checkpoint {text}: legal: DIR or DIR@ITERATION, such as {head or 'DIR'}@1000")
        root, iteration = Path(head), int(digits)
    if not root.is_dir():
        raise ToolError(f"--checkpoint {text}: no such folder; give a save folder, or one of its iterations")
    root = root.resolve()
    if iteration is None and any((root / name).exists() for name in (METADATA_FILE, CONFIG_FILE, commit.MANIFEST)):
        if fault := discovery.fault_of(root):
            raise ToolError(f"--checkpoint {text}: {fault}; give another iteration")
        return root
    found = discovery.survey(root)
    if iteration is not None:
        for candidate in found.complete:
            if candidate.iteration == iteration:
                return candidate.folder
    names = [path.name for path in (*(candidate.folder for candidate in found.complete), *dict(found.skipped))]
    newest = max(names, key=lambda name: (len(name), name), default="")  # "release" is the oldest
    wanted = newest if iteration is None else f"iter_{iteration:07d}"
    complete = ", ".join(candidate.folder.name for candidate in found.complete[:6]) or "none"
    for folder, reason in found.skipped:
        if folder.name == wanted:
            raise ToolError(f"--checkpoint {text}: {wanted}: {reason}; complete there: {complete}")
    if iteration is not None or not found.complete:
        raise ToolError(f"--checkpoint {text}: no {wanted or 'checkpoint'} in it; complete there: {complete}")
    return found.complete[0].folder


def same_model(folders: Sequence[Path]) -> dict[str, Any]:
    """The first source's sidecar; ToolError if another's says that it is another model."""
    what_to_do = "training writes it beside its checkpoints; copy it from the run"
    sidecars = [read_json(folder.parent / SIDECAR_FILE, what_to_do) for folder in folders]
    first = sidecars[0]
    for folder, other in zip(folders, sidecars, strict=True):
        for key in sorted(first.keys() | other.keys()):
            if first.get(key) != other.get(key):
                raise ToolError(
                    f"{folder}: another model than {folders[0]} ({key}: {other.get(key)!r}, there {first.get(key)!r}); "
                    "only checkpoints of one model have a mean"
                )
    return first


def common_names(sources: Sequence[TorchDistCheckpoint], optimizer: bool) -> list[str]:
    """Tensors to average, in the first's order; ToolError for one that is not in every source with one shape."""
    kept = [
        {name: tensor for name, tensor in source.tensors.items() if optimizer or not name.startswith(OPTIMIZER)}
        for source in sources
    ]
    for source, tensors in zip(sources, kept, strict=True):
        for name in sorted(kept[0].keys() ^ tensors.keys()):
            has, lacks = (sources[0], source) if name in kept[0] else (source, sources[0])
            hint = "; --without-optimizer averages the weights alone" if name.startswith(OPTIMIZER) else ""
            raise ToolError(f"tensor {name}: {has.folder} has it, {lacks.folder} does not{hint}")
        for name, tensor in tensors.items():
            source.check(name)
            if tensor.shape != kept[0][name].shape:
                raise ToolError(
                    f"tensor {name}: {list(kept[0][name].shape)} in {sources[0].folder}, "
                    f"{list(tensor.shape)} in {source.folder}; only checkpoints of one model have a mean"
                )
    if optimizer and not any(name.startswith(OPTIMIZER) for name in kept[0]):
        raise ToolError(f"{sources[0].folder}: it holds no optimizer state; add --without-optimizer")
    return list(kept[0])


def stored_bytes(source: TorchDistCheckpoint, name: str) -> int:
    """Bytes of a tensor's elements."""
    import torch

    stored = source.stored(name)
    return math.prod(stored.shape) * int(getattr(torch, stored.dtype).itemsize)


def mean(sources: Sequence[TorchDistCheckpoint], name: str, weights: Sequence[float] | None) -> Tensor:
    """One tensor's mean on the CPU, summed in fp32 (fp64 where it is stored so), in the first source's dtype.

    A weight that every source has an fp32 master of is the rounded mean of the masters, as training would have it:
    the mean of rounded weights is another number, and would not belong to the optimizer state.

    Raises:
        ToolError: integers that are not equal in all sources, or a chunk that cannot be read.
    """
    import torch

    first = sources[0].stored(name)
    dtype = getattr(torch, first.dtype)
    read_name = MASTER + name if all(MASTER + name in source.tensors for source in sources) else name
    if first.dtype not in FLOAT_DTYPES:
        value = sources[0].read(name)
        for source in sources[1:]:
            if not torch.equal(value, source.read(name)):
                raise ToolError(f"tensor {name}: {first.dtype}, not equal in {sources[0].folder} and {source.folder}")
        return value
    total = torch.zeros(first.shape, dtype=torch.float64 if first.dtype == "float64" else torch.float32)
    for index, source in enumerate(sources):
        total.add_(source.read(read_name).to(total.dtype), alpha=weights[index] if weights else 1.0)
    if weights is None:
        total.div_(len(sources))  # once, so that the mean of equal tensors is that tensor
    return total.to(dtype)


def write_mean(
    sources: Sequence[TorchDistCheckpoint],
    names: Sequence[str],
    options: AverageOptions,
    described: dict[str, Any],
    folder: Path,
) -> dict[str, dict[str, Any]]:
    """Writes the torch_dist folder, its mark of completeness last; what is no tensor is the first source's.

    Returns:
        The hashes of its files.
    """
    folder.mkdir()
    total_bytes = sum(stored_bytes(sources[0], name) for name in names)
    with DcpWriter(folder) as writer, byte_progress_bar("average", total_bytes) as bar:
        for name in names:
            value = mean(sources, name, options.weights)
            writer.add_tensor(name, value)
            bar.update(value.nbytes)
        for name in sources[0].objects:
            if options.optimizer or "_extra_state" in name:
                with sources[0].open_object(name) as handle:
                    writer.add_bytes(name, handle.read())
        if not options.optimizer:
            state = common_state(config_from_sidecar(described, str(sources[0].folder.parent / SIDECAR_FILE)), None)
            writer.add_object("common_state/shard_0_1", [state])
    shutil.copyfile(sources[0].folder / CONFIG_FILE, folder / CONFIG_FILE)
    return writer.hashes


def iteration_of(folder: Path) -> int:
    """The iteration that a committed folder is of; 0 for a release."""
    return int(commit.read_json(folder / commit.MANIFEST)["iteration"])


def first_s_description(folder: Path) -> dict[str, Any]:
    """What a manifest says beside its files, such as the data, which a continuation compares with its own."""
    known = commit.read_json(folder / commit.MANIFEST)
    return {key: value for key, value in known.items() if key not in ("format", "iteration", "files")}


def record(options: AverageOptions, folders: Sequence[Path], made: Path, names: Sequence[str]) -> dict[str, Any]:
    """What the output says of itself; the hash of a manifest, which has all files' hashes, names a checkpoint."""
    weights = options.weights or [1 / len(folders)] * len(folders)
    return {
        "status": "complete",
        "format": 1,
        "direction": "average",
        "folder": made.name,
        "optimizer": options.optimizer,
        "tensors": len(names),
        "manifest_xxh3": commit.hash_file(made / commit.MANIFEST)["xxh3"],
        "sources": [
            {
                "folder": str(folder),
                "iteration": iteration_of(folder),
                "weight": weight,
                "manifest_xxh3": commit.hash_file(folder / commit.MANIFEST)["xxh3"],
            }
            for folder, weight in zip(folders, weights, strict=True)
        ],
    }


def parse_weights(text: str) -> tuple[float, ...]:
    """Numbers with commas between them; for argparse."""
    try:
        return tuple(float(word) for word in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r}: legal: numbers with commas between them, such as 0.5,0.5"
        ) from None


def main() -> None:
    parser = Parser(
        prog="python -m megatron_hybrid.checkpoint.average",
        description="Write the mean of checkpoints of one model, saved under any layouts, as a checkpoint that "
        "training loads. Iteration, schedules, consumed samples and random state are those of the first.",
    )
    parser.add_argument(
        "--checkpoint", action="append", default=[], metavar="DIR[@ITERATION]",
        help="a save folder (its newest iteration, or ITERATION) or an iteration's folder; twice or more",
    )  # fmt: skip
    parser.add_argument("--weights", type=parse_weights, help="0.5,0.3,...: one each, sum 1; default: all the same")
    parser.add_argument("--output", type=Path, required=True, help="save folder to make")
    parser.add_argument(
        "--without-optimizer", action="store_true", help="weights alone: training starts from them at iteration 0"
    )
    parser.add_argument("--force", action="store_true", help="replace an earlier mean or conversion in --output")
    given = parser.parse_args()
    optimizer = not given.without_optimizer
    print(average(AverageOptions(tuple(given.checkpoint), given.output, given.weights, optimizer, given.force)))


if __name__ == "__main__":
    run_cli(main)
