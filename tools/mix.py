"""Plans a mix of preprocessed sources, and writes what training reads: data arguments and an instance index.

    python -m megatron_hybrid.tools.mix --mix mix.yaml --data tokens/web tokens/code --sequence-length 8192 \\
        --output-dir mix

A mix file, YAML or JSON:

    stages:
      - name: pretrain
        tokens: 1_000_000_000_000
        sources:
          web:  {ratio: 0.8, max_epochs: 4, buckets: {web-high: 4, web-mid: 2, web-low: 1}}
          code: {ratio: 0.2, max_epochs: 2}
          math: {tokens: 20_000_000_000}

`buckets` names sources of the data and how often each is read relative to the others. Ai2's own files are read
too: a list of `label,path` lines (everything once) and a YAML of `source_name`, `target_ratio`, `paths`.
Nothing but manifests and index headers is read to plan. What the data cannot give is refused, and by how much.
"""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_hybrid.tools.cli import Parser, ToolError, run_cli

if TYPE_CHECKING:
    from megatron_hybrid.tools.corpus.mixture import Dataset, Row, SourcePlan, Stage

SOURCE_KEYS = {"tokens", "ratio", "max_epochs", "buckets"}


def _number(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
        raise ToolError(f"{where}: {value!r} must be a number from 0 on")
    return float(value)


def _parts(name: str, entry: dict[str, Any], data: dict[str, list["Dataset"]], where: str) -> list[Any]:
    from megatron_hybrid.tools.corpus.mixture import Part

    parts = []
    for bucket, factor in (entry.get("buckets") or {name: 1}).items():
        if bucket not in data:
            raise ToolError(
                f"{where}: no data of the name {bucket!r}; --data holds {', '.join(sorted(data)) or 'nothing'}"
            )
        parts.append(Part(bucket, data[bucket], _number(factor, f"{where}, bucket {bucket}")))
    return parts


def _source(name: str, entry: Any, data: dict[str, list["Dataset"]], where: str) -> "SourcePlan":
    from megatron_hybrid.tools.corpus.mixture import SourcePlan

    if not isinstance(entry, dict) or set(entry) - SOURCE_KEYS:
        raise ToolError(f"{where}: {entry!r} must be an object with the keys {', '.join(sorted(SOURCE_KEYS))}")
    tokens = entry.get("tokens")
    return SourcePlan(
        name,
        _parts(name, entry, data, where),
        None if tokens is None else int(_number(tokens, f"{where}, tokens")),
        None if entry.get("ratio") is None else _number(entry["ratio"], f"{where}, ratio"),
        _number(entry.get("max_epochs", 1), f"{where}, max_epochs"),
    )


def _ai2_ratio_stage(path: Path, content: dict[str, Any], total: int | None) -> "Stage":
    """A stage of OLMo-core's source mixture: source_name, target_ratio, paths, max_repetition_ratio."""
    from megatron_hybrid.tools.corpus.mixture import Part, SourcePlan, Stage, dataset_of_prefix

    sources = []
    for entry in content["sources"]:
        name = entry.get("source_name")
        if not name or "target_ratio" not in entry or not entry.get("paths"):
            raise ToolError(f"{path}: {entry!r} must have source_name, target_ratio and paths")
        datasets = [dataset_of_prefix(_as_prefix(one), name) for one in entry["paths"]]
        cap = _number(entry.get("max_repetition_ratio", 1), f"{path}, {name}, max_repetition_ratio")
        ratio = _number(entry["target_ratio"], f"{path}, {name}, target_ratio")
        sources.append(SourcePlan(name, [Part(name, datasets)], None, ratio, cap))
    tokens = content.get("requested_tokens", content.get("max_tokens", total))
    return Stage("train", None if tokens is None else int(tokens), sources)


def _ai2_path_stage(text: str, root: Path, total: int | None) -> "Stage":
    """A stage that reads every file of a `label,path` list once."""
    from megatron_hybrid.tools.corpus.mixture import Part, SourcePlan, Stage, dataset_of_prefix

    by_label: dict[str, list[Any]] = {}
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        label, comma, path = line.partition(",")
        if not comma:
            raise ToolError(f"--mix: line {number} is {line!r}, not label,path")
        by_label.setdefault(label, []).append(dataset_of_prefix(str(root / _as_prefix(path)), label))
    sources = [
        SourcePlan(label, [Part(label, datasets)], tokens=sum(one.tokens for one in datasets))
        for label, datasets in by_label.items()
    ]
    return Stage("train", total, sources)


def _as_prefix(path: str) -> str:
    """The prefix a token file was imported or preprocessed under: its path without suffix."""
    for suffix in (".npy", ".bin", ".idx"):
        path = path.removesuffix(suffix)
    return path


def read_mix(path: Path, data: dict[str, list["Dataset"]], root: Path, total: int | None) -> list["Stage"]:
    """The stages of a mix file of any of the three formats; raises ToolError that names what is wrong in it."""
    from megatron_hybrid.tools.corpus.mixture import Stage

    try:
        text = path.read_text()
    except FileNotFoundError:
        raise ToolError(f"--mix {path}: no such file") from None
    if path.suffix == ".txt":
        return [_ai2_path_stage(text, root, total)]
    import yaml  # type: ignore[import-untyped]

    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ToolError(f"--mix {path}: not YAML: {str(error).splitlines()[0]}") from None
    if isinstance(content, dict) and isinstance(content.get("sources"), list):
        return [_ai2_ratio_stage(path, content, total)]
    if not isinstance(content, dict) or not isinstance(content.get("stages"), list):
        raise ToolError(f"--mix {path}: needs a list `stages` (or Ai2's `sources`); see --help")
    stages = []
    for number, entry in enumerate(content["stages"]):
        if not isinstance(entry, dict) or not isinstance(entry.get("sources"), dict) or not entry["sources"]:
            raise ToolError(f"--mix {path}: stage {number} needs `sources`, an object")
        name = str(entry.get("name", f"stage{number}"))
        tokens = entry.get("tokens")
        sources = [
            _source(source, one, data, f"--mix {path}, stage {name}, source {source}")
            for source, one in entry["sources"].items()
        ]
        stages.append(Stage(name, None if tokens is None else int(_number(tokens, f"stage {name}, tokens")), sources))
    return stages


def table(rows: list["Row"]) -> str:
    """The plan as text."""
    lines = [
        f"{'stage':<12} {'source':<24} {'tokens':>22} {'share':>7} {'available':>22} {'epochs':>8} {'in all':>8} "
        f"{'left over':>22}"
    ]
    for row in rows:
        whole = sum(other.tokens for other in rows if other.stage == row.stage)
        name = row.source if row.part == row.source else f"{row.source}/{row.part}"
        lines.append(
            f"{row.stage:<12} {name:<24} {row.tokens:>22,} {row.tokens / max(whole, 1):>7.2%} {row.available:>22,} "
            f"{row.epochs:>8.3f} {row.epochs_so_far:>8.3f} {row.left_over:>22,}"
        )
    return "\n".join(lines)


def draw(path: Path, rows: list["Row"]) -> None:
    """Tokens by source and stage, and epochs, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = [f"{row.stage}: {row.part}" for row in rows]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 1 + 0.4 * len(rows)), sharey=True)
    left.barh(names, [row.tokens for row in rows])
    left.set(xlabel="tokens", title="Tokens of the mix")
    right.barh(names, [row.epochs_so_far for row in rows])
    right.axvline(1, color="black", linewidth=0.8)
    right.set(xlabel="epochs, from the first stage on", title="Repetition")
    left.invert_yaxis()
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def write_outputs(
    folder: Path, rows: list["Row"], datasets: dict[str, "Dataset"], validation: list[str], sequence_length: int
) -> list[Path]:
    """Writes, per stage, Megatron's two argument files and the instance index with what it is of; returns their paths.

    Up to 1 MiB of each dataset is read for its fingerprint.
    """
    import numpy as np

    from megatron_hybrid.tools.atomic_file import atomic_open
    from megatron_hybrid.tools.corpus.fingerprint import fingerprint
    from megatron_hybrid.tools.corpus.mixture import blend_of, instance_blocks
    from megatron_hybrid.tools.indexed_dataset import bin_path

    written = []
    for stage in dict.fromkeys(row.stage for row in rows):
        words = blend_of([row for row in rows if row.stage == stage])
        prefixes = words[1::2]
        files = {
            f"{stage}.data_args.json": {"train": words, "valid": validation or None, "test": None},
            f"{stage}.sequences.json": {
                prefix: [datasets[prefix].sequences, datasets[prefix].documents + 1] for prefix in prefixes
            },
            f"{stage}.prefixes.json": prefixes,
        }
        for name, content in files.items():
            written.append(folder / name)
            with atomic_open(written[-1]) as handle:
                handle.write(json.dumps(content, indent=1).encode() + b"\n")
        counts = [int(word) for word in words[::2]]
        written.append(folder / f"{stage}.instances.json")
        about = {
            "sequence_length": sequence_length,
            "instances": sum(counts),
            "datasets": [
                {"prefix": one, "tokens": datasets[one].tokens, "fingerprint": fingerprint(bin_path(one))[0]}
                for one in prefixes
            ],
        }
        with atomic_open(written[-1]) as handle:
            handle.write(json.dumps(about, indent=1).encode() + b"\n")
        written.append(folder / f"{stage}.instances.npy")
        with atomic_open(written[-1]) as handle:
            dtype = np.dtype([("dataset", "<i2"), ("sample", "<i8")])
            header = {"descr": dtype.descr, "fortran_order": False, "shape": (sum(counts),)}
            np.lib.format.write_array_header_1_0(handle, header)
            for numbers, samples in instance_blocks(counts):
                block = np.empty(numbers.size, dtype=dtype)
                block["dataset"], block["sample"] = numbers, samples
                handle.write(block.tobytes())
    return written


def parser() -> argparse.ArgumentParser:
    """The command line of this tool."""
    result = Parser(
        prog="python -m megatron_hybrid.tools.mix",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument(
        "--mix", type=Path, required=True, metavar="FILE", help="mix file (.yaml, .json; .txt: label,path)"
    )
    result.add_argument(
        "--data", nargs="+", default=[], metavar="PATH", help="folders and prefixes that preprocess made"
    )
    result.add_argument(
        "--root", type=Path, default=Path(), metavar="DIR", help="what paths of a label,path list start at"
    )
    result.add_argument("--tokens", type=int, metavar="N", help="total, for Ai2's files that name none")
    result.add_argument(
        "--sequence-length", type=int, required=True, metavar="N", help="tokens per sample, as in training"
    )
    result.add_argument("--valid", nargs="+", default=[], metavar="PREFIX", help="prefixes of the validation split")
    result.add_argument(
        "--output-dir", type=Path, metavar="D", help="write the files of training there (default: only plan)"
    )
    return result


def main() -> None:
    """Command-line entry point."""
    from megatron_hybrid.tools.corpus.mixture import load_datasets, plan_mix, warnings_of

    args = parser().parse_args()
    if args.sequence_length < 1:
        raise ToolError(f"--sequence-length {args.sequence_length}: must be 1 or more")
    stages = read_mix(args.mix, load_datasets(args.data), args.root, args.tokens)
    rows = plan_mix(stages, args.sequence_length)
    datasets = {
        dataset.prefix: dataset
        for stage in stages
        for source in stage.sources
        for part in source.parts
        for dataset in part.datasets
    }
    print(table(rows))
    for warning in warnings_of(rows, datasets, args.sequence_length):
        print(f"warning: {warning}")
    if args.output_dir:
        valid = [word for prefix in args.valid for word in ("1", prefix)]
        written = write_outputs(args.output_dir, rows, datasets, valid, args.sequence_length)
        draw(args.output_dir / "mix.png", rows)
        print(f"written: {', '.join(str(path) for path in [*written, args.output_dir / 'mix.png'])}")


if __name__ == "__main__":
    run_cli(main)
