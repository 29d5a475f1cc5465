"""The names in Megatron's checkpoint code that are replaced, so that what it saves is committed in two phases.

Megatron has no callback between "all data is written" and "the pointer says so", and reads and writes its pointer file
in place. Its saving, loading and loop stay its own. `install` refuses a Megatron whose code is another than the one
this was written for.
"""

from __future__ import annotations

import hashlib
import inspect
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from megatron_hybrid.checkpoint import commit, extra_state, masters
from megatron_hybrid.tools.dcp_reader import TRACKER_FILE

#: SHA-256 of the source of what is replaced or relied on (megatron-core 0.19.2), first 16 digits.
EXPECTED = {
    "megatron.training.checkpointing": {
        "save_checkpoint": "b652984ca8c8309d",
        "read_metadata": "4097e86b47f78c9b",
        "_load_base_checkpoint": "9a7e9e8de2428c67",
        "_async_delete_checkpoint_impl": "be821becfe6fc1e7",
        "load_checkpoint": "4f03d48a79382b8c",
        "_maybe_setup_gpt_to_hybrid_load": "2347cabda1a14445",  # training/stage_change.py
    },
    "megatron.training.training": {
        "train": "3c2299658ae7928b",
        "checkpoint_and_decide_exit": "a581d0350f89e3d5",
        "save_checkpoint_and_time": "f72b7873e1709b5e",
    },
    "megatron.core.dist_checkpointing.serialization": {"save": "e9626ecdf679a001"},
}


class Checkpoints:
    """What this process knows of the checkpoints of its run.

    Args:
        describe: what the manifest of a checkpoint says beside its files.
        say: prints one line, on one rank.
    """

    def __init__(self, describe: Callable[[], dict[str, Any]], say: Callable[[str], None]) -> None:
        self.describe, self.say = describe, say
        #: (folder, iteration) that a load takes, whatever the pointer file says.
        self.chosen: tuple[Path, int, bool] | None = None
        #: Iteration folder that is on disk whole, or about to be: the same state is not saved twice.
        self.latest: Path | None = None
        #: The newest iteration that is COMPLETE.
        self.durable: int | None = None

    def choose(self, folder: Path, iteration: int, release: bool, is_own: bool) -> None:
        """Load this one, which `is_own` if the run saves into the folder it lies in."""
        self.chosen = (folder.parent, iteration, release)
        if is_own and not release:
            self.latest, self.durable = folder, iteration

    # What replaces Megatron's functions; each takes the original first.

    def save_checkpoint(self, original: Callable[..., None], iteration: int, *args: Any, **kwargs: Any) -> None:
        """Leave out saving a state again that is saved: Megatron does so at batch size changes and after a last step.

        To overwrite a complete checkpoint would mean to have none for a while.
        """
        from megatron.training import get_args

        folder = Path(get_args().save) / f"iter_{iteration:07d}"
        if self.latest is not None and self.latest.resolve() == folder.resolve():
            self.say(f"iteration {iteration} is saved already in {folder}")
            return
        original(iteration, *args, **kwargs)
        self.latest = folder

    def save(self, original: Callable[..., Any], state: Any, checkpoint_dir: Any, *args: Any, **kwargs: Any) -> Any:
        """Megatron's `dist_checkpointing.save`, then hashes, manifest and COMPLETE; for an async save, once it is done.

        Megatron sets the pointer after this, or after the async request's last function.
        """
        import torch.distributed as dist

        folder, rank, began = Path(str(checkpoint_dir)), dist.get_rank(), time.monotonic()
        if rank == 0:
            commit.start(folder)
        dist.barrier()
        request = original(state, checkpoint_dir, *args, **kwargs)
        if request is None:
            commit.hash_own_files(folder, rank)
            dist.barrier()
            self._finish(folder, began)
            return None
        if request.async_fn is not None:
            request = request._replace(async_fn=partial(write_and_hash, request.async_fn, folder, rank))
        request.finalize_fns.append(partial(self._finish, folder, began))
        return request

    def _finish(self, folder: Path, began: float) -> None:
        """On every rank, once all have hashed what they wrote."""
        import torch.distributed as dist

        iteration = int(folder.name.removeprefix("iter_"))
        if dist.get_rank() == 0:
            hashed = time.monotonic()
            manifest = commit.finish(folder, iteration, self.describe())
            size = sum(entry["bytes"] for entry in manifest["files"].values())
            seconds = time.monotonic() - began
            self.say(
                f"iteration {iteration} is durable: {len(manifest['files'])} files, {size / 1e9:.3f} GB in "
                f"{seconds:.1f} s from the start of the save ({size / 1e9 / seconds:.3f} GB/s), the last "
                f"{time.monotonic() - hashed:.1f} s of it manifest and {commit.COMPLETE}"
            )
        dist.barrier()
        self.durable = iteration

    def read_metadata(self, original: Callable[..., Any], tracker: str) -> tuple[int, bool]:
        """What was chosen at the start; Megatron's exits with status 0 at a pointer that it cannot read."""
        if self.chosen is not None and Path(tracker).parent.resolve() == self.chosen[0].resolve():
            return self.chosen[1], self.chosen[2]
        return original(tracker)


def write_and_hash(write: Callable[..., None], folder: Path, rank: int, *args: Any, **kwargs: Any) -> None:
    """An async save's work, in the process that does it: what Megatron's does, then the hashes."""
    write(*args, **kwargs)
    commit.hash_own_files(folder, rank)


def delete(original: Callable[..., None], save_path: str, iteration: int, *args: Any, **kwargs: Any) -> None:
    """Megatron's removal of an old checkpoint, which from its first moment is no checkpoint any more."""
    commit.retract(Path(save_path) / f"iter_{iteration:07d}")
    original(save_path, iteration, *args, **kwargs)


class FilesWithWholePointer:
    """Stands for Megatron's file functions (`maybe_msc`): the pointer file is replaced, never written in place."""

    def __init__(self, original: Any) -> None:
        self._original = original

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)

    def open(self, path: str, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if mode == "w" and Path(path).name == TRACKER_FILE:
            return commit.open_pointer(Path(path))
        return self._original.open(path, mode, *args, **kwargs)


def unexpected() -> list[str]:
    """Names whose code is not what this file was written for."""
    import importlib

    found = []
    for module, names in EXPECTED.items():
        holder = importlib.import_module(module)
        for name, expected in names.items():
            source = inspect.getsource(getattr(holder, name)) if hasattr(holder, name) else ""
            if hashlib.sha256(source.encode()).hexdigest()[:16] != expected:
                found.append(f"{module}.{name}")
    return found


_installed: Checkpoints | None = None


def install(checkpoints: Checkpoints) -> None:
    """Replace the names, for the rest of the process.

    Raises:
        RuntimeError: Megatron's code is not the expected one; the message names what differs.
    """
    global _installed
    from megatron.training import checkpointing, training

    if _installed is not None:
        raise RuntimeError("checkpoint hooks are installed already; one run in a process")
    if names := unexpected():
        raise RuntimeError(
            f"{', '.join(names)}: not the code of megatron-core 0.19.2; its checkpoints could not be committed safely; "
            "install the pinned version (setup.py)"
        )
    _installed = checkpoints
    training.save_checkpoint = partial(checkpoints.save_checkpoint, training.save_checkpoint)
    save = partial(checkpoints.save, checkpointing.dist_checkpointing.save)
    load = partial(extra_state.load, checkpointing.dist_checkpointing.load, checkpoints.say)
    load = partial(masters.load, load)
    checkpointing.dist_checkpointing = _With(checkpointing.dist_checkpointing, save=save, load=load)
    checkpointing.read_metadata = partial(checkpoints.read_metadata, checkpointing.read_metadata)
    checkpointing._async_delete_checkpoint_impl = partial(delete, checkpointing._async_delete_checkpoint_impl)
    checkpointing.maybe_msc = FilesWithWholePointer(checkpointing.maybe_msc)


class _With:
    """A module with other attributes, for one importer of it."""

    def __init__(self, module: Any, **others: Any) -> None:
        self._module = module
        self.__dict__.update(others)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)
