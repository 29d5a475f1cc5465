"""Megatron on gloo without a GPU: one explicit `enable()`, never called at import, no effect where a GPU is present.

Megatron-Core names CUDA in about forty places that a CPU run reaches (devices, streams, random state, type
strings). `REPLACEMENTS` lists every symbol that `enable()` replaces and why; nothing else is touched, and the
mathematics is never changed. Three entries are not about devices: torch's Adam stands in for Transformer Engine's
fused Adam on CPU, and Megatron's distributed optimizer mishandles its per-parameter `step` tensor.
"""

from __future__ import annotations

import functools
import importlib
import os
import queue
import sys
import types
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch._dynamo

_CPU = torch.device("cpu")


class _Stream:
    """A stream on a device that has none: everything is already in order."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def wait_stream(self, stream: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def record_event(self, event: Any = None) -> Any:
        return event

    def synchronize(self) -> None: ...


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A tensor factory that builds on the CPU what the caller asks for on a GPU."""

    @functools.wraps(factory)
    def build(*args: Any, **kwargs: Any) -> torch.Tensor:
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda":
            kwargs["device"] = _CPU
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return factory(*args, **kwargs)

    return build


class _TorchOnCpu(types.ModuleType):
    """What the name `torch` means inside the Megatron modules that spell device='cuda'."""

    FACTORIES = ("tensor", "zeros", "ones", "empty", "full", "arange", "zeros_like", "empty_like", "rand")

    def __init__(self) -> None:
        super().__init__("torch")
        for name in self.FACTORIES:
            setattr(self, name, _on_cpu(getattr(torch, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _tensor_type(original: Callable[..., Any]) -> Callable[..., Any]:
    """Megatron's optimizers compare `tensor.type()` with 'torch.cuda.FloatTensor': answer so to them alone."""

    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = original(self, *args, **kwargs)
        asked_by = sys._getframe(1).f_globals.get("__name__", "")
        if not args and not kwargs and asked_by.startswith("megatron.core.optimizer"):
            return answer.replace("torch.", "torch.cuda.", 1)
        return answer

    return type_


def _set_states_with_step(original: Callable[..., Any]) -> Callable[..., Any]:
    """Loading passes no `step` for torch's Adam (KeyError), or, unresharded, one that is not the saved one.

    The parameter groups hold the right step, and Megatron has set it from them before this is called.
    In fp32 the optimizer's tensors are the model's own parameters, which Megatron overwrites with autograd on.
    """

    @torch.no_grad()
    def set_states(self: Any, model_param: Any, tensors: Any) -> None:
        original(self, model_param, {**tensors, "step": None})

    return set_states


def _load_with_own_steps(original: Callable[..., Any]) -> Callable[..., Any]:
    """Loading gives every parameter the same `step` tensor, which Adam then advances once per parameter."""

    def load_state_dict(self: Any, state_dict: Any) -> None:
        original(self, state_dict)
        for state in self.optimizer.state.values():
            if torch.is_tensor(state.get("step")):
                state["step"] = state["step"].clone()

    return load_state_dict


def _state_from_the_start(original: Callable[..., Any]) -> Callable[..., Any]:
    """A resuming run asks for the state before the first step, when torch's Adam has none yet."""

    def state_dict(self: Any) -> Any:
        for group in self.optimizer.param_groups:
            for param in group["params"]:
                if not self.optimizer.state[param]:
                    moments = {key: torch.zeros_like(param) for key in self.optimizer_state_keys}
                    self.optimizer.state[param].update(step=torch.tensor(0.0), **moments)
        return original(self)

    return state_dict


def _worker_by_fork(original: Callable[..., Any]) -> Callable[..., Any]:
    """The async save's worker is forked: a new process would lack these replacements. Its queue is a shared one."""

    def init_persistent_async_worker(rank: int, mp_mode: str = "fork") -> None:
        filesystem_async: Any = importlib.import_module(_FILESYSTEM_ASYNC)
        filesystem_async._results_queue = None  # Megatron makes one that processes share
        original(rank, "fork")

    return init_persistent_async_worker


def _staged_copies(original: Callable[..., Any]) -> Callable[..., Any]:
    """An async save copies tensors off the device before training goes on; on a CPU it would share them."""

    @functools.wraps(original)
    def preload_tensors(write_buckets: Any, non_blocking: bool = True) -> Any:
        return [
            (path, key, (data, [(item, tensor.clone()) for item, tensor in tensors]))
            for path, key, (data, tensors) in original(write_buckets, non_blocking)
        ]

    return staticmethod(preload_tensors)


def _initialize_without_cuda(original: Callable[..., Any]) -> Callable[..., Any]:
    return functools.partial(original, allow_no_cuda=True)


def _constant(value: Any) -> Callable[[Any], Any]:
    return lambda original: lambda *args, **kwargs: value


def _value(value: Any) -> Callable[[Any], Any]:
    return lambda original: value


@dataclass(frozen=True)
class Replacement:
    """One replaced symbol: `module.attribute` (attribute may be dotted) becomes `make(original)`."""

    module: str
    attribute: str
    make: Callable[[Any], Any]
    reason: str

    @property
    def name(self) -> str:
        return f"{self.module}.{self.attribute}"

    def owner(self) -> tuple[Any, str]:
        """The object that holds the symbol and the symbol's last name; AttributeError where it is gone."""
        target: Any = importlib.import_module(self.module)
        *path, last = self.attribute.split(".")
        for part in path:
            target = getattr(target, part)
        getattr(target, last)
        return target, last


_STREAM = _Stream()
_DISTRIBUTED_OPTIMIZER = "megatron.core.optimizer.distrib_optimizer"
_FILESYSTEM_ASYNC = "megatron.core.dist_checkpointing.strategies.filesystem_async"

#: Megatron modules whose literal device='cuda' or pin_memory=True a CPU run reaches.
MODULES_NAMING_CUDA = (
    "megatron.core.pipeline_parallel.schedules",
    "megatron.core.optimizer.optimizer",
    "megatron.core.optimizer.clip_grads",
    "megatron.core.rerun_state_machine",
    "megatron.core.utils",
    "megatron.core.models.common.embeddings.rope_utils",
    "megatron.core.transformer.utils",
    "megatron.core.dist_checkpointing.exchange_utils",
    "megatron.core.dist_checkpointing.strategies.state_dict_saver",
    "megatron.training.utils.common_utils",
    "megatron.training.training",
    "megatron.training.checkpointing",
    "megatron.training.initialize",
)


def _replacements() -> list[Replacement]:
    cuda = "torch.cuda"
    table = [
        Replacement(cuda, "current_device", _constant(_CPU), "used as a device throughout Megatron"),
        Replacement(cuda, "set_device", _constant(None), "initialize_megatron"),
        Replacement(
            cuda,
            "device_count",
            _value(lambda: int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1")))),
            "process groups are only made where there is a device for each local rank",
        ),
        Replacement(cuda, "synchronize", _constant(None), "pipeline p2p, checkpoint writer"),
        Replacement(cuda, "empty_cache", _constant(None), "training loop"),
        Replacement(cuda, "current_stream", _constant(_STREAM), "gradient buffers"),
        Replacement(cuda, "Stream", _value(_Stream), "DDP set-up"),
        Replacement(cuda, "stream", _constant(nullcontext()), "DDP set-up"),
        Replacement(cuda, "set_stream", _constant(None), "initialize_megatron"),
        Replacement(cuda, "manual_seed", _value(lambda seed: torch.manual_seed(seed)), "model-parallel seeds"),
        Replacement(cuda, "get_rng_state", _value(lambda *a, **k: torch.get_rng_state()), "RNG tracker, checkpoint"),
        Replacement(cuda, "set_rng_state", _value(lambda state, *a, **k: torch.set_rng_state(state)), "RNG tracker"),
        Replacement(
            cuda,
            "get_device_properties",
            _constant(types.SimpleNamespace(major=0, minor=0, name="cpu", total_memory=0, multi_processor_count=1)),
            "device architecture checks of the trainer",
        ),
        Replacement("torch", "Tensor.cuda", _value(lambda self, *a, **k: self), "the trainer moves model and batch"),
        Replacement("torch", "Tensor.type", _tensor_type, "optimizers compare type strings"),
        Replacement("torch.nn", "Module.cuda", _value(lambda self, *a, **k: self), "the trainer moves the model"),
        Replacement(
            "megatron.core.tensor_parallel.random",
            "_get_cuda_rng_state",
            _value(lambda *a, **k: torch.get_rng_state()),
            "RNG tracker, activation recompute",
        ),
        Replacement(
            "megatron.core.tensor_parallel.random",
            "_set_cuda_rng_state",
            _value(lambda state, *a, **k: torch.set_rng_state(state)),
            "RNG tracker, activation recompute",
        ),
        Replacement(
            _DISTRIBUTED_OPTIMIZER,
            "DistributedOptimizer._set_main_param_and_optimizer_states",
            _set_states_with_step,
            "torch Adam stands in for the fused one: `step` is missing on load",
        ),
        Replacement(
            _DISTRIBUTED_OPTIMIZER,
            "DistributedOptimizer.state_dict",
            _state_from_the_start,
            "torch Adam stands in for the fused one: no state before the first step",
        ),
        Replacement(
            _DISTRIBUTED_OPTIMIZER,
            "DistributedOptimizer.load_state_dict",
            _load_with_own_steps,
            "torch Adam stands in for the fused one: `step` is shared after load",
        ),
        Replacement(
            _FILESYSTEM_ASYNC,
            "_results_queue",
            lambda original: queue.Queue(),
            "the writers are threads; the default spawns a process that imports everything again",
        ),
        Replacement(
            _FILESYSTEM_ASYNC,
            "FileSystemWriterAsync.preload_tensors",
            _staged_copies,
            "an async save would write weights that training has changed meanwhile",
        ),
        Replacement(
            "megatron.training.initialize",
            "init_persistent_async_worker",
            _worker_by_fork,
            "the worker of async saves is a new process, without these replacements",
        ),
        Replacement(
            "megatron.training.training", "initialize_megatron", _initialize_without_cuda, "asserts that CUDA is there"
        ),
    ]
    memory = ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved")
    table += [Replacement(cuda, name, _constant(0), "memory report") for name in (*memory, "device_memory_used")]
    table.append(Replacement(cuda, "memory_stats", _value(lambda *a, **k: {}), "memory report"))
    proxy = _TorchOnCpu()
    table += [Replacement(m, "torch", _value(proxy), "spells device='cuda'") for m in MODULES_NAMING_CUDA]
    return table


#: Every symbol that `enable()` replaces.
REPLACEMENTS: tuple[Replacement, ...] = tuple(_replacements())

_enabled = False


def enable() -> bool:
    """Make Megatron run on the CPU over gloo. Returns False, and changes nothing, where a GPU is present.

    Call it before building process groups. Safe to call twice.

    Raises:
        RuntimeError: a replaced symbol no longer exists (Megatron or torch was upgraded); the message names it.
    """
    global _enabled
    if _enabled:
        return True
    if torch.cuda.is_available():
        return False
    owners = []
    for replacement in REPLACEMENTS:
        try:
            owners.append((replacement, *replacement.owner()))
        except (ImportError, AttributeError) as error:
            raise RuntimeError(
                f"cpu_backend: {replacement.name} is gone ({error}); it was replaced because: {replacement.reason}. "
                "Install the pinned versions (setup.py) or adapt megatron_hybrid/cpu_backend.py."
            ) from None
    for replacement, owner, attribute in owners:
        setattr(owner, attribute, replacement.make(getattr(owner, attribute)))
    # Compiling Megatron's small fused functions for the CPU costs 50 s at the first step and saves nothing.
    torch._dynamo.config.disable = True
    # Megatron's parser wants this with tensor parallelism on GPUs before Blackwell; it means nothing here.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    _enabled = True
    return True
