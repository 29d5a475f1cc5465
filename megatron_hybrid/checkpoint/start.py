"""What a run starts from, decided before anything heavy is imported: a checkpoint, or random weights if told so.

| --load | in it | |
|---|---|---|
| not given | (--save holds no checkpoint) | random weights |
| not given | (--save holds checkpoints, broken or whole) | refused: `--load` continues, `--fresh` starts over |
| given | a complete checkpoint | the newest complete one, or that of --ckpt-step |
| given | nothing usable | refused, unless --fresh |

`--fresh` moves what is in --save aside, into `set_aside_TIME/`. It is for a job's first start: when torchrun or Slurm
start the same command again, it continues what the first start has saved.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from megatron_hybrid.checkpoint import commit, discovery
from megatron_hybrid.checkpoint.discovery import Candidate, Survey, Unloadable
from megatron_hybrid.tools.dcp_reader import TRACKER_FILE

#: Set above 0 by torchrun and by Slurm when they start a command again.
RESTART_COUNTERS = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")


@dataclass(frozen=True)
class Wish:
    """The flags that say what to start from."""

    load: Path | None = None
    save: Path | None = None
    pretrained: Path | None = None
    step: int | None = None
    fresh: bool = False
    is_restart: bool = False

    @property
    def same(self) -> bool:
        """Whether the run saves where it loads from."""
        return bool(self.load and self.save and self.load.resolve() == self.save.resolve())


@dataclass(frozen=True)
class Start:
    """The decision. `chosen` None: random weights. `rest`: older complete checkpoints, should `chosen` be damaged."""

    chosen: Candidate | None = None
    rest: tuple[Candidate, ...] = ()
    lines: tuple[str, ...] = ()
    set_aside: Path | None = None
    may_reject: bool = False
    #: `chosen` is another stage's: its weights are taken, and not its data, positions or iteration.
    new_stage: bool = False
    wish: Wish = field(default_factory=Wish)

    @property
    def source_flag(self) -> str:
        """The flag that names the folder of `chosen`."""
        return "--pretrained-checkpoint" if self.new_stage else "--load"

    def next(self) -> Start | None:
        """The decision after `chosen` turned out damaged; None when there is no other."""
        return replace(self, chosen=self.rest[0], rest=self.rest[1:]) if self.rest else None


def wish_of(flags: Sequence[str], environment: Mapping[str, str]) -> Wish:
    """The wish in a flat list of flags.

    Raises:
        Unloadable: a value that cannot be read, or a format that is not committed in two phases.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in ("load", "save", "pretrained-checkpoint"):
        parser.add_argument(f"--{name}", type=Path)
    parser.add_argument("--ckpt-step", type=int)
    parser.add_argument("--ckpt-format", default="torch_dist")
    parser.add_argument("--non-persistent-ckpt-type")
    parser.add_argument("--fresh", action=argparse.BooleanOptionalAction, default=False)
    try:
        values = parser.parse_known_args(list(flags))[0]
    except argparse.ArgumentError as error:
        raise Unloadable(f"{error.argument_name}: {error.message}") from None
    if values.ckpt_format != "torch_dist":
        raise Unloadable(f"--ckpt-format {values.ckpt_format}: legal: torch_dist (others are not committed whole)")
    if values.non_persistent_ckpt_type is not None:
        raise Unloadable(
            f"--non-persistent-ckpt-type {values.non_persistent_ckpt_type}: not committed whole; leave it out and "
            "save more often (--save-interval, --save-retain-interval)"
        )
    for name in ("load", "save", "pretrained_checkpoint"):
        value = getattr(values, name)
        if value is not None and ":/" in str(value):
            raise Unloadable(f"--{name.replace('_', '-')} {value}: only folders of a file system are supported")
    is_restart = any(_count(environment.get(name, "0")) > 0 for name in RESTART_COUNTERS)
    return Wish(
        values.load, values.save, values.pretrained_checkpoint, values.ckpt_step or None, values.fresh, is_restart
    )


def _count(text: str) -> int:
    return int(text) if text.isdigit() else 0


def decide(wish: Wish) -> Start:
    """What to start from; changes nothing on disk.

    Raises:
        Unloadable: the folders hold something else than the flags say; one line with what to do.
    """
    if wish.fresh:
        return _fresh(wish)
    if wish.load is None:
        return _without_load(wish)
    found = discovery.survey(wish.load)
    chosen = discovery.pick(found, wish.step) if not _left_to_pretrained(found, wish) else None
    source = found
    if chosen is None and wish.pretrained is not None and found.is_empty:
        source = discovery.survey(wish.pretrained)
        chosen = discovery.pick(source, wish.step)
        if chosen is None:
            raise discovery.nothing_usable("--pretrained-checkpoint", source, "give another folder")
    if chosen is None:
        raise discovery.nothing_usable(
            "--load", found, "a first start: leave out --load, or add --fresh; else give the right folder"
        )
    _refuse_two_histories(wish, found, chosen)
    rest = () if wish.step else source.complete[source.complete.index(chosen) + 1 :]
    lines = tuple(discovery.describe_choice(source, chosen)) if not wish.step else ()
    return Start(
        chosen, rest, lines, may_reject=wish.same and source is found, new_stage=source is not found, wish=wish
    )


def _left_to_pretrained(found: Survey, wish: Wish) -> bool:
    return found.is_empty and wish.pretrained is not None


def _fresh(wish: Wish) -> Start:
    if wish.load is not None and not wish.same and not discovery.survey(wish.load).is_empty:
        raise Unloadable(f"--fresh --load {wish.load}: --fresh starts from random weights; leave one of them out")
    if wish.pretrained is not None:
        raise Unloadable(
            f"--fresh --pretrained-checkpoint {wish.pretrained}: --fresh starts from random weights; leave one of them "
            "out"
        )
    folder = wish.save or wish.load
    found = discovery.survey(folder) if folder else None
    if found and wish.is_restart and found.complete:
        started = decide(replace(wish, fresh=False, load=folder))
        line = "--fresh: for a job's first start; this is a restart of it, which continues"
        return replace(started, lines=(line, *started.lines))
    aside = folder / f"set_aside_{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}" if folder else None
    return Start(set_aside=aside if found and not found.is_empty else None, wish=wish)


def _without_load(wish: Wish) -> Start:
    found = discovery.survey(wish.save) if wish.save else None
    if found and not found.is_empty:
        newest = (
            f"complete up to iteration {found.complete[0].iteration}" if found.complete else "none of them complete"
        )
        raise Unloadable(
            f"--save {wish.save}: holds checkpoints ({newest}) and --load is not given; "
            f"add --load {wish.save} to continue, or --fresh to start over from random weights"
        )
    if wish.pretrained is not None:
        raise Unloadable(
            f"--pretrained-checkpoint {wish.pretrained}: add --load FOLDER, the run's own checkpoints, "
            "which go before it from the second start on"
        )
    return Start(wish=wish)


def _refuse_two_histories(wish: Wish, found: Survey, chosen: Candidate) -> None:
    """A folder holds one history: saving beside newer checkpoints of another would make the wrong one the newest."""
    if wish.save is None:
        return
    there = found if wish.same else discovery.survey(wish.save)
    others = [c.iteration for c in there.complete if not wish.same or c.iteration > chosen.iteration]
    if others and wish.same:
        raise Unloadable(
            f"--ckpt-step {chosen.iteration}: --save {wish.save} holds newer checkpoints (up to iteration "
            f"{max(others)}), which the next start would load; give another --save folder"
        )
    if others:
        raise Unloadable(
            f"--save {wish.save}: holds checkpoints of its own (up to iteration {max(others)}) beside "
            f"--load {wish.load}; --load {wish.save} continues them, another --save folder starts anew"
        )


def move_aside(start: Start, say: Callable[[str], None]) -> None:
    """Carry out `--fresh`, on one rank; oldest first, so that a crash midway leaves the newest where it was."""
    if start.set_aside is None:
        return
    root = start.set_aside.parent
    start.set_aside.mkdir()
    for path in (*sorted(root.glob("iter_*")), root / "release", root / TRACKER_FILE):
        if path.exists():
            path.rename(start.set_aside / path.name)
    commit.fsync_folder(root)
    say(f"--fresh: earlier checkpoints were moved to {start.set_aside}")


def flags_for(start: Start, flags: Sequence[str]) -> list[str]:
    """Megatron's flags that load what was decided, and nothing else."""
    if start.chosen is None:
        return _without(flags, "--load")
    root = start.chosen.folder.parent
    kept = list(flags) if start.new_stage else [*_without(flags, "--load"), "--load", str(root)]
    return kept if start.chosen.release else [*kept, "--ckpt-step", str(start.chosen.iteration)]


def _without(flags: Sequence[str], name: str) -> list[str]:
    kept: list[str] = []
    words = iter(flags)
    for word in words:
        if word == name:
            next(words, None)
        elif not word.startswith(f"{name}="):
            kept.append(word)
    return kept


def agree(start: Start, verify: bool, say: Callable[[str], None]) -> Start:
    """On all ranks, once they can talk: the same checkpoint everywhere, every byte of it as it was saved.

    Each rank reads its share of the files. A damaged checkpoint is passed over for an older one and, where the run
    saves into the same folder, marked as rejected.

    Raises:
        Unloadable: on every rank, when nothing whole is left or ranks see different checkpoints.
    """
    import torch.distributed as dist

    rank, ranks = dist.get_rank(), dist.get_world_size()
    seen: list[Any] = [None] * ranks
    dist.all_gather_object(seen, start.chosen and start.chosen.iteration)
    if len(set(seen)) > 1:
        raise Unloadable(
            f"--load {start.wish.load}: ranks see different checkpoints ({sorted(set(map(str, seen)))}); "
            "is the folder on a file system that all nodes share?"
        )
    while verify and start.chosen is not None:
        began = time.monotonic()
        dist.all_gather_object(seen, discovery.damaged_files(start.chosen.folder, rank, ranks))
        faults = [fault for share in seen for fault in share]
        if not faults:
            say(f"{start.chosen.folder}: every file is as it was saved ({time.monotonic() - began:.1f} s)")
            break
        for fault in faults:
            say(fault)
        if rank == 0 and start.may_reject:
            commit.reject(start.chosen.folder, faults[0])
        following = start.next()
        if following is None or following.chosen is None:
            raise Unloadable(f"{start.chosen.folder}: damaged ({faults[0]}), and no other checkpoint to load")
        say(f"skipped {start.chosen.folder}: damaged; loading iteration {following.chosen.iteration}")
        start = following
    if start.chosen is not None and start.may_reject:
        if rank == 0 and not start.chosen.release:
            commit.point_to(start.chosen.folder.parent, start.chosen.iteration)
        dist.barrier()
    return start
