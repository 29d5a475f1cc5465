"""The filter of instances that repeat themselves, as OLMo-core's `InstanceFilterConfig` of the released run."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

MAX_PERIOD = 13
MAX_COUNT = 32


def repeats_itself(ids: NDArray[Any], max_period: int = MAX_PERIOD, max_count: int = MAX_COUNT) -> bool:
    """Whether, for a period p from 1 to `max_period`, some p-gram stands `max_count` or more times in a row.

    Equal to OLMo-core's `find_periodic_sequences` with `times >= max_count`: p-grams repeat n times where each of
    (n − 1)·p ids in a row equals the one p before it.

    Args:
        ids: [T] integers.
    """
    for period in range(1, max_period + 1):
        needed = (max_count - 1) * period
        if needed > ids.size - period:
            return False
        same = ids[period:] == ids[:-period]
        if np.count_nonzero(same) < needed:
            continue
        breaks = np.concatenate([[-1], np.flatnonzero(~same), [same.size]])
        if np.diff(breaks).max() > needed:
            return True
    return False
