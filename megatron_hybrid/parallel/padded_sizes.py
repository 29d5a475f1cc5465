"""The sizes that tensor parallelism divides, rounded up to what it can divide. Why, and what keeps padding zero:
`head_padding`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

#: Widths (FFN, vocabulary) keep this much of their alignment on each rank: FP8 GEMMs need 16, bf16 ones run best so.
ALIGNMENT = 16


def rounded_up(size: int, tp: int, alignment: int = 1) -> int:
    """`size` if `tp` divides it, else the next multiple of `tp` that leaves each rank aligned as `size` is.

    Args:
        alignment: the most that is kept; the rank's share is a multiple of gcd(size, alignment).
    """
    if size % tp == 0:
        return size
    multiple = tp * math.gcd(size, alignment)
    return -(-size // multiple) * multiple


@dataclass(frozen=True)
class Sizes:
    """The sizes that tensor parallelism divides. Query heads per group and per key head do not change by padding."""

    heads: int
    groups: int
    ffn: int
    gdn_key_heads: int
    gdn_value_heads: int

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Sizes:
        """From Megatron's names, of arguments (with defaults filled in) or of a TransformerConfig."""
        heads = settings["num_attention_heads"]
        grouped = settings.get("group_query_attention", True) and settings.get("num_query_groups")
        return cls(
            heads=heads,
            groups=settings["num_query_groups"] if grouped else heads,
            ffn=settings.get("ffn_hidden_size") or 4 * settings["hidden_size"],
            gdn_key_heads=settings.get("linear_num_key_heads") or 0,
            gdn_value_heads=settings.get("linear_num_value_heads") or 0,
        )

    def padded(self, tp: int) -> Sizes:
        """These sizes, rounded up so that `tp` divides them."""
        groups = rounded_up(self.groups, tp)
        keys = rounded_up(self.gdn_key_heads, tp)
        return Sizes(
            heads=groups * (self.heads // self.groups),
            groups=groups,
            ffn=rounded_up(self.ffn, tp, ALIGNMENT),
            gdn_key_heads=keys,
            gdn_value_heads=keys * (self.gdn_value_heads // self.gdn_key_heads) if keys else 0,
        )

    def settings(self) -> dict[str, int]:
        """In Megatron's names."""
        named = {
            "num_attention_heads": self.heads,
            "num_query_groups": self.groups,
            "ffn_hidden_size": self.ffn,
            "linear_num_key_heads": self.gdn_key_heads,
            "linear_num_value_heads": self.gdn_value_heads,
        }
        return {name: size for name, size in named.items() if size}
