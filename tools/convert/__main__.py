"""The command line; see the package's docstring."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from megatron_hybrid.tools import convert
from megatron_hybrid.tools.cli import Parser, ToolError, run_cli
from megatron_hybrid.tools.convert.info import InfoOptions, info
from megatron_hybrid.tools.convert.output_folder import parse_size
from megatron_hybrid.tools.convert.to_huggingface import ExportOptions, export
from megatron_hybrid.tools.convert.to_megatron import ImportOptions, import_model
from megatron_hybrid.tools.convert.to_olmo_core import OlmoCoreOptions, export_olmo_core
from megatron_hybrid.tools.convert.verify import VerifyOptions, table, verify

DTYPES = ("float32", "bfloat16")


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(prog="python -m megatron_hybrid.tools.convert", description=(convert.__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    _add_import(commands.add_parser("import", help="Hugging Face or OLMo-core to Megatron torch_dist"))
    _add_export(commands.add_parser("export", help="Megatron torch_dist to Hugging Face or OLMo-core"))
    _add_verify(commands.add_parser("verify", help="are a Megatron checkpoint and a Hugging Face folder one model?"))
    _add_info(commands.add_parser("info", help="what a folder holds, and the flags to train it"))
    return parser


def _add_import(command: argparse.ArgumentParser) -> None:
    command.add_argument("--model", type=Path, required=True, help="Hugging Face folder, or OLMo-core's stepN folder")
    command.add_argument(
        "--config", type=Path, help="folder with the Hugging Face config.json of an OLMo-core model (and its tokenizer)"
    )
    command.add_argument("--output", type=Path, required=True, help="Megatron save folder to make; give it to --load")
    command.add_argument(
        "--dtype", choices=DTYPES, help="cast every tensor but A_log and dt_bias, which become fp32; default: as stored"
    )
    command.add_argument(
        "--true-vocab-size", type=int, help="tokens of the tokenizer; default: by tokenizer.json, else all rows"
    )
    command.add_argument(
        "--follow-symlinks", action="store_true", help="read files that are symbolic links, as in a Hugging Face cache"
    )
    command.add_argument("--force", action="store_true", help="replace an earlier import in --output")
    command.add_argument(
        "--optimizer",
        action="store_true",
        help="OLMo-core's Adam state too; train with --use-distributed-optimizer",
    )
    command.add_argument("--global-batch-size", type=int, help="with --optimizer: sequences per step of that run")
    for name, value in (("lr", 3e-4), ("min-lr", 3e-5), ("weight-decay", 0.1)):
        text = "with --optimizer: as the training to come is told, by which Megatron finds its parameter groups"
        command.add_argument(f"--{name}", type=float, default=value, help=f"{text}; default: %(default)s")


def _add_export(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--checkpoint", type=Path, required=True, help="Megatron save folder (its newest iteration) or an iter_ folder"
    )
    command.add_argument("--output", type=Path, required=True, help="Hugging Face folder to make")
    command.add_argument(
        "--format", choices=("huggingface", "olmo-core"), default="huggingface", help="default: %(default)s"
    )
    command.add_argument(
        "--optimizer", action="store_true", help="Adam's moments, step and fp32 parameters too; with --format olmo-core"
    )
    command.add_argument("--iteration", type=int, help="which iteration of the save folder; default: the newest")
    command.add_argument("--dtype", choices=DTYPES, help="cast every tensor but A_log and dt_bias; default: as stored")
    command.add_argument(
        "--match-release", action="store_true", help="every tensor in bf16, A_log and dt_bias too, as Ai2's release"
    )
    command.add_argument(
        "--tokenizer-model",
        type=Path,
        help="SentencePiece model that preprocessed the data, or a folder with a Hugging Face tokenizer; written too",
    )
    command.add_argument(
        "--max-shard-size", type=parse_size, default="5GB", help="largest safetensors file; default: %(default)s"
    )
    command.add_argument("--force", action="store_true", help="replace an earlier export in --output")


def _add_verify(command: argparse.ArgumentParser) -> None:
    command.add_argument("--checkpoint", type=Path, required=True, help="Megatron save folder or an iter_ folder")
    command.add_argument("--iteration", type=int, help="which iteration of the save folder; default: the newest")
    command.add_argument("--model", type=Path, required=True, help="Hugging Face folder")
    command.add_argument(
        "--text",
        type=Path,
        help="compare the perplexity of this text's first 1,024 tokens, by the folder's tokenizer",
    )
    command.add_argument(
        "--tolerance", type=float, default=1e-4, help="largest difference of logits that passes; default: %(default)s"
    )
    command.add_argument(
        "--weights-only", action="store_true", help="run neither model; for machines that cannot hold them in fp32"
    )


def _add_info(command: argparse.ArgumentParser) -> None:
    command.add_argument("folder", type=Path, help="Megatron save or iter_ folder, OLMo-core's or Hugging Face's")
    command.add_argument("--config", type=Path, help="folder with the Hugging Face config.json of an OLMo-core model")
    command.add_argument("--iteration", type=int, help="which iteration of a save folder; default: the newest")
    command.add_argument("--follow-symlinks", action="store_true", help="read files that are symbolic links")


def print_verified(options: VerifyOptions) -> None:
    """Prints the table; ToolError, which makes the exit status 1, unless every row holds that was asked for."""
    rows = verify(options)
    print(table(rows))
    if failed := [row.name for row in rows if row.holds is False]:
        raise ToolError(f"{len(failed)} of {len(rows)} rows do not hold: {', '.join(failed)}")


def run_export(arguments: dict[str, Any]) -> str:
    """Exports in the format that was asked for; ToolError for flags of the other one."""
    shard_bytes = arguments.pop("max_shard_size")
    if arguments.pop("format") == "huggingface":
        if arguments.pop("optimizer"):
            raise ToolError("--optimizer: a Hugging Face folder has no place for it; add --format olmo-core")
        return export(ExportOptions(max_shard_bytes=shard_bytes, **arguments))
    for name in ("dtype", "match_release", "tokenizer_model"):
        if arguments.pop(name):
            raise ToolError(f"--{name.replace('_', '-')}: has no effect with --format olmo-core; leave it out")
    return export_olmo_core(OlmoCoreOptions(**arguments))


def main() -> None:
    """Entry point."""
    # torch reads this once: large tensors in huge pages, or the kernel spends longer on new pages than on the copying.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    arguments = vars(build_parser().parse_args())
    command = arguments.pop("command")
    if command == "import":
        print(import_model(ImportOptions(**arguments)))
    elif command == "info":
        print(info(InfoOptions(**arguments)))
    elif command == "verify":
        print_verified(VerifyOptions(**arguments))
    else:
        print(run_export(arguments))


if __name__ == "__main__":
    run_cli(main)
