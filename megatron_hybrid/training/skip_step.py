"""SkipStep: an update is left out where loss or gradient norm stands far above those of the steps before.

The rule is OLMo-core's (SkipStepAdamW): skip where the step's cross entropy, or its gradient norm before clipping,
exceeds the mean of the last 128 steps by more than 6 sample standard deviations; never before 64 steps are known, and
never for low values. Data and learning rate go on, Adam's step counter does not, and the outlier enters the window.

What the reference leaves open: the window is in the checkpoint; a value that is not finite always skips and never
enters the window; and skipping is a select, so that NaN gradients leave weights and moments as they were.

Nothing waits for the device. Loss and norm are summed over all ranks in one message of three numbers, so every rank
computes the same decision from the same bits. The inner optimizer then steps over a slice of its parameters at a time,
and what it changed is kept or put back by `torch.where`: bit-equal to the plain optimizer where nothing is skipped,
for any inner optimizer, at the cost of a copy of one slice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

WINDOW_STEPS = 128
FEWEST_STEPS = 64
SIGMAS = 6.0

#: Elements of parameters that are copied at a time: 0.8 GB with their moments in fp32.
SLICE_ELEMENTS = 64 * 2**20

#: Where the window stands in the optimizer's part of a checkpoint.
STATE_KEY = "skip_step"


class Window:
    """Losses and gradient norms of the last steps, and the rule. Everything stays on the device."""

    def __init__(self, device: torch.device) -> None:
        #: Row 0 losses, row 1 gradient norms, in a ring.
        self.values = torch.zeros(2, WINDOW_STEPS, dtype=torch.float64, device=device)
        self.steps = torch.zeros((), dtype=torch.int64, device=device)  # that entered, ever
        self._positions = torch.arange(WINDOW_STEPS, device=device)

    def judge(self, latest: torch.Tensor) -> torch.Tensor:
        """Whether to skip (bool scalar) a step of [loss, gradient norm] (fp64); then takes it into the window."""
        known = self.steps.clamp(max=WINDOW_STEPS)
        valid = self._positions < known
        mean = (self.values * valid).sum(1) / known.clamp(min=1)
        deviations = (self.values - mean[:, None]) * valid
        std = (deviations.square().sum(1) / (known - 1).clamp(min=1)).sqrt()
        outlier = (latest - mean > SIGMAS * std).any() & (known + 1 >= FEWEST_STEPS)
        finite = latest.isfinite().all()
        here = (self._positions == self.steps % WINDOW_STEPS) & finite
        self.values = torch.where(here, latest[:, None], self.values)
        self.steps = self.steps + finite
        return outlier | ~finite

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"values": self.values.cpu(), "steps": self.steps.cpu()}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.values = state["values"].to(self.values)
        self.steps = state["steps"].to(self.steps)


class SkipStep:
    """The rule attached to a Megatron optimizer. `observe` gets the loss of every microbatch.

    `skipped` is whether the latest step was skipped: a float64 scalar on the device, 0 or 1, the same on all ranks.
    `in_a_row` counts skipped steps since the last that was not.
    """

    def __init__(self) -> None:
        self._losses: list[torch.Tensor] = []
        self._steps: list[_Selecting] = []
        self.window: Window | None = None
        self.skipped = torch.zeros((), dtype=torch.float64)
        self.in_a_row = torch.zeros((), dtype=torch.float64)

    def observe(self, loss_and_tokens: torch.Tensor) -> None:
        """[sum of cross entropies, tokens] (fp64) of a microbatch, on ranks of the last pipeline stage."""
        self._losses.append(loss_and_tokens)

    def attach(self, optimizer: Any) -> None:
        """Make `optimizer`, Megatron's, leave out the steps that are to be skipped, and save the window.

        Args:
            optimizer: a ChainedOptimizer of Megatron's plain, 16-bit or distributed optimizers, as
                `get_megatron_optimizer` builds it; before its first step.

        Raises:
            ValueError: another kind of optimizer.
        """
        leaves = getattr(optimizer, "chained_optimizers", None)
        if leaves is None:
            raise ValueError(f"--skip-step: cannot judge {type(optimizer).__name__}; add --no-skip-step")
        optimizer.get_grad_norm = self._judging(optimizer.get_grad_norm)
        for leaf in leaves:
            if leaf.optimizer is not None:
                leaf.optimizer.step = _Selecting(leaf.optimizer, lambda: self.skipped > 0)
                self._steps.append(leaf.optimizer.step)
        optimizer.sharded_state_dict = self._saving(optimizer.sharded_state_dict)
        optimizer.load_state_dict = self._loading(optimizer.load_state_dict)

    def _judging(self, grad_norm: Callable[[], Any]) -> Callable[[], Any]:
        """`get_grad_norm`, which Megatron calls once a step, on every rank, before it clips."""

        def judging() -> Any:
            norm = grad_norm()
            self._judge(norm)
            return norm

        return judging

    @torch.no_grad()
    def _judge(self, norm: float | torch.Tensor) -> None:
        if not self._losses and parallel_state.is_pipeline_last_stage():
            raise RuntimeError("SkipStep saw no loss in this step: give `observe` to the forward step")
        device = norm.device if isinstance(norm, torch.Tensor) else _device()
        parts = torch.zeros(3, dtype=torch.float64, device=device)
        if self._losses:
            parts[:2] = torch.stack(self._losses).sum(0)
        self._losses = []
        # Every rank has the norm; a sum of shares makes its bits the same everywhere, like the loss's.
        parts[2] = torch.as_tensor(norm, dtype=torch.float64, device=device).reshape(()) / dist.get_world_size()
        dist.all_reduce(parts)
        self.window = self.window or Window(device)
        self.skipped = self.window.judge(torch.stack([parts[0] / parts[1], parts[2]])).double()
        self.in_a_row = (self.in_a_row.to(device) + 1) * self.skipped

    def _saving(self, sharded_state_dict: Callable[..., Any]) -> Callable[..., Any]:
        def saving(*args: Any, **kwargs: Any) -> Any:
            for step in self._steps:
                step.settle()
            state = sharded_state_dict(*args, **kwargs)
            state[STATE_KEY] = self.window.state_dict() if self.window is not None else {}
            return state

        return saving

    def _loading(self, load_state_dict: Callable[..., Any]) -> Callable[..., Any]:
        def loading(state: Any) -> Any:
            saved = state.pop(STATE_KEY, None)
            loaded = load_state_dict(state)
            if saved:
                self.window = self.window or Window(_device())
                self.window.load_state_dict(saved)
            elif dist.get_rank() == 0:
                print(f"SkipStep: no window in the checkpoint; no step is skipped in the next {FEWEST_STEPS - 1}")
            return loaded

        return loading


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


class _Selecting:
    """`step` of an inner optimizer, slice by slice; what it changed is kept, or put back where `skip()`.

    Transformer Engine's and apex's Adam count steps in the group, as a Python number that cannot wait for the device.
    The step after corrects it, when the decision has long been computed and copying it stops nothing.
    """

    def __init__(self, inner: torch.optim.Optimizer, skip: Callable[[], torch.Tensor]) -> None:
        self.inner, self.skip = inner, skip
        self.plain_step = inner.step
        self._counted: list[tuple[dict[str, Any], torch.Tensor]] = []

    @torch.no_grad()
    def __call__(self) -> None:
        self.settle()
        skip, groups = self.skip(), self.inner.param_groups
        try:
            for group in groups:
                self.inner.param_groups = [group]
                self._step_group(group, skip)
        finally:
            self.inner.param_groups = groups

    def settle(self) -> None:
        """Take back what the groups counted for a skipped step."""
        for group, skipped in self._counted:
            group["step"] -= int(skipped)
        self._counted = []

    def _step_group(self, group: dict[str, Any], skip: torch.Tensor) -> None:
        params, counted = group["params"], group.get("step")
        try:
            for part in _slices(params):
                if counted is None:
                    group.pop("step", None)
                else:
                    group["step"] = counted  # once a step, not once a slice
                group["params"] = part
                self._step_slice(part, skip)
        finally:
            group["params"] = params
        if isinstance(group.get("step"), int) and group["step"] != counted:
            self._counted.append((group, skip))

    def _step_slice(self, part: list[torch.Tensor], skip: torch.Tensor) -> None:
        for param in part:
            if param not in self.inner.state and hasattr(self.inner, "initialize_state"):  # as its own step would
                whole = not (getattr(self.inner, "store_param_remainders", False) and param.dtype == torch.bfloat16)
                self.inner.initialize_state(param, not whole)
        before = {id(tensor): tensor.clone() for tensor in self._tensors(part)}
        self.plain_step()
        for tensor in self._tensors(part):  # state that a first step made was 0 before it
            old = before.get(id(tensor))
            old = torch.zeros_like(tensor) if old is None else old
            torch.where(skip.to(tensor.device), old, tensor, out=tensor)

    def _tensors(self, params: list[torch.Tensor]) -> Iterator[torch.Tensor]:
        """The parameters, all their state, and its scales where the state is of low precision."""
        scales = getattr(self.inner, "_scales", {})
        for param in params:
            yield param
            for held in (self.inner.state.get(param, {}), scales.get(param, {})):
                yield from (value for value in held.values() if isinstance(value, torch.Tensor))


def _slices(params: list[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Parameters in order, as many at a time as have SLICE_ELEMENTS together, at least one."""
    part: list[torch.Tensor] = []
    for param in params:
        if part and sum(p.numel() for p in part) + param.numel() > SLICE_ELEMENTS:
            yield part
            part = []
        part.append(param)
    if part:
        yield part
