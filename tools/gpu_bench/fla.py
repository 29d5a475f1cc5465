"""flash-linear-attention 0.6.0 as a peer to be timed.

It refuses its gated backward on Hopper with triton 3.4 to 3.7.0, where some of its gradients are wrong (its issue
#640), and its autotuner compiles hundreds of candidates, one after the other.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

#: What has to be said beside times.
UNCHECKED = "FLA's version check off: times valid, gradients of its gates not"


def allow_fla_backward() -> None:
    """Switch its check off in this process: its times are valid then, the gradients of its gates are not."""
    import fla.ops.common.chunk_o as chunk_o

    chunk_o.TRITON_ABOVE_3_7_1 = True


@cache
def compile_side_by_side() -> None:
    """triton's autotuner compiles all its candidates at once before it times them, instead of one after the other."""
    from triton import AsyncCompileMode
    from triton.runtime.autotuner import Autotuner

    prune, executor = Autotuner.prune_configs, ThreadPoolExecutor(os.cpu_count())

    def compiled(self: Any, kwargs: dict[str, Any]) -> list[Any]:
        configs = prune(self, kwargs)
        with AsyncCompileMode(executor, ignore_errors=True):  # what does not compile, the autotuner skips itself
            for config in configs:
                self.fn.run(**self.nargs, **(kwargs | config.all_kwargs() | {"warmup": True}))
        return configs

    Autotuner.prune_configs = compiled
