"""What Megatron's log line says besides: tokens/s/GPU, MFU, share of time waiting for data, hours left.

Values go into the losses that Megatron averages and prints, and to its TensorBoard and W&B writers: its own fields
stay as they are. Times are Megatron's interval, without evaluation and saving.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist

from megatron_hybrid.flops import Sizes, training_flops_per_token
from megatron_hybrid.training.health import Health
from megatron_hybrid.training.skip_step import SkipStep

#: Dense bf16 TFLOP/s by a part of the GPU's name, from NVIDIA's data sheets; the first that fits.
PEAK_TFLOPS = {
    "GB200": 2500.0,
    "B200": 2250.0,
    "H200": 989.4,
    "H100 PCIe": 756.0,
    "H100": 989.4,
    "A100": 312.0,
}


class Wait:
    """Seconds that the training loop has waited for batches."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def timed(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The same batches; the time that each takes to come is counted."""
        while True:
            start = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            finally:
                self.seconds += time.perf_counter() - start
            yield batch


def peak_tflops(given: float) -> tuple[float, str]:
    """Dense bf16 peak of this GPU and where it is from; 0 where it is not known."""
    if given:
        return given, "--peak-tflops"
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return next((peak for part, peak in PEAK_TFLOPS.items() if part in name), 0.0), name


class LogLine:
    """`training_log` of Megatron's trainer with more in it."""

    def __init__(self, args: Any, wait: Wait, skip_step: SkipStep | None, health: Health | None) -> None:
        """args: Megatron's, parsed."""
        self.wait, self.skip_step, self.health = wait, skip_step, health
        self._samples: int | None = None
        pattern = args.hybrid_layer_pattern.replace("|", "")
        self.flops = training_flops_per_token(Sizes.from_args(args), pattern, args.seq_length)
        self.peak, source = peak_tflops(args.peak_tflops)
        #: Said once, at the first line.
        self.formula = (
            f"MFU = tokens/s/GPU * {self.flops / 1e9:.4g} GFLOP a token (forward, twice that backward, nothing for "
            f"recomputation) / {self.peak:g} TFLOP/s ({source}, dense bf16)"
            if self.peak
            else f"MFU: the peak of {source} is not known; give --peak-tflops"
        )

    def around(self, original: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(original)

        def training_log(*given: Any, **named: Any) -> Any:
            bound = signature.bind(*given, **named)
            bound.apply_defaults()
            call = bound.arguments
            if self.skip_step is not None and call["loss_dict"]:  # ranks of the last pipeline stage, which print
                call["loss_dict"] = {**call["loss_dict"], "skipped steps": self.skip_step.skipped.float()}
            self._add(call)
            return original(*bound.args, **bound.kwargs)

        return training_log

    def _add(self, call: dict[str, Any]) -> None:
        from megatron.training import get_args, get_tensorboard_writer, get_wandb_writer

        args, iteration, first = get_args(), call["iteration"], call["is_first_iteration"]
        if self.health is not None:
            self.health.enabled = (iteration + 1) % args.log_interval == 0
        if iteration % args.log_interval and not first:
            return
        health, more = self.health.collect() if self.health is not None else ({}, {})
        line = self._speed(args, iteration, first) | health  # last, next to Megatron's own look at the clock
        totals, skipped = call["total_loss_dict"], call["skipped_iter"]
        advanced = max(1, totals.get("advanced iterations", 0) + (0 if skipped else 1))
        for name in call["loss_dict"]:  # Megatron's first, where they always were
            totals.setdefault(name, torch.zeros(1, device=_device()))
        for name, value in line.items():  # Megatron divides by the iterations
            totals[name] = torch.tensor([value * advanced])
        if writer := get_tensorboard_writer():
            for name, value in {**line, **more}.items():
                writer.add_scalar(name, value, iteration)
        if wandb := get_wandb_writer():
            wandb.log({**line, **more}, iteration)

    def _speed(self, args: Any, iteration: int, first: bool) -> dict[str, float]:
        from megatron.training import get_timers
        from megatron.training.utils import print_rank_last

        if self._samples is None:
            self._samples = args.consumed_train_samples - args.global_batch_size  # before this iteration
            print_rank_last(self.formula)
        seconds = get_timers()("interval-time").elapsed(reset=False, barrier=True)  # as Megatron does next
        samples = args.consumed_train_samples - self._samples
        waited = torch.tensor(self.wait.seconds, device=_device())
        dist.all_reduce(waited, op=dist.ReduceOp.MAX)
        speed = samples * args.seq_length / seconds / args.world_size
        left = (args.train_iters - iteration) * args.global_batch_size / samples * seconds
        found = {"tokens/s/GPU": speed}
        if self.peak:
            found["MFU (%)"] = 100 * speed * self.flops / (self.peak * 1e12)
        found |= {"data wait (%)": 100 * float(waited) / seconds, "ETA (h)": left / 3600}
        if not first:  # Megatron's interval goes on after the first iteration's line
            self._samples, self.wait.seconds = args.consumed_train_samples, 0.0
        return found


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
