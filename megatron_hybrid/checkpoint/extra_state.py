"""`_extra_state`: what Transformer Engine's modules keep beside their weights, in checkpoints that may not have it.

Every module of Transformer Engine has such an entry, norms and attention too; Megatron's own linears have an empty
one, the plugin's modules none. So a checkpoint of the one kind lacks entries that a model of the other asks for. Only
delayed scaling keeps something in it: the history of largest values and the scales of its FP8 tensors. That is a
pickle, which Transformer Engine (2.20) refuses to load unless told that the file is trusted.

Here an entry that the checkpoint lacks keeps the value the module has (a fresh one), which is said in one line; any
other missing key stays an error. And pickles are read first by an unpickler that knows nothing but what belongs there.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from megatron_hybrid.tools.dcp_reader import read_metadata

SUFFIX = "_extra_state"

#: By which Transformer Engine is told that pickled state may be loaded.
TRUSTED = "NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE"
_trusted_by_user = os.environ.get(TRUSTED) == "1"


class ForeignPickle(ValueError):
    """An extra state that holds what does not belong there."""


def fill_missing(sharded_state: Any, stored: set[str]) -> int:
    """Let entries that are not `stored` keep what their modules have, in place; returns how many.

    Args:
        sharded_state: a Megatron sharded state dict, before its factories are applied.
        stored: unique keys of the objects in the checkpoint.
    """
    from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace
    from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedObject

    count = 0

    def own_if_missing(value: Any) -> Any:
        nonlocal count
        missing = isinstance(value, ShardedObject) and value.key.endswith(SUFFIX) and value.unique_key not in stored
        if not missing:
            return value
        count += 1
        return LocalNonpersistentObject(value.data)

    dict_list_map_inplace(own_if_missing, sharded_state)
    return count


def trust_after_check(state: Any) -> int:
    """Read every pickled extra state with a restricted unpickler, then let Transformer Engine load them.

    Returns how many there are. With none, nothing is trusted. Where the user has said that all are trusted, nothing is
    read.

    Raises:
        ForeignPickle: one holds anything but scales, plain values and the name of its recipe.
    """
    count = 0
    if _trusted_by_user:
        return count
    for key, value in _entries(state):
        if isinstance(value, torch.Tensor) and value.numel():
            _check(key, value.detach().cpu().numpy().tobytes())
            count += 1
        elif isinstance(value, io.BytesIO):
            raise ForeignPickle(f"{key}: saved by Transformer Engine 1.x; load it with that version and save it anew")
    if count:
        os.environ[TRUSTED] = "1"
    return count


def _entries(state: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(state, dict):
        for key, value in state.items():
            yield from _entries(value, str(key))
    elif isinstance(state, (list, tuple)):
        for value in state:
            yield from _entries(value)
    elif name.endswith(SUFFIX):
        yield name, state


def _check(key: str, data: bytes) -> None:
    from megatron.core.safe_globals import SafeUnpickler, safe_load_from_bytes

    class Checking(SafeUnpickler):
        """Megatron's list of what such a state may hold; tensors inside it are read as weights only."""

        def find_class(self, module: str, name: str) -> Any:
            if (module, name) == ("torch.storage", "_load_from_bytes"):
                return safe_load_from_bytes
            return super().find_class(module, name)

    try:
        Checking(io.BytesIO(data)).load()
    except Exception as error:  # a pickle can fail in any way
        raise ForeignPickle(
            f"{key}: its pickle is not one of Transformer Engine's FP8 states ({' '.join(str(error).split())}); it is "
            "not loaded. Train on from the weights alone: --no-load-optim --finetune with a converted checkpoint"
        ) from error


def load(
    original: Callable[..., Any], say: Callable[[str], None], state: Any, folder: Any, *args: Any, **kw: Any
) -> Any:
    """Megatron's `dist_checkpointing.load` with both rules."""
    missing = fill_missing(state, set(read_metadata(Path(str(folder)) / ".metadata")[1]))
    if missing:
        say(
            f"{folder}: no {SUFFIX} of {missing} modules of this model (it was written by other modules); "
            "their FP8 scales, if they have any, start anew"
        )
    loaded = original(state, folder, *args, **kw)
    trust_after_check(loaded[0] if isinstance(loaded, tuple) else loaded)
    return loaded
