"""From --instance-data to token files: what kinds of data there are, and what is wrong with those that are not."""

from __future__ import annotations

import glob
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_hybrid.data import mixture
from megatron_hybrid.data.token_files import DataError, TokenFile, open_prefix, open_raw
from megatron_hybrid.tools.corpus.fingerprint import fingerprint
from megatron_hybrid.tools.indexed_dataset import idx_path

INDEX_SUFFIX = ".instances.npy"
INDEX_DTYPE = np.dtype([("dataset", "<i2"), ("sample", "<i8")])


@dataclass(frozen=True)
class Places:
    """Where and how paths of lists are to be read.

    Attributes:
        root: folder that relative paths start at.
        tokenizer: what {TOKENIZER} in paths stands for.
        dtype: of raw ids, a key of RAW_DTYPES.
        mask_rule: see `open_raw`.
    """

    root: Path
    tokenizer: str
    dtype: str
    mask_rule: str = ""


@dataclass(frozen=True)
class Selection:
    """Files, and what to take of them: all, the first `counts[i]` instances of file i, or the instances of `index`."""

    files: list[TokenFile]
    counts: list[int] | None = None
    index: NDArray[np.void] | None = None


def select(
    data: str, places: Places, sequence_length: int, batch: int, mixture_tokens: int, vocab_size: int
) -> Selection:
    """What `data` names.

    Args:
        data: STAGE.instances.npy of tools.mix; a `label,path` list (.txt); a mixture (.yaml, .yml); a folder that
            tools.preprocess made, or one of raw .npy files; a raw .npy file; a glob of raw files; a .bin/.idx prefix.
        batch: global batch size in instances, and mixture_tokens: for mixtures.

    Raises:
        ToolError: one line.
    """
    path = Path(data)
    if data.endswith(INDEX_SUFFIX):
        return _listed(path, sequence_length)
    if path.suffix == ".txt":
        return Selection([_open(file, places) for _, file in mixture.read_list(path, places.tokenizer)])
    if path.suffix in (".yaml", ".yml"):
        return _mixture(path, places, sequence_length, batch, mixture_tokens)
    if path.is_dir():
        return Selection(_folder(path, places, vocab_size))
    if glob.has_magic(data):
        return Selection([open_raw(file, places.dtype, places.mask_rule) for file in _matches(data)])
    return Selection([_open(data, places)])


def permuted(selection: Selection, seed: int) -> Selection:
    """The files in another order, as OLMo-core's `source_permutation_seed` puts them (Python's shuffle)."""
    if selection.index is not None:
        raise DataError("--instance-file-seed: an index of tools.mix has an order of its own; leave the flag out")
    order = list(range(len(selection.files)))
    random.Random(seed).shuffle(order)
    counts = None if selection.counts is None else [selection.counts[i] for i in order]
    return Selection([selection.files[i] for i in order], counts)


def _matches(pattern: str) -> list[Path]:
    found = sorted(Path(one) for one in glob.glob(pattern, recursive=True))
    if not found:
        raise DataError(f"{pattern}: no such file; correct --instance-data or --instance-root")
    return found


def _open(file: str, places: Places) -> TokenFile:
    if "://" in file:
        raise DataError(f"{file}: object storage is not read here; copy the file and give --instance-root")
    path = places.root / file
    if path.suffix == ".npy" and (path.is_file() or not idx_path(path.with_suffix("")).is_file()):
        return open_raw(path, places.dtype, places.mask_rule)
    if places.mask_rule:
        raise DataError(f"--instance-label-mask {places.mask_rule}: masks lie beside raw files, {path} is a dataset")
    return open_prefix(str(path.with_suffix("") if path.suffix in (".npy", ".bin", ".idx") else path))


def _folder(folder: Path, places: Places, vocab_size: int) -> list[TokenFile]:
    manifest = folder / "manifest.json"
    if not manifest.is_file():
        files = sorted(folder.rglob("*.npy"))
        if not files:
            raise DataError(f"--instance-data {folder}: no manifest.json of tools.preprocess and no .npy files in it")
        masked = [] if not places.mask_rule else [one for one in files if places.mask_rule.split(":")[0] in one.name]
        return [open_raw(file, places.dtype, places.mask_rule) for file in (masked or files)]
    content = _json(manifest)
    try:
        entries = [(str(folder / entry["prefix"]), entry["tokens"]) for entry in content["datasets"]]
        needed = content["tokenizer"]["vocab_size"]
    except (KeyError, TypeError):
        raise DataError(f"{manifest}: not a manifest of tools.preprocess; finish the run that writes it") from None
    if needed > vocab_size:
        raise DataError(
            f"{manifest}: made with a vocabulary of {needed:,}, the tokenizer here has {vocab_size:,}; use the same one"
        )
    datasets = []
    for prefix, tokens in entries:
        file = open_prefix(prefix)
        if file.tokens != tokens:
            raise DataError(f"{file.path}: {file.tokens:,} tokens, its manifest says {tokens:,}; copy it again")
        datasets.append(file)
    return datasets


def _mixture(path: Path, places: Places, sequence_length: int, batch: int, tokens: int) -> Selection:
    sources, requested = mixture.read_sources(path)
    if requested and tokens and requested != tokens:
        raise DataError(f"--mixture-tokens {tokens}: {path} has requested_tokens {requested}; leave the flag out")
    if not (requested or tokens):
        raise DataError(f"--mixture-tokens: missing; {path} says what shares to take, not of how many tokens")
    files: list[list[TokenFile]] = []
    for source in sources:
        own = []
        for one in source.paths:
            one = one.replace("{TOKENIZER}", places.tokenizer)
            if glob.has_magic(one) and "://" not in one:
                own += [open_raw(file, places.dtype, places.mask_rule) for file in _matches(str(places.root / one))]
            else:
                own.append(_open(one, places))
        files.append(own)
    taken = mixture.plan(
        sources, [[file.tokens for file in own] for own in files], requested or tokens, sequence_length, batch
    )
    taken = [(source, file, count) for source, file, count in taken if count]
    return Selection([files[source][file] for source, file, _ in taken], [count for *_, count in taken])


def _listed(path: Path, sequence_length: int) -> Selection:
    """An index of tools.mix, if it was made for this sequence length and of these data."""
    stage = path.name.removesuffix(INDEX_SUFFIX)
    about = path.with_name(f"{stage}.instances.json")
    description = _json(about)
    try:
        made_for, listed = description["sequence_length"], description["datasets"]
        entries = [(entry["prefix"], entry["tokens"], entry["fingerprint"]) for entry in listed]
    except (KeyError, TypeError):
        raise DataError(f"{about}: not what tools.mix writes; run it again") from None
    if made_for != sequence_length:
        raise DataError(
            f"{path}: made for a sequence length of {made_for}, --seq-length is {sequence_length}; run tools.mix again "
            f"with --sequence-length {sequence_length}"
        )
    files = []
    for prefix, tokens, made_of in entries:
        file = open_prefix(prefix)
        if file.tokens != tokens or fingerprint(file.path)[0] != made_of:
            raise DataError(
                f"{file.path}: other data than {path} was made of ({file.tokens:,} tokens, {tokens:,} then); run "
                "tools.mix again"
            )
        files.append(file)
    try:
        index = np.load(path, mmap_mode="r")
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: {getattr(error, 'strerror', None) or error}; run tools.mix again") from None
    if index.dtype != INDEX_DTYPE or index.shape != (description.get("instances"),):
        raise DataError(
            f"{path}: {index.shape} of {index.dtype}, {about.name} describes {description.get('instances')} "
            "instances; run tools.mix again"
        )
    return Selection(files, index=index)


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; run again the tool that writes it") from None
    except ValueError:
        raise DataError(f"{path}: not JSON; write it again") from None
    if not isinstance(content, dict):
        raise DataError(f"{path}: not a JSON object; write it again")
    return content


def check_samples(files: Sequence[TokenFile], vocab_size: int) -> None:
    """Reads up to 1 MiB of every file: ids of another dtype or tokenizer are found before training starts.

    Raises:
        DataError: an id outside the vocabulary.
    """
    for file in dict.fromkeys(files):
        try:
            _, largest = fingerprint(file.path, file.dtype)
        except OSError as error:
            raise DataError(f"{file.path}: {error.strerror}") from None
        if largest >= vocab_size:
            raise DataError(
                f"{file.path}: id {largest} read as {np.dtype(file.dtype).name}, the vocabulary has {vocab_size:,}; "
                "use the tokenizer the file was made with, or give --instance-dtype as it was written"
            )
