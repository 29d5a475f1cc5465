"""The planner's view of the tests' tiny layouts."""

from __future__ import annotations

from typing import Any

from megatron_hybrid import flops
from megatron_hybrid.planning.job import Job
from tests.parallel import tiny


def job_of(layout: tiny.Layout, sequence: int, rows: int = 1, **options: Any) -> Job:
    """The planner's view of a tiny layout."""
    s = {**tiny.SIZES, **layout.overrides}
    sizes = flops.Sizes(
        hidden=s["hidden_size"],
        ffn=s["ffn_hidden_size"],
        heads=s["num_attention_heads"],
        kv_heads=s["num_attention_heads"],
        head_dim=s["kv_channels"],
        gdn_key_heads=s["linear_num_key_heads"],
        gdn_value_heads=s["linear_num_value_heads"],
        key_dim=s["linear_key_head_dim"],
        value_dim=s["linear_value_head_dim"],
        conv_width=s["linear_conv_kernel_dim"],
        vocabulary_rows=tiny.PADDED_VOCAB,
    )
    return Job(
        sizes=sizes,
        segments=tuple(layout.pattern.split("|")),
        sequence_tokens=sequence,
        micro_batch=rows,
        global_batch=layout.microbatches * rows,
        tp=layout.tp,
        pp=layout.pp,
        cp=layout.cp,
        dp=layout.dp,
        sequence_parallel=layout.sp,
        half=layout.bf16,
        distributed_optimizer=layout.distributed_optimizer,
        z_loss=False,
        local=True,
        **options,
    )
