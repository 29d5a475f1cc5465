"""Train an OLMo-Hybrid with Megatron's own trainer.

    python -m megatron_hybrid.pretrain --preset olmo-hybrid-7b --tensor-model-parallel-size 2 ... (under torchrun)

A preset is a named set of Megatron flags; any flag on the command line replaces the preset's.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from megatron_hybrid import compat, fla_backend, fp8
from megatron_hybrid.architecture import OWN_SPECS
from megatron_hybrid.checkpoint.discovery import EXIT_UNLOADABLE, Unloadable
from megatron_hybrid.config import HybridConfig
from megatron_hybrid.flags import FlagError, Parser, check, check_names, compose, print_report, wsds_ends
from megatron_hybrid.parallel import pipeline_layout
from megatron_hybrid.plan import plan
from megatron_hybrid.presets import NAMES
from megatron_hybrid.training import survival

if TYPE_CHECKING:
    from megatron.core.models.hybrid.hybrid_model import HybridModel


def own_arguments(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """This command's own flags, and the rest, which is Megatron's and the plugin's."""
    parser = Parser(
        prog="python -m megatron_hybrid.pretrain",
        description="Train an OLMo-Hybrid with Megatron's own trainer; under torchrun on several ranks. "
        "Other flags are Megatron's (--help-all).",
        allow_abbrev=False,
    )
    parser.add_argument("--preset", metavar="NAME", help=f"named set of flags: {NAMES}")
    parser.add_argument(
        "--without", metavar="FLAG", action="append", default=[], help="leave this flag of the preset out (repeatable)"
    )
    parser.add_argument("--print-args", action="store_true", help="print the flat list of flags and stop")
    parser.add_argument("--dry-run", action="store_true", help="print steps, tokens, rates and memory, and stop")
    parser.add_argument(
        "--gpus", type=int, default=int(os.environ.get("WORLD_SIZE", "1")), help="of the job, for --dry-run"
    )
    parser.add_argument("--help-all", action="store_true", help="print Megatron's and the plugin's flags and stop")
    words: list[str] = []
    for word in argv:  # argparse takes no word with -- for a value
        if words[-1:] == ["--without"]:
            words[-1] += f"={word}"
        else:
            words.append(word)
    return parser.parse_known_args(words)


def fail(message: object, status: int = 2) -> NoReturn:
    """One line, once per job, and an exit status."""
    if os.environ.get("RANK", "0") == "0":
        print(f"error: {message}", file=sys.stderr)
    raise SystemExit(status)


def parse(flags: Sequence[str]) -> argparse.Namespace:
    """Megatron's parser and validation over a flat list of flags, plus the plugin's flags.

    Raises:
        FlagError: what Megatron's validation refuses, as one line.
    """
    from megatron.training.arguments import parse_and_validate_args

    sys.argv = [sys.argv[0], *flags]  # Megatron's parser reads the process's arguments
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            args = parse_and_validate_args(extra_args_provider=HybridConfig.add_to)
        sys.stderr.write(said.getvalue())
        return args
    except SystemExit as stop:  # argparse has printed 700 lines of usage, and then what is wrong
        reason = said.getvalue().strip().splitlines()[-1:] or [f"exit status {stop.code}"]
        raise FlagError(f"{reason[0].split('error: ')[-1]}; --help-all lists every flag") from None
    except (AssertionError, ValueError, FileNotFoundError) as error:
        raise FlagError(
            " ".join(str(error).split()) or f"Megatron refused the flags ({type(error).__name__})"
        ) from error
    except Exception:  # its traceback comes after what was said
        sys.stderr.write(said.getvalue())
        raise


def stack_spec(args: argparse.Namespace) -> Any:
    """The stack spec: the plugin's own with the plugin's options, or whatever else --spec names."""
    from megatron.core.transformer.spec_utils import import_module

    from megatron_hybrid.layer_specs.olmo_hybrid import Implementation, build_stack_spec

    if args.spec is None or tuple(args.spec) in OWN_SPECS:
        implementation: Implementation = "local" if args.transformer_impl == "local" else "transformer_engine"
        return build_stack_spec(HybridConfig.from_args(args), implementation)
    found = import_module(tuple(args.spec)) if len(args.spec) == 2 else None
    if found is None:
        own = "; ".join(" ".join(spec) for spec in OWN_SPECS)
        raise FlagError(f"--spec {' '.join(args.spec)}: no such module and name; the plugin's own: {own}")
    return found


def provide_model(
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
    config: Any = None,
    pg_collection: Any = None,
) -> HybridModel:
    """Megatron's model provider."""
    from megatron.training import get_args

    from megatron_hybrid.model import config_from_args, model_from_args

    args = get_args()
    return model_from_args(
        args,
        config or config_from_args(args),
        stack_spec(args),
        pre_process=pre_process,
        post_process=post_process,
        vp_stage=vp_stage,
        pg_collection=pg_collection,
    )


def prepare(argv: Sequence[str]) -> argparse.Namespace:
    """`prepare_run` for a command that does not train."""
    return prepare_run(argv)[0]


def prepare_run(argv: Sequence[str]) -> tuple[argparse.Namespace, survival.Run]:
    """Everything before process groups: flags checked, start decided, backend chosen, Megatron's arguments parsed.

    Exits with one line where something cannot work: status 2 for a flag, 3 for a checkpoint that is not what was meant.
    """
    own, rest = own_arguments(argv)
    try:
        if problem := compat.python_problem():
            raise FlagError(problem)
        flags = compose(own.preset, rest, own.without)
        if not own.help_all:
            flags, planned = pipeline_layout.resolve(flags)
            if planned and os.environ.get("RANK", "0") == "0":
                print(planned, file=sys.stderr)
        if own.print_args:
            print_report("\n".join(_one_flag_a_line(flags)))
            raise SystemExit(0)
        if own.dry_run:
            check_names(rest)
            check([*flags, "--mock-data"])
            print_report(plan(flags, own.preset, rest, own.gpus))
            raise SystemExit(0)
        if not own.help_all:
            check(flags)
            if "--tokenizer-type" not in {word.split("=")[0] for word in flags}:
                raise FlagError("--tokenizer-type: missing; e.g. HuggingFaceTokenizer with --tokenizer-model FOLDER")
        variable = compat.limit_connections(flags)  # before anything asks CUDA, as a run that goes on does next
        if not own.help_all:
            run, flags = survival.begin(flags, compat.software)
        added = compat.backend_flags(flags)
        if (said := [*([variable] if variable else []), *added]) and os.environ.get("RANK", "0") == "0":
            print(f"added for this machine: {' '.join(said)}", file=sys.stderr)
        compat.start_backend()
        if own.help_all:
            _print_all_flags()
            raise SystemExit(0)
        compat.join_or_be_alone()
        run.hook()
        with _output_unless_refused():
            args = parse([*flags, *added])
            stack_spec(args)
            fp8.check_args(args)
            _check_machine(args)
            run.kernel_errors = _check_kernels(args)
            _set_vocabulary(args, flags)
            _say_what_is_padded(args)
            _check_model(args, run)
            _prepare_data(args, run)
        return args, run
    except Unloadable as error:
        fail(error, EXIT_UNLOADABLE)
    except ValueError as error:
        fail(error)


@contextlib.contextmanager
def _output_unless_refused() -> Iterator[None]:
    """Holds stdout back: a refusal would be lost under the 860 lines in which Megatron prints its arguments."""
    import megatron.training  # noqa: F401  # its log handler keeps the stdout that it is imported with

    held = io.StringIO()
    try:
        with contextlib.redirect_stdout(held):
            yield
    except (ValueError, Unloadable, SystemExit):
        held.truncate(0)
        raise
    finally:
        sys.stdout.write(held.getvalue())


def _check_machine(args: argparse.Namespace) -> None:
    """Refuse what this machine has not: the model would do so when it is built, with a traceback."""
    import torch

    if args.use_precision_aware_optimizer and compat.installed("transformer-engine") is None:
        raise FlagError("--use-precision-aware-optimizer: needs Transformer Engine's Adam (pip install -e '.[gpu]')")
    if args.gdn_backend == "triton" and not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        raise FlagError("--gdn-backend triton: needs a GPU; legal here: auto, reference")
    if args.gdn_backend == "fla" and (problem := fla_backend.problem()):
        raise FlagError(f"--gdn-backend fla: {problem}")
    if "layernorm" in (args.recompute_modules or ()) and args.transformer_impl == "local":
        raise FlagError(
            "--recompute-modules layernorm: Megatron's needs Transformer Engine, which does not run here; "
            "legal: core_attn, mlp, gdn_norm_out"
        )
    if args.fp32_residual_connection and args.transformer_impl == "local":
        raise FlagError(
            "--fp32-residual-connection: needs Transformer Engine's norms, which do not run here; leave it out"
        )
    if args.position_embedding_type == "yarn" and args.apply_rope_fusion and args.rotary_scaling_factor > 1:
        raise FlagError(
            "--position-embedding-type yarn: fused rotary embeddings leave out its attention factor; "
            "add --no-rope-fusion"
        )


def _check_kernels(args: argparse.Namespace) -> dict[str, float]:
    """The kernels' self-test on this rank's GPU, before ranks wait for each other. A rank that fails it says so."""
    import torch

    from megatron_hybrid.kernels.self_test import before_training

    if "G" not in args.hybrid_layer_pattern:
        return {}
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    chosen = None if args.gdn_backend == "auto" else args.gdn_backend
    try:
        return before_training(
            chosen,
            args.params_dtype,
            args.linear_key_head_dim,
            args.linear_value_head_dim,
            states_every=args.gdn_states_every,
            keep_intermediates=args.gdn_keep_intermediates,
        )
    except (RuntimeError, ValueError) as error:
        print(f"error: rank {args.rank}: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def _print_all_flags() -> None:
    """Megatron's and the plugin's flags. Some of Megatron's texts hold a bare %, at which argparse would stop."""
    from megatron.training.arguments import add_megatron_arguments

    parser = argparse.ArgumentParser(prog="python -m megatron_hybrid.pretrain", allow_abbrev=False)
    HybridConfig.add_to(add_megatron_arguments(parser))
    for action in parser._actions:
        if action.help:
            action.help = re.sub(r"%%|%(?!\(\w+\)[sdr])", "%%", action.help)
    print_report(parser.format_help())


def _one_flag_a_line(flags: Sequence[str]) -> list[str]:
    lines: list[str] = []
    for word in flags:
        if word.startswith("--") or not lines:
            lines.append(word)
        else:
            lines[-1] += f" {word}" if " " not in word else f" '{word}'"
    return lines


def _set_vocabulary(args: argparse.Namespace, flags: Sequence[str]) -> None:
    """Rows of the vocabulary matrices: Megatron multiplies the divisor by the tensor-parallel size, which is undone.

    The model must not depend on how it is split; the padding that tensor parallelism needs is not part of it.

    Raises:
        FlagError: fewer rows than the tokenizer has ids.
    """
    from megatron.training import get_tokenizer

    ids, multiple = get_tokenizer().vocab_size, args.make_vocab_size_divisible_by
    enough = -(-ids // multiple) * multiple
    given = any(word.split("=")[0] == "--padded-vocab-size" for word in flags)
    if given and args.padded_vocab_size < ids:
        raise FlagError(
            f"--padded-vocab-size {args.padded_vocab_size}: the tokenizer has {ids} ids, and those without a row would "
            f"be embedded as zeros; nearest legal: {enough}"
        )
    if not given and args.padded_vocab_size is not None:
        args.padded_vocab_size = enough


def _say_what_is_padded(args: argparse.Namespace) -> None:
    """One line at start.

    Raises:
        FlagError: a flag under which padding could not be zeroed where the model is built.
    """
    from megatron_hybrid.parallel.head_padding import Sizes, summary

    sizes, tp = Sizes.of(vars(args)), args.tensor_model_parallel_size
    line = summary(sizes, tp, args.hybrid_layer_pattern, args.padded_vocab_size)
    if not line:
        return
    for flag in ("init-model-with-meta-device", "fp8-param-gather", "fp4-param-gather"):
        if getattr(args, flag.replace("-", "_"), False):
            raise FlagError(f"--{flag}: not supported where tensor parallelism pads ({line}); leave it out")
    if args.rank == 0:
        print(line, file=sys.stderr)


def _check_model(args: argparse.Namespace, run: survival.Run) -> None:
    """Compares the model of the flags with what is loaded and with what --save holds, and describes it in --save.

    Megatron compares a few sizes of a checkpoint with its own and drops tensors that are not asked for.

    Raises:
        Unloadable: the checkpoint is of another model.
        SidecarError: --save holds another one, or this one at other positions.
    """
    from megatron.training import get_tokenizer

    from megatron_hybrid.checkpoint import sidecar

    tokenizer = get_tokenizer()
    description = sidecar.describe(args, HybridConfig.from_args(args), tokenizer.vocab_size, tokenizer.eod)
    lines: tuple[str, ...] = ()
    if args.save and args.rank == 0:  # alone: for the others --fresh may not yet have emptied the folder
        lines = sidecar.check_own(Path(args.save), description)
    source = run.start.chosen.folder.parent if run.start.chosen else None
    if source is not None and not (args.save and source.resolve() == Path(args.save).resolve()):
        found, flag = sidecar.compare(source, description), run.start.source_flag
        if found.model:
            raise Unloadable(
                f"{flag} {source}: holds another model ({'; '.join(found.model)}; there: {source / sidecar.FILE_NAME}, "
                "here: the flags); give the flags that it was trained with, or another checkpoint"
            )
        lines += found.unknown
        lines += (f"{flag} {source}: the same model, but {'; '.join(found.stage)}",) if found.stage else ()
    for line in lines:
        survival.say(line)
    if args.save and args.rank == 0:
        try:
            sidecar.write(Path(args.save), description)
        except OSError as error:
            raise FlagError(f"--save {args.save}: cannot be written to ({error.strerror})") from None


def _prepare_data(args: argparse.Namespace, run: survival.Run) -> None:
    """Opens --instance-data, or compares --data-path with the tokenizer.

    Lets pipeline stages exchange rows of documents, whose lengths vary.
    """
    from megatron.training import get_tokenizer

    from megatron_hybrid.data import instance_dataset, made_with

    if args.document_masking and args.pipeline_model_parallel_size > 1:
        args.variable_seq_lengths = True
        args.moe_token_dispatcher_type = "alltoall"  # no experts here, but Megatron refuses its default with this
    if not args.instance_data:
        if args.repetition_filter:
            raise FlagError("--repetition-filter: filters instances; give --instance-data, or leave it out")
        if args.dataloader_type != "single":
            raise FlagError(
                f"--dataloader-type {args.dataloader_type}: legal: single (cyclic makes the order of samples depend on "
                "the number of data-parallel ranks, others want loaders of their own); leave it out"
            )
        for line in made_with.check(args, get_tokenizer().eod, survival.data_prefixes(args)):
            survival.say(f"warning: {line}")
        return
    try:
        said = instance_dataset.check(args, get_tokenizer(), run.consumed())
    except instance_dataset.Refused as error:
        raise FlagError(str(error)) from None
    if args.rank == 0:
        print(said, file=sys.stderr)


def _provider_after_warm_up(args: argparse.Namespace, run: survival.Run) -> Callable[..., HybridModel]:
    """The model provider, and a rounded --ffn-hidden-size in args until it is called.

    It is also the first of ours that Megatron calls when ranks can talk, and nothing is loaded yet.

    Before building a model Megatron warms up its fused functions with activations of half --ffn-hidden-size / TP, and
    fails where that is no whole number. The model, and every checkpoint, get the true width.
    """
    width, multiple = args.ffn_hidden_size, 2 * args.tensor_model_parallel_size
    args.ffn_hidden_size = -(-width // multiple) * multiple

    def provide(*stage: Any, **options: Any) -> HybridModel:
        args.ffn_hidden_size = width
        run.agree(args)
        return provide_model(*stage, **options)

    return provide


def main(argv: Sequence[str] | None = None) -> None:
    args, run = prepare_run(sys.argv[1:] if argv is None else argv)
    run.attach(args)
    from megatron.core.enums import ModelType
    from megatron.training import pretrain
    from megatron.training.argument_utils import pretrain_cfg_container_from_args

    from megatron_hybrid.data.provider import build_datasets
    from megatron_hybrid.training import hooks
    from megatron_hybrid.training.loss import forward_step

    loss = hooks.prepare(args, [end * args.global_batch_size for end in wsds_ends(args.wsds_periods)])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*It is recommended to use a ModelConfig")
        container = pretrain_cfg_container_from_args(args)
    with run.running(args):
        pretrain(
            container,
            build_datasets,
            ModelType.encoder_or_decoder,
            partial(
                forward_step,
                check_finite=args.check_for_nan_in_loss_and_grad,
                document_masking=args.document_masking,
                **loss,
            ),
            model_provider=_provider_after_warm_up(args, run),
        )


if __name__ == "__main__":  # Megatron's checkpoint writer may spawn a process that imports this file
    main()
