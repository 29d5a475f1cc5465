"""Where a conversion reads from: every source gives the released Hugging Face tensors, grouped by Megatron tensor."""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from megatron_hybrid.checkpoint.sidecar import FILE_NAME as SIDECAR_FILE
from megatron_hybrid.tools.cli import ToolError
from megatron_hybrid.tools.convert.in_order import InOrder
from megatron_hybrid.tools.convert.safetensors_folder import ITEM_BYTES
from megatron_hybrid.tools.dcp_reader import TorchDistCheckpoint, find_iteration
from megatron_hybrid.tools.hf_mapping import (
    ModelConfig,
    TensorRule,
    check_stored_shape,
    config_from_sidecar,
    tensor_rules,
    to_hf,
)

if TYPE_CHECKING:
    from torch import Tensor

MODEL_PREFIXES = ("embedding.", "decoder.", "output_layer.")  # every model tensor's name starts with one of these
FP32_ISLANDS = ("A_log", "dt_bias")  # the decay of Gated DeltaNet; bf16 rounds it by as much as 0.4 %
PARAM, EXP_AVG, EXP_AVG_SQ = "param", "exp_avg", "exp_avg_sq"  # a parameter, and Adam's two moments of it
READERS = 2  # rules read at once: one thread leaves the disk idle while it copies
OPTIMIZER = "optimizer."  # before PARAM: the optimizer's own fp32 copy of the parameter


class Source(Protocol):
    """A model that was found to be whole, readable rule by rule."""

    @property
    def config(self) -> ModelConfig:
        """The model."""
        ...

    @property
    def rules(self) -> list[TensorRule]:
        """Its tensors, in the order in which they are converted."""
        ...

    @property
    def folder(self) -> Path:
        """What is read."""
        ...

    def dtype(self, rule: TensorRule) -> str:
        """The stored dtype of a rule's tensors, such as 'bfloat16'."""
        ...

    def read(self, rule: TensorRule, state: str = PARAM) -> dict[str, Tensor]:
        """The Hugging Face tensors of a rule, or Adam's moments of them, each contiguous, in the stored dtype."""
        ...


@dataclass(frozen=True)
class MegatronSource:
    """A torch_dist checkpoint that was found to be whole and to belong to its sidecar."""

    checkpoint: TorchDistCheckpoint
    config: ModelConfig
    sidecar: dict[str, Any]
    rules: list[TensorRule]

    @property
    def folder(self) -> Path:
        return self.checkpoint.folder

    def dtype(self, rule: TensorRule) -> str:
        return self.checkpoint.stored(rule.megatron).dtype

    def read(self, rule: TensorRule, state: str = PARAM) -> dict[str, Tensor]:
        name = rule.megatron if state == PARAM else f"optimizer.state.{state.removeprefix(OPTIMIZER)}.{rule.megatron}"
        parts = to_hf(rule, self.checkpoint.read(name), self.config)
        return {name: part.contiguous() for name, part in parts.items()}


def open_megatron(checkpoint: Path, iteration: int | None = None) -> MegatronSource:
    """Opens a checkpoint with its sidecar and checks names, shapes, chunks and file sizes of all model tensors."""
    folder = find_iteration(checkpoint, iteration)
    config, sidecar = read_sidecar(folder)
    reader = TorchDistCheckpoint(folder)
    rules = tensor_rules(config)
    for rule in rules:
        stored = reader.stored(rule.megatron)
        if stored.dtype not in ITEM_BYTES:
            raise ToolError(f"{folder}: {stored.name} is {stored.dtype}, legal: {', '.join(ITEM_BYTES)}")
        check_stored_shape(rule, stored.shape)
        reader.check(rule.megatron)
    expected = {rule.megatron for rule in rules}
    foreign = [n for n in reader.tensors if n.startswith(MODEL_PREFIXES) and n not in expected]
    if foreign:
        raise ToolError(
            f"{folder}: {len(foreign)} model tensors have no place in the Hugging Face model, the first is "
            f"{foreign[0]}; the sidecar {SIDECAR_FILE} does not belong to this checkpoint"
        )
    return MegatronSource(reader, config, sidecar, rules)


def read_sidecar(iteration_folder: Path) -> tuple[ModelConfig, dict[str, Any]]:
    """The configuration beside a checkpoint: in the iteration's folder or else in the one above."""
    for folder in (iteration_folder, iteration_folder.resolve().parent):
        path = folder / SIDECAR_FILE
        if path.is_file():
            try:
                values = json.loads(path.read_text())
            except ValueError as error:
                raise ToolError(f"{path}: not JSON ({error}); copy it again from the training run") from None
            if not isinstance(values, dict):
                raise ToolError(f"{path}: a JSON object was expected, but it holds a {type(values).__name__}")
            return config_from_sidecar(values, str(path)), values
    raise ToolError(
        f"{iteration_folder}: no {SIDECAR_FILE} in it or in the folder above; "
        "the trainer writes it beside the iterations, copy it there"
    )


def read_ahead(source: Source, state: str = PARAM) -> Iterator[tuple[TensorRule, dict[str, Tensor]]]:
    """Every rule with its tensors, the next ones being read while the caller works on one.

    Host memory: READERS + 1 rules' tensors. Threads are enough: reads and checksums run outside Python's lock.
    """
    with ThreadPoolExecutor(READERS, thread_name_prefix="read") as pool:
        waiting = deque(pool.submit(source.read, rule, state) for rule in source.rules[:READERS])
        for rule, following in zip_longest(source.rules, source.rules[READERS:]):
            tensors = waiting.popleft().result()
            if following is not None:
                waiting.append(pool.submit(source.read, following, state))
            yield rule, tensors
            del tensors


class Hashes:
    """SHA-256 of tensors by name, computed beside the caller's work."""

    def __init__(self, check: Callable[[str, str], None] | None = None) -> None:
        """check: called with the name and the hash of each tensor; what it raises comes out of `add` or `all`."""
        self._check = check
        self._thread = InOrder("hash", 4)  # a rule's tensors
        self._known: dict[str, str] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        """Hashes a contiguous tensor, which must not be changed afterwards."""
        self._thread.submit(self._hash, name, tensor)

    def all(self) -> dict[str, str]:
        """What was added; ends the thread."""
        self._thread.finish()
        return self._known

    def _hash(self, name: str, tensor: Tensor) -> None:
        self._known[name] = sha256_of(tensor)
        if self._check:
            self._check(name, self._known[name])


def sha256_of(tensor: Tensor) -> str:
    """SHA-256 of a contiguous tensor's bytes as safetensors stores them."""
    import torch

    return hashlib.sha256(tensor.reshape(-1).view(torch.uint8).numpy().data).hexdigest()
