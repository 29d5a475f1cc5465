"""What Megatron keeps beside tensors, read without running or importing anything that the file names."""

from __future__ import annotations

import pickle  # only to subclass Unpickler below; nothing is loaded with pickle.load or pickle.loads
import zipfile
from pathlib import Path
from typing import Any

from megatron_hybrid.tools.cli import ToolError
from megatron_hybrid.tools.dcp_reader import TorchDistCheckpoint

COMMON_STATE = "common_state/shard_0_1"


class _Inert:
    """Stands for any class and any object of it: takes whatever a pickle does to it, and does nothing."""

    def __init__(self, *arguments: object, **named: object) -> None: ...

    def __call__(self, *arguments: object, **named: object) -> _Inert:
        return self

    def __setstate__(self, state: object) -> None: ...

    def __setitem__(self, key: object, value: object) -> None: ...

    def append(self, value: object) -> None:
        """For pickled lists of a class of their own."""

    def extend(self, values: object) -> None:
        """The same."""


class _InertUnpickler(pickle.Unpickler):
    """Builds dictionaries, lists, tuples, texts and numbers; everything else becomes inert."""

    def find_class(self, module: str, name: str) -> Any:
        """A stand-in, whatever is asked for: nothing is imported."""
        return _Inert

    def persistent_load(self, pid: object) -> Any:
        """A tensor's storage: not read."""
        return _Inert()


def read_common_state(checkpoint: TorchDistCheckpoint) -> dict[str, Any]:
    """Plain values of a checkpoint's common state; objects in it are inert stand-ins.

    Raises:
        ToolError: there is none, or it is damaged.
    """
    try:
        with checkpoint.open_object(COMMON_STATE) as view, zipfile.ZipFile(view) as archive:
            name = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
            if archive.testzip() is not None:
                raise ToolError(f"{checkpoint.folder}: checksum of {COMMON_STATE} does not match; the file is damaged")
            with archive.open(name) as handle:
                content = _InertUnpickler(handle).load()
    except (ToolError, OSError):
        raise
    except Exception as error:  # a damaged pickle raises nearly anything
        raise ToolError(f"{checkpoint.folder}: {COMMON_STATE} is unreadable ({type(error).__name__})") from None
    if not isinstance(content, list) or not content or not isinstance(content[0], dict):
        raise ToolError(f"{checkpoint.folder}: {COMMON_STATE} is not what Megatron writes")
    return content[0]


def adam_groups(checkpoint: TorchDistCheckpoint) -> list[dict[str, Any]]:
    """Adam's parameter groups of a distributed optimizer: lr, betas, eps, weight_decay, step, and so on."""
    groups: Any = read_common_state(checkpoint).get("optimizer")
    for key in ("optimizer", "param_groups"):
        groups = groups.get(key) if isinstance(groups, dict) else None
    if not isinstance(groups, list) or not groups or not all(isinstance(g, dict) and "step" in g for g in groups):
        raise ToolError(
            f"{checkpoint.folder}: it holds no state of Megatron's distributed Adam; leave --optimizer out, or save "
            "with --use-distributed-optimizer"
        )
    return groups


def folder_iteration(folder: Path) -> int | None:
    """The iteration in a folder's name."""
    digits = folder.name.removeprefix("iter_")
    return int(digits) if folder.name != digits and digits.isdigit() else None
