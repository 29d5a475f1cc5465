"""One model with its optimizer and data, stepped as Megatron's trainer steps it; then the next, in the same process.

Megatron's trainer builds one model in a process, and starting a process takes longer than the steps to be measured.
Here its parts are put together again: its argument parser, `get_model`, optimizer, schedule, and the plugin's forward
step. What the trainer does around them (logs, timers, checkpoints) is left out.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_hybrid import compat
from megatron_hybrid.config import HybridConfig
from megatron_hybrid.flags import compose

#: Random ids where no text is given; the vocabulary is OLMo's.
VOCABULARY = ("--tokenizer-type", "NullTokenizer", "--vocab-size", "100277", "--padded-vocab-size", "100352")


def start() -> None:
    """Megatron's process groups, of this process alone."""
    from megatron.core import parallel_state

    compat.start_backend()
    compat.join_or_be_alone()
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if not torch.distributed.is_initialized():
        rendezvous = Path(tempfile.mkdtemp(prefix="bench_")) / "rendezvous"
        torch.distributed.init_process_group(backend, init_method=f"file://{rendezvous}", rank=0, world_size=1)
        parallel_state.initialize_model_parallel()


def parse(preset: str, flags: Sequence[str], fixed_vocabulary: bool = True) -> argparse.Namespace:
    """Megatron's and the plugin's arguments, validated; they become the process's.

    Args:
        fixed_vocabulary: OLMo's; else the rows that the tokenizer among the flags needs.
    """
    from megatron.core.num_microbatches_calculator import reconfigure_num_microbatches_calculator
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
    from megatron.training import arguments, global_vars

    flags = compose(preset, [*(VOCABULARY if fixed_vocabulary else ()), *flags])
    sys.argv = [sys.argv[0], *flags, *compat.backend_flags(flags)]
    args = arguments.parse_args(extra_args_provider=HybridConfig.add_to)
    arguments.validate_args(args, {})
    if not fixed_vocabulary:
        multiple = args.make_vocab_size_divisible_by
        args.padded_vocab_size = -(-build_tokenizer(args).vocab_size // multiple) * multiple
    global_vars.destroy_global_vars()
    global_vars.set_args(args)
    reconfigure_num_microbatches_calculator(0, None, args.global_batch_size, args.micro_batch_size, 1)
    return args


def read_tokens(file: str | None, vocabulary: int = 100277, count: int = 2**22) -> torch.Tensor:
    """Token ids [n] int64: of a raw uint16 file, or random."""
    if file:
        return torch.from_numpy(np.fromfile(file, dtype=np.uint16).astype(np.int64))
    return torch.randint(0, vocabulary, (count,), generator=torch.Generator().manual_seed(1))


def batches(tokens: torch.Tensor, length: int, rows: int) -> Iterator[dict[str, torch.Tensor]]:
    """Microbatches of consecutive text, from the start again at the end."""
    step, at = length * rows, 0
    while True:
        if at + step + 1 > tokens.numel():
            at = 0
        window = tokens[at : at + step + 1]
        at += step
        yield {
            "tokens": window[:-1].view(rows, length),
            "labels": window[1:].view(rows, length),
            "loss_mask": torch.ones(rows, length),
            "position_ids": torch.arange(length).expand(rows, length).contiguous(),
        }


class Trained:
    """A model from arguments, its optimizer and its data.

    Args:
        args: from `parse`, the last that was parsed.
        tokens: ids [n] that batches are cut from; the sequence is repeated where it ends.
        with_optimizer: False for forward and backward only.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        tokens: torch.Tensor,
        with_optimizer: bool = True,
    ) -> None:
        from megatron.core import tensor_parallel
        from megatron.core.distributed import finalize_model_grads
        from megatron.training import training

        from megatron_hybrid.pretrain import provide_model
        from megatron_hybrid.training.skip_step import SkipStep

        self.args = args
        tensor_parallel.model_parallel_cuda_manual_seed(args.seed)
        torch.manual_seed(args.seed)
        self.model = training.get_model(provide_model)
        self.config = self.model[0].config
        self.microbatches = args.global_batch_size // args.micro_batch_size
        self.data = batches(tokens, args.seq_length, args.micro_batch_size)
        self.config.finalize_model_grads_func = finalize_model_grads
        self.skip_step = SkipStep() if args.skip_step else None
        try:
            self.optimizer = self._optimizer() if with_optimizer else None
        except BaseException:  # out of memory, most often
            self.close()
            raise
        if self.optimizer is not None:
            self.config.grad_scale_func = self.optimizer.scale_loss

    def _optimizer(self) -> Any:
        from megatron.training import training

        from megatron_hybrid.training.hooks import optimizer_builder

        config, overrides = training.get_megatron_optimizer_config(self.args)
        build = optimizer_builder(training.get_megatron_optimizer, HybridConfig.from_args(self.args), self.skip_step)
        return build(config, self.model, config_overrides=overrides)

    @property
    def tokens_per_step(self) -> int:
        return self.args.seq_length * self.args.global_batch_size

    @property
    def flops_per_step(self) -> float:
        from megatron_hybrid.flops import Sizes, training_flops_per_token

        sizes = Sizes.from_args(self.args)
        per_token = training_flops_per_token(sizes, self.args.hybrid_layer_pattern, self.args.seq_length)
        return per_token * self.tokens_per_step

    def backward(self) -> torch.Tensor:
        """Forward and backward over the global batch; returns the mean loss over its tokens (fp64 scalar)."""
        from functools import partial

        from megatron.core.pipeline_parallel import get_forward_backward_func

        from megatron_hybrid.training.loss import forward_step

        for chunk in self.model:
            chunk.zero_grad_buffer()
        observe = self.skip_step.observe if self.skip_step is not None else None
        parts = get_forward_backward_func()(
            forward_step_func=partial(forward_step, check_finite=False, z_loss=self.args.z_loss, observe=observe),
            data_iterator=self.data,
            model=self.model[0],
            num_microbatches=self.microbatches,
            seq_length=self.args.seq_length,
            micro_batch_size=self.args.micro_batch_size,
            forward_only=False,
        )
        total = torch.stack([part["lm loss"].double() for part in parts]).sum(0)
        return total[0] / total[1]

    def step(self) -> dict[str, float]:
        """One optimizer step: {loss, norm, ms, backward_ms (forward and backward)}."""
        synchronize()
        began = time.perf_counter()
        if self.optimizer is not None:
            self.optimizer.zero_grad()
        loss = self.backward()
        synchronize()
        middle, norm = time.perf_counter(), float("nan")
        if self.optimizer is not None:
            _, norm, _ = self.optimizer.step()
            synchronize()
        ended = time.perf_counter()
        return {
            "loss": float(loss),
            "norm": float(norm),
            "ms": (ended - began) * 1e3,
            "backward_ms": (middle - began) * 1e3,
        }

    def close(self) -> None:
        """Free the memory.

        The collector does not see that Megatron's distributed optimizer refers, through the autograd graph of its
        shards of fp32 parameters, to hooks that refer to the whole model: they are removed first.
        """
        for chunk in self.model:
            for node in chunk.grad_accs:
                hooks = node.register_hook(lambda *_: None).hooks_dict_ref()
                if hooks is not None:
                    hooks.clear()
        self.__dict__.clear()
        free()


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def free() -> None:
    if importlib.util.find_spec("transformer_engine") is not None and torch.cuda.is_available():
        from transformer_engine.pytorch.fp8 import FP8GlobalStateManager
        from transformer_engine.pytorch.module import base

        FP8GlobalStateManager.reset()  # it holds the scales of models that are gone
        base._dummy_wgrads.clear()  # a tensor of every weight's shape, for autograd to look at
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def live_bytes() -> int:
    """What tensors hold now: on a GPU its allocator's count, else of all tensors that the collector knows."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated()
    storages = {}
    for found in gc.get_objects():
        if issubclass(type(found), torch.Tensor):
            storage = found.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def peak_bytes() -> int:
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
