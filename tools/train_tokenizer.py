"""Trains a small, lossless SentencePiece BPE tokenizer on a JSONL corpus.

    python -m megatron_hybrid.tools.train_tokenizer --input corpus.jsonl.zst --output tokenizer.model

decode(encode(text)) == text: no Unicode normalisation, no whitespace is dropped or added, newline and
tab are symbols of their own, and a character outside the vocabulary becomes its UTF-8 bytes. The one
exception is SentencePiece's own: U+2581, its inner mark for a space, comes back as a space.

Megatron takes the model with `--tokenizer-type SentencePieceTokenizer --tokenizer-model FILE`; its
end-of-document token is the model's eos piece, `<|endoftext|>`. That piece is a control symbol: the
same characters inside a document are ordinary text and never end it.
"""

import argparse
import heapq
import io
import os
import random
import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from megatron_hybrid.tools.atomic_file import atomic_open
from megatron_hybrid.tools.cli import Parser, ToolError, byte_progress_bar, run_cli
from megatron_hybrid.tools.jsonl_reader import RejectedLine, parse_text, read_lines

EOD_PIECE = "<|endoftext|>"
WHITESPACE_SYMBOLS = ["\n", "\t"]
SPACE_MARK = "\u2581"  # SentencePiece writes a space as this character, and cannot tell the two apart
MAX_SENTENCE_BYTES = 4192  # SentencePiece leaves longer sentences out of its training
CHARACTER_COVERAGE = 0.9995  # the rarest characters become bytes instead of pieces
MIN_VOCAB_SIZE = 2 + len(WHITESPACE_SYMBOLS) + 256  # unknown, eos, newline and tab, every byte
CHECKED_SENTENCES = 1000  # sampled sentences the finished model must give back unchanged


def split_sentence(sentence: str, max_bytes: int = MAX_SENTENCE_BYTES) -> Iterator[str]:
    """Cuts `sentence` into parts of at most `max_bytes` bytes of UTF-8, none of a character torn apart."""
    if len(sentence) * 4 <= max_bytes:
        yield sentence
        return
    content, start = sentence.encode("utf-8"), 0
    while start < len(content):
        end = min(start + max_bytes, len(content))
        while end < len(content) and content[end] & 0xC0 == 0x80:  # inside a character
            end -= 1
        yield content[start:end].decode("utf-8")
        start = end


def read_sentences(paths: Iterable[Path], key: str, rejected: Counter[str]) -> Iterator[str]:
    """Lines of the documents, cut at WHITESPACE_SYMBOLS too; lines without a document are counted."""
    separators = re.compile("[" + "".join(WHITESPACE_SYMBOLS) + "]")
    paths = list(paths)
    with byte_progress_bar("reading", sum(path.stat().st_size for path in paths)) as bar:
        for path in paths:
            for number, line in read_lines(path, bar.update):
                try:
                    text = parse_text(line, key, first_line=number == 1)
                except RejectedLine as error:
                    rejected[error.reason] += 1
                    continue
                for sentence in separators.split(text):
                    if sentence:
                        yield from split_sentence(sentence)


def sample_sentences(sentences: Iterable[str], max_characters: float, seed: int) -> list[str]:
    """A random sample of about `max_characters`, each sentence as likely as any other; all if they fit.

    Memory is bounded by the sample: the sentences with the smallest random keys are the ones kept.
    """
    source = random.Random(seed)
    kept: list[tuple[float, int, str]] = []
    total = 0
    for number, sentence in enumerate(sentences):
        heapq.heappush(kept, (-source.random(), number, sentence))
        total += len(sentence)
        while total > max_characters and len(kept) > 1:
            total -= len(heapq.heappop(kept)[2])
    return [sentence for _, _, sentence in sorted(kept, key=lambda item: item[1])]


def train(sentences: list[str], vocab_size: int) -> bytes:
    """The model file of a tokenizer of `vocab_size` pieces; raises ToolError if the text does not allow it."""
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            character_coverage=CHARACTER_COVERAGE,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,  # indentation: one piece for four or eight spaces
            split_digits=True,
            user_defined_symbols=WHITESPACE_SYMBOLS,
            max_sentence_length=MAX_SENTENCE_BYTES,
            unk_id=0,
            eos_id=1,
            bos_id=-1,
            pad_id=-1,  # Megatron then pads with an id that is in no text
            eos_piece=EOD_PIECE,
            num_threads=len(os.sched_getaffinity(0)),
            minloglevel=2,  # errors only
        )
    except RuntimeError as error:
        cause = str(error).rpartition("] ")[2].strip()  # after "INTERNAL: file(line) [condition] "
        cause = cause.partition(" Increase vocab_size or ")[0]  # advice about flags that are not ours
        raise ToolError(
            f"--vocab-size {vocab_size}: SentencePiece refuses it for this text: {cause or error} "
            "Choose another size or give it more text"
        ) from error
    return model.getvalue()


def check_model(model: bytes, sentences: Iterable[str], vocab_size: int) -> None:
    """Raises ToolError unless the model has the size and eos piece asked for and gives text back unchanged."""
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    if processor.vocab_size() != vocab_size or processor.id_to_piece(processor.eos_id()) != EOD_PIECE:
        raise ToolError(f"the trained model has {processor.vocab_size()} pieces, not {vocab_size}, or no {EOD_PIECE}")
    for sentence in sentences:
        if SPACE_MARK not in sentence and processor.decode(processor.encode(sentence)) != sentence:
            raise ToolError(f"the trained model does not give this text back unchanged: {sentence[:80]!r}")


def train_tokenizer(args: argparse.Namespace) -> str:
    """Runs the whole tool and returns its summary line; raises ToolError for any fault."""
    if args.vocab_size <= MIN_VOCAB_SIZE:
        raise ToolError(
            f"--vocab-size {args.vocab_size}: must be above {MIN_VOCAB_SIZE} (256 bytes and "
            f"{MIN_VOCAB_SIZE - 256} symbols); the default is {parser().get_default('vocab_size')}"
        )
    if args.sample_mb <= 0:
        raise ToolError(f"--sample-mb {args.sample_mb:g}: must be above 0")
    for path in args.input:
        if not path.is_file():
            raise ToolError(f"--input {path}: {'not a file' if path.exists() else 'no such file'}")
    rejected: Counter[str] = Counter()
    sentences = sample_sentences(read_sentences(args.input, args.text_key, rejected), args.sample_mb * 1e6, args.seed)
    if not sentences:
        raise ToolError(f"--input: no text under the key {args.text_key!r} (rejected: {dict(rejected) or 'none'})")
    characters = sum(map(len, sentences))
    print(f"training {args.vocab_size:,} pieces on {characters:,} characters ...", flush=True)
    started = time.perf_counter()
    model = train(sentences, args.vocab_size)
    check_model(model, sentences[:: max(1, len(sentences) // CHECKED_SENTENCES)], args.vocab_size)
    with atomic_open(args.output) as handle:
        handle.write(model)
    skipped = ", ".join(f"{reason} {count:,}" for reason, count in sorted(rejected.items()))
    return (
        f"{args.output}: {args.vocab_size:,} pieces, {len(sentences):,} lines sampled, "
        f"{time.perf_counter() - started:.1f} s; lines skipped: {skipped or 'none'}"
    )


def parser() -> argparse.ArgumentParser:
    """The command line of this tool."""
    result = Parser(
        prog="python -m megatron_hybrid.tools.train_tokenizer",
        description="Trains a small, lossless SentencePiece BPE tokenizer on a JSONL corpus.",
    )
    result.add_argument(
        "--input", type=Path, nargs="+", required=True, metavar="FILE", help="JSONL files: plain, .gz or .zst"
    )
    result.add_argument(
        "--output", type=Path, default=Path("tokenizer.model"), metavar="FILE", help="default: tokenizer.model"
    )
    result.add_argument(
        "--vocab-size",
        type=int,
        default=4095,
        help="pieces in all (default: 4095; odd, so that padding to the model's size is exercised)",
    )
    result.add_argument("--text-key", default="text", metavar="KEY", help="key that holds the text (default: text)")
    result.add_argument(
        "--sample-mb", type=float, default=8.0, metavar="N", help="train on N million characters (default: 8)"
    )
    result.add_argument("--seed", type=int, default=1234, help="of the sample (default: 1234)")
    return result


def main() -> None:
    """Command-line entry point."""
    print(train_tokenizer(parser().parse_args()))


if __name__ == "__main__":
    run_cli(main)
