"""Whether states travel between context-parallel ranks by all-gather or by scan: plain numbers, for plans too."""

from __future__ import annotations

import math

#: What a message costs before its first byte, and bytes/s between nodes. Orders of magnitude of InfiniBand NDR; the
#: choice depends on their product (1 MB) alone.
LATENCY_S = 20e-6
BYTES_PER_S = 50e9


def scan_rounds(positions: int) -> int:
    """Messages one after another: ⌈log2 P⌉, and the last shift."""
    return math.ceil(math.log2(positions)) + 1


def scan_is_faster(world: int, slots: int, pair_bytes: float) -> bool:
    """By a latency-and-bandwidth model. All-gather: one round, (W−1)·slots pairs received. Scan: `slots` pairs a round.

    Args:
        slots: chain positions on a rank, of P = W·slots.
        pair_bytes: bytes of one position's pair (M and S of all its documents and heads).
    """
    gathered = LATENCY_S + (world - 1) * slots * pair_bytes / BYTES_PER_S
    return gathered > scan_rounds(world * slots) * (LATENCY_S + slots * pair_bytes / BYTES_PER_S)
