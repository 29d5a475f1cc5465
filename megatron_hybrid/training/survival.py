"""A run that survives being killed: what it starts from, how it stops, what it leaves behind.

`begin` decides before anything heavy is imported, `hook` goes into Megatron before it parses, `attach` after it has,
`agree` when ranks can talk and before anything is loaded, `running` is around Megatron's `pretrain`.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_hybrid import fp8
from megatron_hybrid.checkpoint import commit, fingerprint, megatron_hooks, sample_order, start
from megatron_hybrid.checkpoint.discovery import EXIT_UNLOADABLE, Unloadable
from megatron_hybrid.training import stop
from megatron_hybrid.training.nonfinite import EXIT_NONFINITE, NonFinite, NonFiniteGuard


def say(line: str) -> None:
    """One line on stderr, once per job."""
    if os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr, flush=True)


class Run:
    """One training run of this process.

    Args:
        begun: what it starts from.
        software: {name: version or kind} of what it runs on.
    """

    def __init__(self, begun: start.Start, software: Mapping[str, str]) -> None:
        self.start = begun
        self.software = dict(software)
        self.data: fingerprint.DataFiles = {}
        self.order: dict[str, Any] = {}  #: what the order of samples follows from
        self.kernel_errors: dict[str, float] = {}  #: of the kernels' self-test, none where it does not run
        self.checkpoints = megatron_hooks.Checkpoints(self._describe, say)
        self.stop: stop.StopRequests | None = None
        self.guard: NonFiniteGuard | None = None
        self._agreed = False
        if begun.chosen is not None:
            self._choose()

    def _choose(self) -> None:
        chosen = self.start.chosen
        assert chosen is not None
        self.checkpoints.choose(chosen.folder, chosen.iteration, chosen.release, is_own=self.start.may_reject)

    def hook(self) -> None:
        """Replace what has to be replaced in Megatron; RuntimeError where that is another one."""
        megatron_hooks.install(self.checkpoints)

    def attach(self, args: Namespace) -> None:
        """After parsing: signals, the stop file, the guard against NaN, and no marker of an earlier run."""
        from megatron.training import global_vars, training

        file = args.stop_file or (str(Path(args.save) / "STOP") if args.save else "")
        self.stop = stop.StopRequests(Path(file) if file else None, say)
        self.stop.listen()
        if args.keep_moments:
            from megatron_hybrid.training import stage_change

            stage_change.install()
        args.exit_signal_handler = True  # Megatron's loop asks its handler once a step
        global_vars._GLOBAL_SIGNAL_HANDLER = self.stop
        self.guard = NonFiniteGuard(args.max_nonfinite_steps)
        training.train_step = self.guard.watching(training.train_step)
        training.build_pretraining_data_loader = _with_own_generator(training.build_pretraining_data_loader, args.seed)
        if args.save and args.rank == 0:
            stop.clear_markers(Path(args.save))
        if args.async_save:  # its worker must outlive a signal to all processes of a job step
            import multiprocessing.forkserver

            with stop.signals_ignored():
                multiprocessing.forkserver.ensure_running()

    def agree(self, args: Namespace) -> None:
        """Collective, once: every rank loads the same checkpoint, and checkpoint and data are what they were.

        Raises:
            Unloadable: on every rank.
        """
        if self._agreed:
            return
        self._agreed = True
        self.start = start.agree(self.start, args.verify_checkpoint, say)
        self._check_data(args)
        if self.start.chosen is None:
            return
        self._choose()
        args.ckpt_step = None if self.start.chosen.release else self.start.chosen.iteration
        manifest = commit.read_json(self.start.chosen.folder / commit.MANIFEST)
        for difference in fingerprint.differences(manifest.get("software", {}), self.software):
            say(f"software differs from that of {self.start.chosen.folder}: {difference}")
        saved, now = manifest.get("precision"), fp8.described(vars(args))
        for difference in fingerprint.differences(saved, now) if saved is not None else ():
            say(f"precision differs from that of {self.start.chosen.folder}: {difference}")
        if saved is not None and fp8.starts_scales_anew(saved, now):
            say(f"{self.start.chosen.folder}: holds no scales of delayed scaling; they start anew")
        if not self.start.new_stage:
            self._compare_data(args, self.start.chosen.folder / commit.MANIFEST, manifest)

    def _compare_data(self, args: Namespace, path: Path, manifest: Mapping[str, Any]) -> None:
        """With what a checkpoint to be continued has read so far."""
        changes = fingerprint.changed_data(manifest["data"], self.data) if manifest.get("data") else []
        if manifest.get("order"):
            changes += [] if args.skip_train else sample_order.differences(manifest["order"], self.order)
        elif self.order["reader"] == sample_order.DATA_PATH and path.parent.name != "release":
            say(
                f"{path}: written by an earlier version, without the order of samples: whether "
                "seed, split, weights, sequence length and epochs are those of this start is not known"
            )
        if changes and not (args.allow_data_change or args.finetune):
            raise Unloadable(
                f"--data-path: not the data of {path.parent}: {'; '.join(changes[:3])} (then: {path}, now: the flags "
                "and files); restore it; for a new stage, --pretrained-checkpoint with a --save and --load of its own; "
                "or add --allow-data-change"
            )
        for change in changes:
            say(f"data differ from those of {path.parent}: {change}")

    def consumed(self) -> int | None:
        """Samples that the checkpoint to be continued has seen; None where it does not say."""
        if self.start.chosen is None or self.start.new_stage:
            return 0
        return commit.read_json(self.start.chosen.folder / commit.MANIFEST).get("consumed_train_samples")

    def _check_data(self, args: Namespace) -> None:
        import torch.distributed as dist

        prefixes = data_prefixes(args)
        if not prefixes:
            self.order = {"reader": "--instance-data" if args.instance_data else "--mock-data"}
            return
        began, ranks = time.monotonic(), dist.get_world_size()
        shares: list[Any] = [None] * ranks
        read_all = args.verify_data == "full"
        files, faults = fingerprint.read_data(prefixes, read_all, dist.get_rank(), ranks)
        tokens = {} if faults else sample_order.tokens_of_training(args, dist.get_rank(), ranks)
        dist.all_gather_object(shares, (files, faults, tokens))
        faults = [fault for _, found, _ in shares for fault in found]
        if faults:
            raise Unloadable("; ".join(faults[:3]) + (f"; and {len(faults) - 3} more" if len(faults) > 3 else ""))
        self.data = {path: entry for files, *_ in shares for path, entry in files.items()}
        self.order = sample_order.describe(args, {prefix: count for *_, own in shares for prefix, count in own.items()})
        size = sum(entry["bytes"] for entry in self.data.values())
        how = "read" if read_all else "sizes and indexes of"
        say(f"data: {how} {len(self.data)} files, {size / 1e9:.3f} GB, no fault ({time.monotonic() - began:.1f} s)")

    def _describe(self) -> dict[str, Any]:
        from megatron.training import get_args

        args = get_args()
        sizes = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size")
        layout = {name: getattr(args, name) for name in (*sizes, "data_parallel_size", "world_size")}
        return {
            "consumed_train_samples": args.consumed_train_samples,
            "layout": layout,
            "software": self.software,
            "precision": fp8.described(vars(args)),
            "kernel_self_test": self.kernel_errors or "not run: no GPU, or no Triton kernels",
            "data": self.data,
            "order": self.order,
        }

    @contextlib.contextmanager
    def running(self, args: Namespace) -> Iterator[None]:
        """Around the whole run: its end as a file in --save and as an exit status.

        0: complete, or stopped as asked, told apart by the file; 3: nothing to load, or not as it was saved;
        5: gradients not finite; others: Megatron's, or a failure.
        """
        try:
            yield
        except Unloadable as error:
            say(f"error: {error}")
            raise SystemExit(EXIT_UNLOADABLE) from None
        except NonFinite as error:
            say(f"error: {error}")
            if args.save and args.rank == 0 and self.guard:
                stop.write_marker(Path(args.save), stop.STOPPED_NONFINITE, steps=self.guard.record())
            raise SystemExit(EXIT_NONFINITE) from None
        except SystemExit as end:  # Megatron leaves its loop this way
            if end.code not in (None, 0):
                raise
        self._ended(args)

    def _ended(self, args: Namespace) -> None:
        assert self.stop is not None and self.guard is not None
        reached = self.guard.iterations_done or args.iteration
        if not args.save or args.skip_train:
            return
        if self.checkpoints.durable != reached:
            say(f"error: stopped at iteration {reached}, but the newest whole checkpoint is {self.checkpoints.durable}")
            raise SystemExit(1)
        if args.rank != 0:
            return
        complete = args.train_iters is not None and reached >= args.train_iters
        reason = self.stop.reason or ("--train-iters reached" if complete else "an exit flag of Megatron's")
        name = stop.TRAINING_COMPLETE if complete else stop.STOPPED_CLEAN
        seconds = time.monotonic() - self.stop.since if self.stop.since else None
        stop.write_marker(Path(args.save), name, iteration=reached, reason=reason, seconds_from_request=seconds)
        self.stop.consume()
        took = f", {seconds:.1f} s after it was asked for" if seconds is not None else ""
        say(f"{name} iteration={reached} ({reason}{took})")


def begin(flags: Sequence[str], software: Callable[[], Mapping[str, str]]) -> tuple[Run, list[str]]:
    """Decide what to start from; `--fresh` is carried out on rank 0.

    Args:
        flags: Megatron's and the plugin's, as a flat list.
        software: called where a run goes on.

    Returns:
        The run, and the flags that make Megatron load what was decided.

    Raises:
        Unloadable: nothing to start from; one line.
    """
    begun = start.decide(start.wish_of(flags, os.environ))
    if os.environ.get("RANK", "0") == "0":
        start.move_aside(begun, say)
    for line in begun.lines:
        say(line)
    return Run(begun, software()), start.flags_for(begun, flags)


def _with_own_generator(build_loader: Callable[..., Any], seed: int) -> Callable[..., Any]:
    """Megatron's loaders, which draw their workers' seeds from a generator of their own.

    They are built after a checkpoint has restored the random state, and would leave it one draw off.
    """

    def build(*args: Any, **kwargs: Any) -> Any:
        import torch

        loader = build_loader(*args, **kwargs)
        if loader is not None:
            loader.generator = torch.Generator().manual_seed(seed)
        return loader

    return build


def data_prefixes(args: Namespace) -> list[str]:
    """Prefixes of every `.bin/.idx` dataset that the flags name, each once."""
    if args.mock_data:
        return []
    from megatron.training.utils import get_blend_and_blend_per_split

    whole, per_split = get_blend_and_blend_per_split(args)
    blends = [blend for blend in (whole, *(per_split or ())) if blend]
    return list(dict.fromkeys(prefix for blend in blends for prefix in blend[0]))
