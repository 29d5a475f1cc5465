"""From `--preset NAME` and the command line to Megatron's flat list of flags, checked before anything heavy starts."""

from __future__ import annotations

import argparse
import difflib
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from megatron_hybrid import architecture, fp8, refusals
from megatron_hybrid.config import KEEPS_STATES
from megatron_hybrid.presets import NAMES, PRESETS, FlagValue
from megatron_hybrid.tools.cli import Parser as Parser  # for commands outside tools/
from megatron_hybrid.tools.cli import ToolError, end_without_reader

#: Flags of which Megatron takes one: giving another on the command line drops the preset's.
ALTERNATIVES = (
    {"train-iters", "train-samples"},
    {"lr-decay-iters", "lr-decay-samples"},
    {"lr-warmup-iters", "lr-warmup-samples", "lr-warmup-fraction"},
    {"bf16", "fp16"},
)

#: Optimizers whose update SkipStep cannot take back.
_NOT_JUDGED = ("optimizer-cpu-offload", "optimizer-cuda-graph", "use-megatron-fsdp", "use-torch-fsdp2")

#: Megatron takes other than fp32 for these with --use-precision-aware-optimizer alone.
_PRECISIONS = ("main-grads-dtype", "main-params-dtype", "exp-avg-dtype", "exp-avg-sq-dtype")

#: What --recompute-modules can name in these layers.
RECOMPUTE_MODULES = ("core_attn", "mlp", "layernorm", "gdn_norm_out")

#: `--flag kind` of all flags, as Megatron's parser and the plugin's have them (tests/slurm/known_flags.py).
KNOWN = Path(__file__).with_name("known_flags.txt")

_DATA_FLAGS = ("data-path", "train-data-path", "valid-data-path", "test-data-path")


class FlagError(ValueError):
    """A flag that cannot work; the message is one line: flag, value, what is legal."""


def print_report(text: str) -> None:
    """Print what a command was asked for, and end quietly where nothing reads it to the end."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        end_without_reader()


def compose(preset: str | None, command_line: Sequence[str], without: Sequence[str] = ()) -> list[str]:
    """The flat list of Megatron flags: the preset's, minus what the command line replaces, plus the command line.

    Args:
        preset: a name in `PRESETS`, or None.
        command_line: flags as typed.
        without: names of preset flags to leave out (for flags that take no value).

    Raises:
        FlagError: unknown preset, or `without` names a flag that the preset does not set.
    """
    flags = dict(_preset(preset)) if preset else {}
    for name in without:
        if flags.pop(name.removeprefix("--"), None) is None:
            raise FlagError(f"--without {name}: preset {preset} does not set it; it sets: {', '.join(sorted(flags))}")
    given = {word[2:].split("=")[0] for word in command_line if word.startswith("--")}
    for group in ALTERNATIVES:
        if given & group:
            given |= group
    return [*_flat({k: v for k, v in flags.items() if k not in given}), *command_line]


def _preset(name: str) -> Mapping[str, FlagValue]:
    if name in PRESETS:
        return PRESETS[name]
    nearest = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0.0)[0]
    raise FlagError(f"--preset {name}: unknown; nearest: {nearest}; all: {NAMES}")


def _flat(flags: Mapping[str, FlagValue]) -> Iterator[str]:
    for name, value in flags.items():
        yield f"--{name}"
        if isinstance(value, list):
            yield from value
        elif value is not True:
            yield str(value)


def _peek(flags: Sequence[str]) -> argparse.Namespace:
    """The few values that can be judged before Megatron is imported."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--hybrid-layer-pattern")
    for name, default in (
        ("num-layers", None),
        ("tensor-model-parallel-size", 1),
        ("pipeline-model-parallel-size", 1),
        ("context-parallel-size", 1),
        ("num-attention-heads", None),
        ("num-query-groups", None),
        ("linear-num-key-heads", None),
        ("linear-num-value-heads", None),
        ("linear-conv-kernel-dim", 4),
        ("kv-channels", None),
        ("seq-length", None),
        ("train-iters", None),
        ("lr-decay-iters", None),
        ("lr-warmup-iters", 0),
        ("loss-chunk-tokens", 0),
        ("gdn-states-every", 0),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    for name in _DATA_FLAGS:
        parser.add_argument(f"--{name}", nargs="*", default=[])
    parser.add_argument("--instance-data", default="")
    parser.add_argument("--split", default="969, 30, 1")  # Megatron's
    for name in (
        "save",
        "data-args-path",
        "per-split-data-args-path",
        "gdn-cp-comm-type",
        "gdn-backend",
        "position-embedding-type",
        "recompute-granularity",
        "recompute-method",
    ):
        parser.add_argument(f"--{name}")
    parser.add_argument("--recompute-modules", nargs="+", default=[])
    for name in _PRECISIONS:
        parser.add_argument(f"--{name}", default="fp32")
    parser.add_argument("--z-loss", type=float, default=0.0)
    for name, text in (("wsds-periods", ""), ("lr-decay-style", "linear"), ("optimizer", "adam")):
        parser.add_argument(f"--{name}", default=text)
    for name, value in (("skip-step", True), ("gdn-keep-intermediates", False)):
        parser.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, default=value)
    for name in _NOT_JUDGED:
        parser.add_argument(f"--{name}", action="store_true")
    for name in (
        "mock-data",
        "bf16",
        "fp16",
        "use-distributed-optimizer",
        "no-save-optim",
        "sequence-parallel",
        "skip-train",
        "use-precision-aware-optimizer",
        "recompute-activations",
    ):
        parser.add_argument(f"--{name}", action="store_true")
    try:
        return parser.parse_known_args(list(flags))[0]
    except argparse.ArgumentError as error:
        raise FlagError(f"{error.argument_name}: {error.message}") from None


def check_names(flags: Sequence[str]) -> None:
    """Refuse unknown flags and values of the wrong kind where Megatron's parser, which needs torch, does not run.

    Raises:
        FlagError: naming the flag, its value, and the nearest flag or the legal values.
    """
    known = dict(line.split(" ", 1) for line in KNOWN.read_text().splitlines())
    given: list[tuple[str, list[str]]] = []
    for word in flags:
        if word.startswith("--"):
            flag, equals, value = word.partition("=")
            given.append((flag, [value] * bool(equals)))
        elif given:
            given[-1][1].append(word)
        else:
            raise FlagError(f"{word}: a value without a flag before it")
    for flag, values in given:
        if flag not in known and (off := f"--no-{flag[2:]}") in known:
            raise FlagError(f"{flag}: no such flag, since it is on unless {off} is given; leave it out")
        if flag not in known:
            nearest = difflib.get_close_matches(flag, known, n=1, cutoff=0.0)[0]
            raise FlagError(f"{flag}: no such flag; nearest: {nearest}")
        kind = known[flag].removesuffix("+")
        for value in values:
            _check_kind(flag, value, kind)
        if known[flag] == kind != "none" and len(values) != 1:
            raise FlagError(f"{' '.join([flag, *values])}: takes one value")


def _check_kind(flag: str, value: str, kind: str) -> None:
    if kind == "none":
        raise FlagError(f"{flag} {value}: takes no value")
    if "|" in kind and value not in kind.split("|"):
        raise FlagError(f"{flag} {value}: legal: {kind.replace('|', ', ')}")
    if kind in ("int", "float"):
        try:
            (int if kind == "int" else float)(value)
        except ValueError:
            legal = "a whole number" if kind == "int" else "a number"
            raise FlagError(f"{flag} {value}: must be {legal}") from None


def check(flags: Sequence[str]) -> None:
    """Refuse what cannot run, before Megatron is imported and before any process group is made.

    Raises:
        FlagError: naming the flag, its value and the nearest legal one.
    """
    values = _peek(flags)
    for flag in ("tensor", "pipeline", "context"):
        size = getattr(values, f"{flag}_{'' if flag == 'context' else 'model_'}parallel_size")
        if size < 1:
            name = "context-parallel-size" if flag == "context" else f"{flag}-model-parallel-size"
            raise FlagError(f"--{name} {size}: must be at least 1; nearest legal: 1")
    _check_pattern(values)
    for problem in (*refusals.problems(flags), *architecture.problems(flags)):
        raise FlagError(problem)
    _check_heads(values)
    _check_tensor_parallel(values)
    _check_pipeline(values)
    _check_schedule(values)
    _check_optimizer(values)
    _check_recompute(values)
    _check_recipe(values)
    _check_context_parallel(values)
    try:
        fp8.check_flags(flags)
    except fp8.Fp8Error as error:
        raise FlagError(str(error)) from None
    _check_data(values)
    _check_folder("--save", values.save)


def _check_data(values: argparse.Namespace) -> None:
    if values.mock_data or values.instance_data:  # instances are opened once the tokenizer is known
        return
    words = {name: getattr(values, name.replace("-", "_")) for name in _DATA_FLAGS}
    if file := values.data_args_path:
        try:
            words["data-args-path"] = Path(file).read_text().split()
        except OSError as error:
            raise FlagError(f"--data-args-path {file}: {error.strerror}; give a file of weights and prefixes") from None
    prefixes = [(name, prefix) for name, given in words.items() for prefix in _prefixes(given)]
    elsewhere = values.skip_train or values.per_split_data_args_path
    if not prefixes and not elsewhere:
        raise FlagError("--data-path: no dataset; give a prefix of .bin/.idx files (tools.preprocess), or --mock-data")
    from megatron_hybrid.tools.indexed_dataset import require_dataset  # numpy: not on every login node

    for name, prefix in prefixes:
        try:
            summary = require_dataset(prefix)
        except (OSError, ToolError) as error:
            raise FlagError(f"--{name} {prefix}: {error}") from None
        if summary is not None and name in ("data-path", "data-args-path"):
            _check_split(values.split, prefix, summary.sequences, values.skip_train)


def _check_split(split: str, prefix: str, documents: int, skip_train: bool) -> None:
    """Megatron trains no step on a share of 0, and builds one that rounds to no document without ever ending."""
    try:
        shares = [float(number) for number in re.findall(r"[.0-9]+", split)]  # as Megatron reads it
    except ValueError:
        shares = []
    if not sum(shares) or len(shares) > 3:
        raise FlagError(f"--split {split}: legal: shares of training, validation and test, as 99,1,0")
    if not shares[0] and not skip_train:
        raise FlagError(f"--split {split}: no share for training; give it one, or add --skip-train")
    begin = 0.0
    for share, kind in zip(shares, ("training", "validation", "test"), strict=False):
        end = begin + share / sum(shares)
        if share and round(begin * documents) == round(end * documents):
            raise FlagError(
                f"--split {split}: {kind} gets none of the {documents} documents of {prefix}; give it a larger share, "
                "or 0"
            )
        begin = end


def _check_folder(flag: str, name: str | None) -> None:
    """A folder to write to: it, or the nearest folder above it that exists, must let us."""
    if not name or "://" in name:
        return
    folder = Path(name).absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise FlagError(f"{flag} {name}: {existing} is not a folder that can be written to; name another folder")


def _check_heads(values: argparse.Namespace) -> None:
    keys, heads = values.linear_num_key_heads, values.linear_num_value_heads
    if "G" in values.hybrid_layer_pattern and keys and heads and heads % keys:
        nearest = max(round(heads / keys), 1) * keys
        raise FlagError(
            f"--linear-num-value-heads {heads}: must be a multiple of --linear-num-key-heads {keys}; "
            f"nearest legal: {nearest}"
        )
    if values.position_embedding_type == "rope" and values.kv_channels and values.kv_channels % 2:
        raise FlagError(
            f"--kv-channels {values.kv_channels}: rotary embeddings need an even head dimension; "
            f"nearest legal: {values.kv_channels + 1}"
        )


def _check_pattern(values: argparse.Namespace) -> None:
    pattern = values.hybrid_layer_pattern
    if pattern is None:
        raise FlagError(
            "--hybrid-layer-pattern: missing; give one (G Gated DeltaNet layer, * attention layer, | pipeline stage), "
            f"e.g. 'GGG*GGG*', or a preset: {NAMES}"
        )
    strange = sorted(set(pattern) - set("G*|"))
    if strange:
        raise FlagError(
            f"--hybrid-layer-pattern {pattern}: symbol {strange[0]!r} is unknown here; legal: G, *, | "
            "(a symbol is a whole layer, mixer and MLP, so there is no '-')"
        )
    layers = len(pattern.replace("|", ""))
    if values.num_layers is not None and values.num_layers != layers:
        raise FlagError(
            f"--num-layers {values.num_layers}: --hybrid-layer-pattern {pattern} has {layers} layers; "
            f"use --num-layers {layers} or change the pattern"
        )


def _check_tensor_parallel(values: argparse.Namespace) -> None:
    """Heads need not divide (`parallel/head_padding.py`); with more ranks than heads, some would hold padding only."""
    tp = values.tensor_model_parallel_size
    heads = {"--num-attention-heads": values.num_attention_heads, "--num-query-groups": values.num_query_groups}
    if "G" in values.hybrid_layer_pattern:
        heads["--linear-num-key-heads"] = values.linear_num_key_heads
    heads = {flag: count for flag, count in heads.items() if count}
    most = min(heads.values(), default=tp)
    if not 1 <= tp <= most:
        fewest = ", ".join(f"{flag} {count}" for flag, count in heads.items() if count == most)
        raise FlagError(
            f"--tensor-model-parallel-size {tp}: must be at least 1 and at most {fewest}; "
            f"nearest legal: {min(max(tp, 1), most)}; legal: 1 to {most} (heads need not divide: they are padded)"
        )


def _check_pipeline(values: argparse.Namespace) -> None:
    pp = values.pipeline_model_parallel_size
    pattern = values.hybrid_layer_pattern
    segments = pattern.count("|") + 1
    if segments % pp and segments > 1:
        legal = [n for n in range(1, segments + 1) if segments % n == 0]
        raise FlagError(
            f"--pipeline-model-parallel-size {pp}: --hybrid-layer-pattern {pattern} has {segments} stages; "
            f"nearest legal: {min(legal, key=lambda n: abs(n - pp))}; legal: {', '.join(map(str, legal))}"
        )
    if segments == 1 and pp > 1 and len(pattern) % pp:
        legal = [n for n in range(1, len(pattern) + 1) if len(pattern) % n == 0]
        raise FlagError(
            f"--pipeline-model-parallel-size {pp}: does not divide {len(pattern)} layers; nearest legal: "
            f"{min(legal, key=lambda n: abs(n - pp))}; or --pipeline-layout auto, "
            "or mark uneven stages with | in --hybrid-layer-pattern"
        )


def _check_context_parallel(values: argparse.Namespace) -> None:
    cp, length = values.context_parallel_size, values.seq_length
    if cp > 1 and "G" in values.hybrid_layer_pattern and values.linear_conv_kernel_dim != 4:
        raise FlagError(
            f"--linear-conv-kernel-dim {values.linear_conv_kernel_dim}: with --context-parallel-size above 1 the only "
            "legal width is 4"
        )
    if cp > 1 and values.gdn_backend == "fla" and values.gdn_cp_comm_type != "a2a":
        raise FlagError(
            f"--gdn-backend fla: cannot pass states between --context-parallel-size {cp} ranks; use triton, or add "
            "--gdn-cp-comm-type a2a"
        )
    shares = values.tensor_model_parallel_size * cp
    if values.gdn_cp_comm_type == "a2a" and (values.linear_num_key_heads or shares) % shares:
        raise FlagError(
            f"--gdn-cp-comm-type a2a: --context-parallel-size {cp} times --tensor-model-parallel-size "
            f"{values.tensor_model_parallel_size} must divide --linear-num-key-heads {values.linear_num_key_heads}; "
            "or leave the flag out: passing states has no such condition"
        )
    if length is None:
        return
    tp = values.tensor_model_parallel_size
    if values.sequence_parallel and length % (tp * cp):
        raise FlagError(
            f"--seq-length {length}: with --sequence-parallel it must be a multiple of --tensor-model-parallel-size "
            f"{tp} times --context-parallel-size {cp}; nearest legal: {max(round(length / (tp * cp)), 1) * tp * cp}"
        )
    if cp > 1 and length % (2 * cp):
        legal = [1, *(n for n in range(2, 65) if length % (2 * n) == 0)]
        raise FlagError(
            f"--context-parallel-size {cp}: --seq-length {length} must be a multiple of {2 * cp} (two parts for each "
            f"rank); nearest legal size: {min(legal, key=lambda n: abs(n - cp))}; legal: {', '.join(map(str, legal))}; "
            f"nearest legal length: {max(round(length / (2 * cp)), 1) * 2 * cp}"
        )


def _check_schedule(values: argparse.Namespace) -> None:
    decay = values.lr_decay_iters or values.train_iters
    if decay and values.lr_warmup_iters >= decay:
        flag = "--lr-decay-iters" if values.lr_decay_iters else "--train-iters"
        raise FlagError(
            f"--lr-warmup-iters {values.lr_warmup_iters}: must be less than {flag} {decay}; nearest legal: {decay - 1}"
        )


def _check_optimizer(values: argparse.Namespace) -> None:
    if values.bf16 and values.fp16:
        raise FlagError("--bf16 --fp16: give one of them")
    half = next((flag for flag in ("bf16", "fp16") if getattr(values, flag)), None)
    if values.gdn_backend == "triton" and not half and os.environ.get("TRITON_INTERPRET") != "1":
        raise FlagError("--gdn-backend triton: takes bf16 or fp16; add --bf16, or take --gdn-backend reference")
    lower = [flag for flag in _PRECISIONS if getattr(values, flag.replace("-", "_")) != "fp32"]
    if values.use_precision_aware_optimizer:
        if values.optimizer != "adam" or not values.use_distributed_optimizer:
            raise FlagError("--use-precision-aware-optimizer: needs --use-distributed-optimizer and --optimizer adam")
    elif lower:
        raise FlagError(
            f"--{lower[0]} {getattr(values, lower[0].replace('-', '_'))}: needs --use-precision-aware-optimizer; add it"
        )
    saves = values.save and not values.no_save_optim
    if half and saves and "G" in values.hybrid_layer_pattern and not values.use_distributed_optimizer:
        raise FlagError(
            f"--{half}: Megatron's plain optimizer cannot save a model with fp32 parameters (A_log, dt_bias); "
            "add --use-distributed-optimizer (one rank will do), or --no-save-optim"
        )


def _check_recompute(values: argparse.Namespace) -> None:
    granularity = "selective" if values.recompute_activations else values.recompute_granularity
    modules = values.recompute_modules
    for name in modules:
        if name not in RECOMPUTE_MODULES:
            raise FlagError(f"--recompute-modules {name}: legal, with spaces between: {', '.join(RECOMPUTE_MODULES)}")
    if modules and granularity != "selective":
        raise FlagError(
            f"--recompute-modules {' '.join(modules)}: does nothing without --recompute-granularity selective"
        )
    method = values.recompute_method
    if granularity == "full" and method is None:
        raise FlagError(
            "--recompute-granularity full: needs --recompute-method uniform --recompute-num-layers 1, or block"
        )
    if method and granularity != "full":
        raise FlagError(f"--recompute-method {method}: is for --recompute-granularity full; leave it out")


def wsds_ends(text: str) -> list[int]:
    """Ends of the periods of --wsds-periods in iterations; empty where there are none.

    Raises:
        FlagError: not ascending whole numbers.
    """
    try:
        ends = [int(word) for word in text.split(",")] if text else []
    except ValueError:
        ends = [0]
    if ends != sorted(set(ends)) or (ends and ends[0] < 1):
        raise FlagError(f"--wsds-periods {text}: must be ascending iterations, as 1000,2000,4000")
    return ends


def _check_recipe(values: argparse.Namespace) -> None:
    for name in ("loss_chunk_tokens", "z_loss"):
        if not 0 <= getattr(values, name) < math.inf:
            flag = name.replace("_", "-")
            raise FlagError(f"--{flag} {getattr(values, name)}: must be finite and not negative; 0 turns it off")
    if values.gdn_states_every < 0:
        raise FlagError(f"--gdn-states-every {values.gdn_states_every}: must be 0 or more; nearest legal: 0")
    if values.gdn_states_every and values.gdn_keep_intermediates:
        raise FlagError(KEEPS_STATES.format(values.gdn_states_every))
    cannot = [f"--{name}" for name in (*_NOT_JUDGED, "fp16") if getattr(values, name.replace("-", "_"))]
    if values.optimizer not in ("adam", "sgd"):
        cannot.append(f"--optimizer {values.optimizer}")
    if values.skip_step and cannot:
        raise FlagError(
            f"{cannot[0]}: --skip-step cannot take back such an update; leave it out, or add --no-skip-step"
        )
    ends = wsds_ends(values.wsds_periods)
    if not ends:
        return
    if values.lr_decay_style != "WSD":
        raise FlagError(f"--lr-decay-style {values.lr_decay_style}: with --wsds-periods the only legal style is WSD")
    if ends[-1] != values.train_iters:
        raise FlagError(
            f"--wsds-periods {values.wsds_periods}: the last period ends at {ends[-1]}, --train-iters "
            f"{values.train_iters}; make them equal"
        )
    if values.lr_warmup_iters > 0.9 * ends[0]:
        raise FlagError(
            f"--lr-warmup-iters {values.lr_warmup_iters}: the first period of --wsds-periods decays from "
            f"{int(0.9 * ends[0])}; nearest legal: {int(0.9 * ends[0])}"
        )


def _prefixes(words: Sequence[str]) -> Iterator[str]:
    """Dataset prefixes of a Megatron blend: `P`, `P Q`, or `weight P weight Q`."""
    for word in words:
        try:
            float(word)
        except ValueError:
            yield word
