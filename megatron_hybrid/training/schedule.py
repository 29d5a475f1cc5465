"""WSD-S: warm up once, then period after period stay at the peak and decay, each ending in a usable checkpoint.

Megatron's scheduler has one decay, at the end of the run. OLMo-core's ladder uses this one (its `WSDS`;
arXiv 2410.05192). Cosine and linear schedules are Megatron's.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import Any

from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

#: Share of its period that a decay takes.
DECAY_FRACTION = 0.1


def wsds_share(position: float, ends: Sequence[float], warmup: float, decay_fraction: float = DECAY_FRACTION) -> float:
    """The learning rate over its peak, above the minimum: 1 in the stable part, 0 at the end of a period.

    Args:
        position, ends, warmup: all in one unit (steps, samples or tokens); `ends` ascends.
    """
    if position < warmup:
        return position / warmup
    period = min(bisect.bisect_left(ends, position), len(ends) - 1)
    start = ends[period - 1] if period else 0
    decay = decay_fraction * (ends[period] - start)
    return min(1.0, max(0.0, (ends[period] - position) / decay))


class WsdsScheduler(OptimizerParamScheduler):
    """Megatron's scheduler with this schedule after construction; weight decay, saving and loading are Megatron's."""

    def __init__(self, *args: Any, ends: Sequence[int], decay_fraction: float = DECAY_FRACTION, **kwargs: Any) -> None:
        """ends: of the periods, in samples, ascending; the last is the end of the run."""
        self.ends, self.decay_fraction = tuple(ends), decay_fraction
        super().__init__(*args, **kwargs)

    def get_lr(self, param_group: dict[str, Any]) -> float:
        peak, least = (param_group.get(name, getattr(self, name)) for name in ("max_lr", "min_lr"))
        share = wsds_share(self.num_steps, self.ends, self.lr_warmup_steps, self.decay_fraction)
        if self.num_steps < self.lr_warmup_steps:
            return self.init_lr + (peak - self.init_lr) * share
        return least + (peak - least) * share

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "wsds_ends": self.ends, "wsds_decay_fraction": self.decay_fraction}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        saved = (state_dict.get("wsds_ends"), state_dict.get("wsds_decay_fraction"))
        if not self.override_opt_param_scheduler and saved[0] is None:
            raise ValueError(
                "--wsds-periods: the checkpoint was trained under another schedule; to change it add "
                "--override-opt_param-scheduler"
            )
        self.ends, self.decay_fraction = self._check_and_set((self.ends, self.decay_fraction), saved, "WSD-S periods")
        self.step(0)  # the parent has set the rate of the ends it was built with
