"""How each kernel is launched: a table, not a search at start-up.

An entry belongs to one GPU architecture, triton version and pair of head sizes, because each of these can change
whether a configuration is right as well as how fast it is. `tools/tune_kernels.py` finds entries and says which
passed: agreement with the reference, and the same bits twice.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton


class Launch(NamedTuple):
    """warps, stages and registers as triton's num_warps, num_stages and maxnreg; block: columns (of V, or channels)."""

    warps: int
    stages: int
    block: int = 0
    registers: int | None = None

    @property
    def options(self) -> dict[str, int | None]:
        return {"num_warps": self.warps, "num_stages": self.stages, "maxnreg": self.registers}


#: What every entry starts from.
DEFAULTS = {
    "conv": Launch(4, 1, 64),
    "diagonal": Launch(1, 1),
    "prepare": Launch(4, 1),
    "scan": Launch(4, 3, 64),
    "output": Launch(4, 1, 64),
    "norm_backward": Launch(4, 1, 64),
    "adjoint_scan": Launch(4, 3, 64),
    "gradients": Launch(8, 2, 64),
    "conv_backward": Launch(1, 1, 128),
}


def launch_for(kernel: str, K: int, V: int) -> Launch:
    """The launch of one kernel for these head sizes on the current device."""
    return DEFAULTS[kernel]
