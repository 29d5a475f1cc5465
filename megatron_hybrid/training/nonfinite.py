"""Stops a run whose gradients stay NaN or infinite, and says which samples it read."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

#: The exit status of such a run: starting it again would do the same again.
EXIT_NONFINITE = 5


class NonFinite(RuntimeError):
    """Too many steps in a row without a finite gradient norm; the message names their samples."""


@dataclass(frozen=True)
class Step:
    """One step; its samples are `first_sample` up to, and not with, `end_sample` of the run's order of samples."""

    iteration: int
    first_sample: int
    end_sample: int
    grad_norm: float


class NonFiniteGuard:
    """Counts steps in a row whose gradient norm, the same on all ranks, is not finite.

    Args:
        limit: so many in a row stop the run; 0 for never.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.in_a_row: list[Step] = []
        self.iterations_done = 0

    def note(self, step: Step) -> None:
        """Raises NonFinite at the `limit`-th such step in a row."""
        if math.isfinite(step.grad_norm):
            self.in_a_row = []
            return
        self.in_a_row.append(step)
        if self.limit and len(self.in_a_row) >= self.limit:
            first, last = self.in_a_row[0], self.in_a_row[-1]
            each = "; ".join(f"iteration {s.iteration}: {s.first_sample} to {s.end_sample - 1}" for s in self.in_a_row)
            raise NonFinite(
                f"the gradient norm was not finite at {len(self.in_a_row)} steps in a row (iterations "
                f"{first.iteration} to {last.iteration}); samples by their place in the run's order: {each}"
            )

    def record(self) -> list[dict[str, Any]]:
        """The steps, for a file; a number that JSON cannot hold as text."""
        return [{**asdict(step), "grad_norm": str(step.grad_norm)} for step in self.in_a_row]

    def watching(self, train_step: Callable[..., Any]) -> Callable[..., Any]:
        """Megatron's `train_step`, with its gradient norm noted."""

        def watched(*args: Any, iteration: int | None = None, **kwargs: Any) -> Any:
            from megatron.core.num_microbatches_calculator import get_current_running_global_batch_size
            from megatron.training import get_args

            first = get_args().consumed_train_samples
            result = train_step(*args, iteration=iteration, **kwargs)
            norm, self.iterations_done = result[5], (iteration or 0) + 1
            if norm is not None:
                end = first + get_current_running_global_batch_size()
                self.note(Step((iteration or 0) + 1, first, end, float(norm)))
            return result

        return watched
