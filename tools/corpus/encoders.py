"""Text to token ids, by one of several libraries behind one interface, and how they are compared.

The reference encoder is the library a tokenizer file was made for (tokenizers, sentencepiece, tiktoken). The
fast ones are never trusted: `first_difference` compares them with it before a run and within every shard.
"""

import os
import re
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from megatron_hybrid.tools.cli import ToolError
from megatron_hybrid.tools.corpus.tokenizer_file import CUT_PLACE, TokenizerFile, tiktoken_ranks

PIECE_CHARACTERS = 1 << 20  # longer texts are encoded in pieces where the tokenizer allows it
MAX_WHOLE_CHARACTERS = 8 << 20  # the longest text encoded in one piece
RARE = "|\u2581\uff5c"  # characters of special tokens that are rare in text
MAX_CACHE_BYTES = 96 << 20  # of words in fastokens; beyond, its table doubles, by as much again and more
BACKENDS = ("auto", "reference", "fastokens", "gigatoken")
Ids = NDArray[np.int32]
Lengths = NDArray[np.int64]


class Encoder(Protocol):
    """Turns texts into ids, without any token that is not of the text."""

    name: str

    def encode(self, texts: Sequence[str]) -> tuple[Ids, Lengths]:
        """The ids of all texts end to end, and how many each has."""


class TextTooLong(Exception):
    """A text that cannot be encoded in bounded memory: it has no place to cut it."""


def _flat(lists: Sequence[Sequence[int]]) -> tuple[Ids, Lengths]:
    lengths = np.fromiter((len(ids) for ids in lists), dtype=np.int64, count=len(lists))
    flat = np.empty(int(lengths.sum()), dtype=np.int32)
    at = 0
    for ids in lists:
        flat[at : at + len(ids)] = ids
        at += len(ids)
    return flat, lengths


class HuggingFaceReference:
    """tokenizers.Tokenizer: what transformers, and Megatron's HuggingFaceTokenizer, encode with."""

    def __init__(self, file: TokenizerFile, keep_special: bool) -> None:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # one core per worker
        import tokenizers

        self.name = f"tokenizers {tokenizers.__version__}"
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(file.content)
        except Exception as error:  # the library raises bare Exception
            raise ToolError(f"--tokenizer-model {file.path}: tokenizers cannot load it ({error})") from None
        self._tokenizer.encode_special_tokens = not keep_special
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    def encode(self, texts: Sequence[str]) -> tuple[Ids, Lengths]:
        return _flat([self._tokenizer.encode(text, add_special_tokens=False).ids for text in texts])


class SentencePieceReference:
    """sentencepiece; strings that look like control pieces are always plain text to it."""

    def __init__(self, file: TokenizerFile, keep_special: bool) -> None:
        import sentencepiece

        if keep_special:
            raise ToolError("--special-tokens keep: SentencePiece has no such mode; leave it at text")
        self.name = f"sentencepiece {sentencepiece.__version__}"
        self._processor: Any = sentencepiece.SentencePieceProcessor(model_proto=file.content)

    def encode(self, texts: Sequence[str]) -> tuple[Ids, Lengths]:
        return _flat(self._processor.encode(list(texts), num_threads=1))


class TiktokenReference:
    """tiktoken, with no special tokens."""

    def __init__(self, file: TokenizerFile, keep_special: bool) -> None:
        tiktoken = _import_extra("tiktoken", f"--tokenizer-model {file.path}")
        self.name = f"tiktoken {tiktoken.__version__}"
        if keep_special:
            raise ToolError("--special-tokens keep: a .tiktoken file names no special tokens; leave it at text")
        self._encoding = tiktoken.Encoding(
            file.path, pat_str=file.pattern, mergeable_ranks=tiktoken_ranks(file.content), special_tokens={}
        )

    def encode(self, texts: Sequence[str]) -> tuple[Ids, Lengths]:
        return _flat([self._encoding.encode_ordinary(text) for text in texts])


class Fastokens:
    """fastokens: BPE of tokenizer.json, with its caches of words kept to about MAX_CACHE_BYTES.

    It keeps up to some 300 MB of words it has seen, partly per thread, and offers no smaller limit nor a way
    to empty them. So it lives in a thread of its own; once the process has grown by MAX_CACHE_BYTES, both go.
    """

    def __init__(self, file: TokenizerFile, keep_special: bool) -> None:
        self.name = f"fastokens {_version('fastokens')}"
        self._content = file.content.decode("utf-8")
        self._split_special = not keep_special
        share_one_heap()
        self._limit_bytes = 0
        self._start()

    def _start(self) -> None:
        from concurrent.futures import ThreadPoolExecutor

        import fastokens  # type: ignore[import-untyped]

        self._thread = ThreadPoolExecutor(1)
        self._tokenizer = self._thread.submit(fastokens.Tokenizer.from_json_str, self._content).result()
        fresh = resident_bytes()
        self._limit_bytes = max(self._limit_bytes or fresh + MAX_CACHE_BYTES, fresh + MAX_CACHE_BYTES // 4)

    def encode(self, texts: Sequence[str]) -> tuple[Ids, Lengths]:
        if resident_bytes() > self._limit_bytes:
            self._thread.shutdown()
            del self._tokenizer
            release_freed_memory()
            self._start()
        call = self._thread.submit(self._tokenizer.encode_batch_flat, list(texts), False, self._split_special)
        ids, offsets = call.result()
        return np.frombuffer(ids, dtype="<i4"), np.diff(np.frombuffer(offsets, dtype="<i8"))


def resident_bytes() -> int:
    """What this process holds in memory."""
    with open("/proc/self/statm", "rb") as handle:
        return int(handle.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def share_one_heap() -> None:
    """Lets all threads allocate from one heap, and tables lie outside it: then what is freed can be given back."""
    _c_library("mallopt", -8, 1)  # M_ARENA_MAX
    _c_library("mallopt", -3, 16 << 20)  # M_MMAP_THRESHOLD, which glibc would raise


def release_freed_memory() -> None:
    """Gives freed memory back to the system, which glibc would keep."""
    _c_library("malloc_trim", 0)


def _c_library(function: str, *arguments: int) -> None:
    """Calls a function of glibc; with another C library, does nothing."""
    import ctypes

    found = getattr(ctypes.CDLL(None), function, None)
    if found is not None:
        found(*arguments)


class Gigatoken:
    """gigatoken; its cache grows with the words it sees, so the memory of a worker is not bounded."""

    def __init__(self, file: TokenizerFile, keep_special: bool) -> None:
        gigatoken = _import_extra("gigatoken", "--backend gigatoken")
        self.name = f"gigatoken {_version('gigatoken')}"
        self._tokenizer = gigatoken.Tokenizer.from_json(file.content)
        self._reference = None if keep_special else HuggingFaceReference(file, keep_special)
        self._special = file.special

    def encode(self, texts: Sequence[str]) -> tuple[Ids, Lengths]:
        parts = [
            self._reference.encode([text])[0]  # gigatoken always takes these strings for control tokens
            if self._reference and any(special in text for special in self._special)
            else self._tokenizer.encode(text).astype(np.int32)
            for text in texts
        ]
        lengths = np.fromiter((part.size for part in parts), dtype=np.int64, count=len(parts))
        return np.concatenate([np.zeros(0, dtype=np.int32), *parts]), lengths


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)


def _import_extra(package: str, flag: str) -> Any:
    from importlib import import_module

    try:
        return import_module(package)
    except ImportError:
        raise ToolError(f"{flag}: needs {package}; pip install -e '.[data]'") from None


def reference_encoder(file: TokenizerFile, keep_special: bool) -> Encoder:
    """The encoder that defines the ids of `file`."""
    kinds: dict[str, Callable[[TokenizerFile, bool], Encoder]] = {
        "huggingface": HuggingFaceReference,
        "sentencepiece": SentencePieceReference,
        "tiktoken": TiktokenReference,
    }
    return kinds[file.kind](file, keep_special)


def fast_encoder(file: TokenizerFile, keep_special: bool, backend: str) -> Encoder | None:
    """The fast encoder that --backend chooses, or None for the reference alone.

    `auto` takes fastokens for a tokenizer.json it can load, and the reference for any other file;
    raises ToolError if a backend asked for by name cannot load the file.
    """
    if backend not in BACKENDS:
        raise ToolError(f"--backend {backend}: choose one of {', '.join(BACKENDS)}")
    if backend == "reference" or (backend == "auto" and file.kind != "huggingface"):
        return None
    if file.kind != "huggingface":
        raise ToolError(f"--backend {backend}: encodes tokenizer.json alone; use auto or reference for {file.path}")
    os.environ.setdefault("RAYON_NUM_THREADS", "1")  # one core per worker
    try:
        return Gigatoken(file, keep_special) if backend == "gigatoken" else Fastokens(file, keep_special)
    except ToolError:
        raise
    except Exception as error:  # what the libraries raise for models they do not know differs by version
        if backend == "auto":
            return None
        raise ToolError(f"--backend {backend}: cannot load {file.path} ({error}); use auto or reference") from None


def cut_text(text: str, limit: int = PIECE_CHARACTERS, more_follows: bool = False) -> list[str]:
    """`text` in pieces of at most `limit` characters that end at CUT_PLACE; the last one ends with the text.

    If `more_follows`, the text goes on after its end, so the last piece may be encoded only with what
    follows. For tokenizers that are `cuttable` the ids of the pieces, end to end, are the ids of the text.
    Raises TextTooLong if a stretch of MAX_WHOLE_CHARACTERS has no such place.
    """
    pieces, start = [], 0
    while len(text) - start > limit:
        end = _last_cut(text, start, start + limit)
        if end == start:  # none in reach: take the first one after it
            found = CUT_PLACE.search(text, start + limit)
            if found is None and more_follows:
                break
            end = found.start() if found else len(text)
            if end - start > MAX_WHOLE_CHARACTERS:
                raise TextTooLong(f"{end - start:,} characters without a place to cut")
        pieces.append(text[start:end])
        start = end
    return [*pieces, text[start:]]


def _last_cut(text: str, start: int, end: int) -> int:
    """The last place to cut in (start, end], found in growing windows; `start` if there is none."""
    window = 4096
    while True:
        low = max(start + 1, end - window)
        places = [found.start() for found in CUT_PLACE.finditer(text, low, end + 2) if found.start() <= end]
        if places:
            return places[-1]
        if low == start + 1:
            return start
        window *= 8


def encode_long(encoder: Encoder, file: TokenizerFile, text: str) -> Ids:
    """The ids of one long text, in pieces if the tokenizer allows it; raises TextTooLong if it may not be whole."""
    if file.cuttable:
        return np.concatenate([encoder.encode([piece])[0] for piece in cut_text(text)])
    if len(text) > MAX_WHOLE_CHARACTERS:
        raise TextTooLong(f"{len(text):,} characters, and this tokenizer cannot encode a text in pieces")
    return encoder.encode([text])[0]


def first_difference(fast: Encoder, reference: Encoder, texts: Sequence[str]) -> str | None:
    """None if both make the same ids of every text, else a line that shows the first text they differ in."""
    fast_ids, fast_lengths = fast.encode(texts)
    ids, lengths = reference.encode(texts)
    if np.array_equal(fast_ids, ids) and np.array_equal(fast_lengths, lengths):
        return None
    ends, fast_ends = np.cumsum(lengths), np.cumsum(fast_lengths)
    for index, text in enumerate(texts):
        one = ids[ends[index] - lengths[index] : ends[index]].tolist()
        other = fast_ids[fast_ends[index] - fast_lengths[index] : fast_ends[index]].tolist()
        if one != other:
            at = next(
                (at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
            )
            return (
                f"{fast.name} makes {other[at : at + 4]} where {reference.name} makes {one[at : at + 4]}, "
                f"at token {at} of {text[:60]!r}{'...' if len(text) > 60 else ''}"
            )
    return f"{fast.name} and {reference.name} differ in the number of texts"


def special_pattern(file: TokenizerFile) -> tuple[tuple[tuple[str, str], ...], re.Pattern[str] | None]:
    """(tests for texts that may hold a special literal, pattern of the literals themselves).

    A test is a character, found fast, and the start of a literal it is part of, found slower.
    """
    if not file.special:
        return (), None
    starts = sorted({literal[:2] for literal in file.special})
    tests = tuple((start[-1] if start[-1] in RARE else start[0], start) for start in starts)
    return tests, re.compile("|".join(re.escape(literal) for literal in file.special))


def probe_texts(file: TokenizerFile) -> list[str]:
    """Texts on which encoders are known to differ: what the check before a run starts with."""
    specials = list(file.special[:20])
    return [
        *("", " ", "\n", "\r\n", "\t\t\n \n", "a", " a", "a ", "  two  spaces   three"),
        *("x" * 3000, " " * 500, "\n" * 300, "nul\0inside\0", "\x01\x02\x7f\x80\u009f"),
        *("e\u0301 \u00e9 \u1e9b\u0323 \ufb01", "\u200b\u200d\ufeff\u2028\u2029"),
        "\U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f3f3\ufe0f",
        *("\u6f22\u5b57\u304b\u306a\ud55c\uae00", "\u0627\u0644\u0639 \u05e2\u05d1", "\u0e01\u0e33\u0e25\u0e31\u0e07"),
        *("I'm you'll THEY'VE it's'S", "1234567890 12,345.67 1e-9 \u0662\u0663", "a_b-c/d\\e<f>g|h"),
        *("!!!???...---===", "if(x)\n\t{\n\t\treturn;\n\t}\n\n", "\u0939\u093f\u0928\u094d\u0926\u0940"),
        *("\U0002070e\U00020731 \U000e0001 \ue000 \uffff", "".join(map(chr, range(1, 600)))),
        *specials,
        *(f"a{literal}b {literal} " for literal in specials),
        *("<|endoftext|> </s> [INST] <|im_start|>", "<|endof", "text|>"),
    ]
