"""Megatron's MLP with a width that tensor parallelism need not divide."""

from __future__ import annotations

from typing import Any

from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.mlp import MLP

from megatron_hybrid.parallel.head_padding import Part, describe_split, true_sizes


class PaddedMLP(MLP):
    """Megatron's MLP, which says how its weights are split."""

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        hidden = Part(true_sizes(config).ffn, config.ffn_hidden_size)
        gate_and_up = [hidden] * (2 if config.gated_linear_unit else 1)
        for param in (self.linear_fc1.weight, self.linear_fc1.bias):
            describe_split(param, gate_and_up, self.tp_group)
        describe_split(self.linear_fc2.weight, [hidden], self.tp_group, dim=1)
