"""Bytes that context-parallel ranks really receive in a Gated DeltaNet layer, counted where they are sent."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

from megatron_hybrid.modules.gated_delta_net import GatedDeltaNet, GatedDeltaNetSubmodules
from tests.parallel import tiny
from tests.parallel.ranks import run_ranks
from tests.parallel.tiny import Layout

RANKS, TOKENS, LONG = 8, 512, 65_536
HEADS_7B, K, V = 30, 96, 192


class ReceivedBytes:
    """Counts what this rank receives from others while it is the context, by wrapping torch.distributed."""

    def __enter__(self) -> ReceivedBytes:
        self.total = 0
        self.held = {name: getattr(dist, name) for name in ("all_gather_into_tensor", "all_to_all_single", "P2POp")}
        size = dist.get_world_size()

        def counted(call: Any, share: float) -> Any:
            def wrapped(out: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
                self.total += int(out.numel() * out.element_size() * share)
                return call(out, *args, **kwargs)

            return wrapped

        others = (size - 1) / size  # a rank's own part does not travel
        dist.all_gather_into_tensor = counted(self.held["all_gather_into_tensor"], others)
        dist.all_to_all_single = counted(self.held["all_to_all_single"], others)

        def operation(call: Any, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if call is dist.irecv:
                self.total += tensor.numel() * tensor.element_size()
            return self.held["P2POp"](call, tensor, *args, **kwargs)

        dist.P2POp = operation
        return self

    def __exit__(self, *error: object) -> None:
        for name, call in self.held.items():
            setattr(dist, name, call)


def _received(rank: int, comm: Any, heads: int, tokens: int) -> int:
    """Bytes this rank receives in the forward pass of one bf16 layer with the 7B's head sizes."""
    parallel_state.initialize_model_parallel(context_parallel_size=RANKS)
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    config = tiny.make_config(
        Layout(cp=RANKS, bf16=True),
        linear_num_key_heads=heads,
        linear_num_value_heads=heads,
        linear_key_head_dim=K,
        linear_value_head_dim=V,
    )
    config.output_layer_init_method = config.init_method
    layer = GatedDeltaNet(
        config,
        GatedDeltaNetSubmodules(ColumnParallelLinear, ColumnParallelLinear, RowParallelLinear),
        layer_number=1,
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
        cp_comm=comm,
    )
    x = torch.randn(tokens // RANKS, 1, config.hidden_size, dtype=torch.bfloat16)
    with torch.no_grad(), ReceivedBytes() as received:
        layer(x)
    return received.total


def test_state_passing_receives_a_sixth_of_the_all_to_all() -> None:
    """At 65,536 tokens, from counts at fewer: states do not grow with the sequence, the all-to-all does linearly."""
    states = {comm: max(run_ranks(_received, RANKS, comm, HEADS_7B, TOKENS)) for comm in ("all_gather", "scan")}
    again = max(run_ranks(_received, RANKS, "scan", HEADS_7B, 2 * TOKENS))
    assert again == states["scan"]
    # 8 ranks cannot share 30 heads: counted with 32, of which 30/32 are the model's.
    few, more = (max(run_ranks(_received, RANKS, "a2a", 32, n)) for n in (TOKENS, 2 * TOKENS))
    assert more == 2 * few
    all_to_all = few * LONG / TOKENS * HEADS_7B / 32
    print(f"received per rank and layer at {LONG} tokens: {states}, all-to-all {all_to_all:.0f} bytes")
    assert states["all_gather"] <= all_to_all / 6
    assert states["scan"] <= all_to_all / 6

    pair = HEADS_7B * K * (K + V) * 4
    halo = (RANKS - 1) * 2 * 3 * HEADS_7B * (2 * K + V) * 2
    assert states["all_gather"] == (RANKS - 1) * 2 * pair + halo
    assert states["scan"] <= 2 * 5 * pair + halo  # 4 rounds and the last shift, two positions on a rank
