"""Looks into Megatron datasets (.bin/.idx): what they hold, whether they are whole, and joins them.

    python -m megatron_hybrid.tools.inspect_data info PREFIX...
    python -m megatron_hybrid.tools.inspect_data verify PREFIX... [--tokenizer-model FILE | --vocab-size N --eod-id N]
    python -m megatron_hybrid.tools.inspect_data show PREFIX --tokenizer-model FILE [--documents 0 5 -1]
    python -m megatron_hybrid.tools.inspect_data stats PREFIX... [--png FILE]
    python -m megatron_hybrid.tools.inspect_data diff PREFIX PREFIX
    python -m megatron_hybrid.tools.inspect_data merge PREFIX... --output-prefix P

A PREFIX may also be a folder that preprocess made: all its datasets. `verify` ends with status 1, and one line
that names the file, for every fault it finds.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_hybrid.tools.cli import Parser, ToolError, run_cli

if TYPE_CHECKING:
    from megatron_hybrid.tools.corpus.tokenizer_file import TokenizerFile

COMMANDS = ("info", "verify", "show", "stats", "diff", "merge")
BAR_WIDTH = 50
SHOWN_CHARACTERS = 500


def expand_prefixes(arguments: list[str]) -> list[str]:
    """The prefixes named, with those of every folder in its place; raises ToolError for an empty folder."""
    prefixes: list[str] = []
    for argument in arguments:
        folder = Path(argument)
        if folder.is_dir() and not Path(f"{argument}.idx").exists():
            found = sorted(str(path.with_suffix("")) for path in folder.glob("*.idx"))
            if not found:
                raise ToolError(f"{argument}: a folder without .idx files; give a prefix or another folder")
            prefixes += found
        else:
            prefixes.append(argument)
    return prefixes


def info(args: argparse.Namespace) -> None:
    """Prints one line per dataset, from its header alone."""
    from megatron_hybrid.tools.indexed_dataset import read_summary

    documents = tokens = 0
    for prefix in expand_prefixes(args.prefix):
        summary = read_summary(prefix)
        documents, tokens = documents + summary.documents, tokens + summary.tokens
        print(
            f"{prefix}: {summary.documents:,} documents, {summary.sequences:,} sequences, {summary.tokens:,} tokens "
            f"({summary.dtype}), {summary.tokens / max(summary.documents, 1):,.1f} tokens/document"
        )
    if len(args.prefix) > 1 or len(expand_prefixes(args.prefix)) > 1:
        print(f"all: {documents:,} documents, {tokens:,} tokens")


def verify(args: argparse.Namespace) -> None:
    """Checks every dataset; prints one line each, faults to stderr; exits 1 if there is a fault."""
    from megatron_hybrid.tools.corpus.verify import Expectations, expectations_of, verify_dataset

    given = Expectations(args.vocab_size, args.eod_id)
    if args.tokenizer_model:
        tokenizer = _tokenizer(args)
        given = Expectations(tokenizer.vocab_size, tokenizer.eod_id if tokenizer.eod_id >= 0 else None)
    faulty = 0
    for prefix in expand_prefixes(args.prefix):
        started = time.perf_counter()
        expected = expectations_of(prefix, given)
        try:
            report = verify_dataset(prefix, expected)
        except (ToolError, OSError) as error:
            faulty += 1
            print(f"error: {error}", file=sys.stderr)
            continue
        seconds = time.perf_counter() - started
        print(
            f"{prefix}: whole; {report.documents:,} documents, {report.tokens:,} tokens, ids {report.min_id} to "
            f"{report.max_id}; checked: {', '.join(report.checked)}; {report.tokens / seconds / 1e6:,.0f} M tokens/s"
        )
    if faulty:
        raise ToolError(f"{faulty} of {len(expand_prefixes(args.prefix))} datasets are damaged; see the lines above")


def _tokenizer(args: argparse.Namespace) -> "TokenizerFile":
    from megatron_hybrid.tools.corpus.tokenizer_file import load_tokenizer_file

    return load_tokenizer_file(args.tokenizer_model, getattr(args, "eod_token", None))


def make_decoder(file: "TokenizerFile") -> Any:
    """A function from ids to text, special tokens shown."""
    if file.kind == "huggingface":
        import tokenizers

        library = tokenizers.Tokenizer.from_buffer(file.content)
        return lambda ids: library.decode(ids, skip_special_tokens=False)
    if file.kind == "sentencepiece":
        import sentencepiece

        processor: Any = sentencepiece.SentencePieceProcessor(model_proto=file.content)
        return lambda ids: processor.decode([index for index in ids if not processor.is_control(index)])
    from megatron_hybrid.tools.corpus.tokenizer_file import tiktoken_ranks

    pieces = {rank: token for token, rank in tiktoken_ranks(file.content).items()}
    return lambda ids: b"".join(pieces.get(index, b"") for index in ids).decode("utf-8", errors="replace")


def show(args: argparse.Namespace) -> None:
    """Prints documents as text, their boundaries marked."""
    from megatron_hybrid.tools.indexed_dataset import IndexedDatasetReader

    (prefix,) = expand_prefixes(args.prefix)
    reader = IndexedDatasetReader(prefix)
    tokenizer = _tokenizer(args)
    decode = make_decoder(tokenizer)
    for number in args.documents:
        if not -len(reader) <= number < len(reader):
            raise ToolError(f"--documents {number}: {prefix} has {len(reader):,} documents, 0 to {len(reader) - 1}")
        ids = reader[number].tolist()
        ended = bool(ids) and ids[-1] == tokenizer.eod_id
        text = decode(ids[:-1] if ended else ids)
        if not args.whole and len(text) > SHOWN_CHARACTERS:
            text = f"{text[:SHOWN_CHARACTERS]} [... {len(text) - SHOWN_CHARACTERS:,} more characters]"
        print(f"---- document {number % len(reader)}: {len(ids):,} tokens ----")
        print(text)
        print(f"---- {'end-of-document token' if ended else 'no end-of-document token'} ----")


def stats(args: argparse.Namespace) -> None:
    """Prints the histogram of document lengths, and tokens by dataset; draws it too with --png."""
    import numpy as np

    from megatron_hybrid.tools.corpus.concatenate import map_index

    edges = [0, *(1 << power for power in range(32))]
    counts = np.zeros(len(edges) - 1, dtype=np.int64)
    tokens_by_bin = np.zeros(len(edges) - 1, dtype=np.int64)
    by_prefix: dict[str, int] = {}
    for prefix in expand_prefixes(args.prefix):
        lengths, _ = map_index(prefix)
        total = 0
        for start in range(0, lengths.size, 1 << 20):
            block = lengths[start : start + (1 << 20)].astype(np.int64)
            bins = np.searchsorted(edges, block, side="right") - 1
            counts += np.bincount(bins, minlength=counts.size)
            tokens_by_bin += np.bincount(bins, weights=block, minlength=counts.size).astype(np.int64)
            total += int(block.sum())
        by_prefix[prefix] = total
    used = np.flatnonzero(counts)
    for index in range(int(used.min()), int(used.max()) + 1) if used.size else ():
        bar = "#" * round(BAR_WIDTH * int(counts[index]) / int(counts.max()))
        share = tokens_by_bin[index] / max(tokens_by_bin.sum(), 1)
        span = f"{edges[index]:>13,} to {edges[index + 1] - 1:>13,} tokens"
        print(f"{span} {counts[index]:>13,} documents {share:6.1%} {bar}")
    all_tokens = sum(by_prefix.values())
    for prefix, tokens in by_prefix.items():
        print(f"{prefix}: {tokens:,} tokens, {tokens / max(all_tokens, 1):.2%}")
    if args.png:
        _draw(args.png, edges, counts, by_prefix)


def _draw(path: Path, edges: list[int], counts: Any, by_prefix: dict[str, int]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 5))
    left.stairs(counts, [max(edge, 0.5) for edge in edges], fill=True)
    left.set(xscale="log", xlabel="tokens in a document", ylabel="documents", title="Length of documents")
    names = [Path(prefix).name for prefix in by_prefix]
    right.barh(names, list(by_prefix.values()))
    right.set(xlabel="tokens", title="Tokens by dataset")
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
    print(f"drawn: {path}")


def diff(args: argparse.Namespace) -> None:
    """Says whether two datasets hold the same documents, and where they first differ; exits 1 if they differ."""
    from megatron_hybrid.tools.corpus.verify import first_different_document

    one, other = expand_prefixes(args.prefix)
    difference = first_different_document(one, other)
    if difference:
        raise ToolError(difference)
    print(f"{one} and {other} hold the same documents")


def merge(args: argparse.Namespace) -> None:
    """Joins datasets end to end, in the order given."""
    from megatron_hybrid.tools.corpus.concatenate import concatenate
    from megatron_hybrid.tools.preprocess import check_output_prefix

    check_output_prefix(args.output_prefix, args.overwrite)
    prefixes = expand_prefixes(args.prefix)
    started = time.perf_counter()
    written = concatenate(prefixes, args.output_prefix)
    print(
        f"{args.output_prefix}: {len(prefixes)} datasets, {written.documents:,} documents, {written.tokens:,} tokens "
        f"({written.dtype}), {time.perf_counter() - started:.1f} s"
    )


def parser(command: str) -> argparse.ArgumentParser:
    """The command line of one of COMMANDS."""
    result = Parser(
        prog=f"python -m megatron_hybrid.tools.inspect_data {command}",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    count: Any = {"show": 1, "diff": 2}.get(command, "+")
    result.add_argument("prefix", nargs=count, metavar="PREFIX", help="path without suffix, or a folder of datasets")
    if command in ("verify", "show"):
        result.add_argument("--tokenizer-model", type=Path, metavar="FILE", required=command == "show")
        result.add_argument("--eod-token", metavar="TOKEN", help="end-of-document token, where the files do not say it")
    if command == "verify":
        result.add_argument("--vocab-size", type=int, metavar="N", help="ids must be below it")
        result.add_argument("--eod-id", type=int, metavar="N", help="every document must end with it")
    if command == "show":
        result.add_argument(
            "--documents", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="from 0; -1: the last"
        )
        result.add_argument("--whole", action="store_true", help="all of each document")
    if command == "stats":
        result.add_argument("--png", type=Path, metavar="FILE", help="draw the histogram too")
    if command == "merge":
        result.add_argument("--output-prefix", required=True, metavar="P")
        result.add_argument("--overwrite", action="store_true", help="replace a dataset of that prefix")
    return result


def main() -> None:
    """Command-line entry point."""
    words = sys.argv[1:]
    if not words or words[0] not in COMMANDS:
        help_asked = bool({"-h", "--help"} & set(words[:1]))
        if help_asked:
            print(f"usage: python -m megatron_hybrid.tools.inspect_data COMMAND ...\n\n{__doc__}")
            return
        Parser(prog="python -m megatron_hybrid.tools.inspect_data").error(
            f"{words[0] if words else 'no command'}: choose one of {', '.join(COMMANDS)}"
        )
    functions = {"info": info, "verify": verify, "show": show, "stats": stats, "diff": diff, "merge": merge}
    functions[words[0]](parser(words[0]).parse_args(words[1:]))


if __name__ == "__main__":
    run_cli(main)
