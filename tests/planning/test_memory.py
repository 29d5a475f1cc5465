"""Weights, gradients and optimizer of the planner against what Megatron holds, and at 7B on 512 ranks against its
parameters; activations in flight in a pipeline.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.optimizer import get_megatron_optimizer
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_hybrid.flags import compose
from megatron_hybrid.model import build_model
from megatron_hybrid.parallel.pipeline_layout import resolve
from megatron_hybrid.planning import activations, memory, timing
from megatron_hybrid.planning.hardware import GPUS
from megatron_hybrid.planning.job import Job
from megatron_hybrid.presets import PRESETS
from tests.parallel import tiny
from tests.parallel.ranks import run_ranks
from tests.planning.counting import Watch, storage_bytes
from tests.planning.jobs import job_of

#: Attention layers only in the pipeline: the delta rule's own part is counted in test_counted_activations.py.
LAYOUT = tiny.Layout(tp=2, sp=True, pp=2, dp=2, pattern="**|*", microbatches=4, bf16=True, distributed_optimizer=True)
LONG = 384


def _held(rank: int, layout: tiny.Layout) -> dict[str, Any]:
    tiny.SEQUENCE = LONG
    chunks = tiny.build(layout)
    trainer = tiny.Trainer(layout, chunks)
    parameters = [*chunks[0].parameters()]
    buffers = [buffer.grad_data for buffer in trainer.model[0].buffers + trainer.model[0].expert_parallel_buffers]
    most = 0

    with Watch([*parameters, *buffers]) as watch:

        def after_forward(*_: Any) -> None:
            nonlocal most
            most = max(most, watch.alive_bytes())

        trainer.model[0].register_forward_hook(after_forward)
        trainer.backward()
    trainer.optimizer.step()
    inner = trainer.optimizer.chained_optimizers
    held = [x for part in inner for state in part.optimizer.state.values() for x in state.values() if x.numel() > 1]
    held += [x for part in inner for group in part.optimizer.param_groups for x in group["params"]]
    own = {p.untyped_storage()._cdata for p in parameters}
    return {
        "pipeline": parallel_state.get_pipeline_model_parallel_rank(),
        "weights": sum(p.numel() * p.element_size() for p in parameters),
        "gradients": storage_bytes(buffers),
        "optimizer": storage_bytes([x for x in held if x.untyped_storage()._cdata not in own]),
        "activations": most,
    }


def test_what_a_rank_holds() -> None:
    job = job_of(LAYOUT, sequence=LONG, rows=tiny.MICROBATCH)
    counted = run_ranks(_held, LAYOUT.ranks, LAYOUT)
    for pipeline in range(2):
        found = next(rank for rank in counted if rank["pipeline"] == pipeline)
        planned = vars(memory.of_rank(job, pipeline))
        planned["activations"] += activations.logits_kept(job) if pipeline else 0
        print(found, planned)
        for name in ("weights", "gradients", "optimizer", "activations"):
            assert planned[name] == pytest.approx(found[name], rel=0.03), name


def _share_of_7b(_: int, job: Job, rank: int) -> dict[str, float]:
    """What Megatron allots to a rank of the job, on the meta device; Adam's moments are shaped as its fp32 copies."""
    dist.destroy_process_group()
    dist.init_process_group("fake", rank=rank, world_size=job.gpus, store=FakeStore())
    # This process alone: Megatron's buffers go where the model is, and meta tensors pass for CUDA's.
    torch.cuda.current_device = lambda: torch.device("meta")
    named = torch.Tensor.type
    torch.Tensor.type = lambda x, *a, **k: named(x, *a, **k) if a or k else named(x).replace("torch.meta", "torch.cuda")
    tiny.get_megatron_optimizer = partial(get_megatron_optimizer, use_gloo_process_groups=False)
    names = {name: name.replace("_", "-") for name in tiny.SIZES}
    sizes = {name: PRESETS["olmo-hybrid-7b"][flag] for name, flag in names.items()}
    layout = tiny.Layout(
        tp=job.tp, sp=job.tp > 1, pp=job.pp, cp=job.cp, dp=job.dp, pattern="|".join(job.segments), bf16=True,
        distributed_optimizer=True, overrides=sizes,
    )  # fmt: skip
    parallel_state.initialize_model_parallel(
        job.tp, job.pp, layout.vpp, context_parallel_size=job.cp, create_gloo_process_groups=False
    )
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    config = tiny.make_config(layout)
    chunks = []
    with torch.device("meta"):
        for stage in range(layout.vpp) if layout.vpp else [None]:
            first = parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage)
            last = parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage)
            chunks.append(
                build_model(
                    config, pattern=layout.pattern, padded_vocab_size=100352, max_sequence_length=8192,
                    pre_process=first, post_process=last, vp_stage=stage,
                )
            )  # fmt: skip
        trainer = tiny.Trainer(layout, chunks)
    parameters = [p for chunk in chunks for p in chunk.parameters()]
    in_fp32 = {id(p) for p in parameters if p.dtype == torch.float32}
    shards = [
        (x, id(model) in in_fp32)
        for part in trainer.optimizer.chained_optimizers
        for model, x in _main_parameters(part)
    ]
    return {
        "weights": sum(p.numel() * p.element_size() for p in parameters),
        "gradients": sum(b.grad_data.numel() * b.grad_data.element_size() for m in trainer.model for b in m.buffers),
        "optimizer": sum(x.numel() * (8 if already else 12) for x, already in shards),
    }


def _main_parameters(part: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(model parameter, this rank's fp32 shard of it)."""
    pairs = [(part.model_float16_groups, part.shard_fp32_from_float16_groups)]
    pairs += [(part.model_fp32_groups, part.shard_fp32_groups)]
    return [
        (model, main)
        for models, mains in pairs
        for model_group, main_group in zip(models, mains, strict=True)
        for model, main in zip(model_group, main_group, strict=True)
        if main is not None
    ]


@pytest.mark.parametrize(
    ("flags", "ranks"),
    [
        ("--tensor-model-parallel-size 4 --sequence-parallel --pipeline-model-parallel-size 4", (0, 511)),
        ("--pipeline-model-parallel-size 8 --context-parallel-size 2 --pipeline-layout auto:2", (100,)),
    ],
    ids=["tp4-pp4", "pp8-vpp2-cp2"],
)
def test_the_7b_on_512_ranks(flags: str, ranks: tuple[int, ...]) -> None:
    flat, _ = resolve(compose("olmo-hybrid-7b", flags.split()))
    job = Job.from_flags(flat, 512)
    for rank in ranks:
        [counted] = run_ranks(_share_of_7b, 1, job, rank)
        planned = vars(memory.of_rank(job, rank * job.pp // 512))
        print(rank, counted, planned)
        for name, size in counted.items():
            assert planned[name] == pytest.approx(size, rel=0.03), (rank, name)


LEAN = "--use-precision-aware-optimizer --main-grads-dtype bf16 --exp-avg-dtype bf16 --exp-avg-sq-dtype bf16"
EIGHT = f"--num-layers 8 --hybrid-layer-pattern GGG*GGG* --global-batch-size 4 {LEAN}"
MLP = "--recompute-granularity selective --recompute-modules mlp"


@pytest.mark.parametrize(
    ("flags", "gib"),
    [
        (f"--global-batch-size 1 --loss-chunk-tokens 2048 {MLP} {LEAN}", 90.7),
        (EIGHT, 36.2),
        (f"{EIGHT} --fp8-format hybrid --fp8-recipe tensorwise", 42.8),
        (f"{EIGHT} --fp8-format hybrid --fp8-recipe delayed", 38.3),
        (f"{EIGHT} --fp8-format hybrid --fp8-recipe tensorwise --fp8-param-gather", 40.8),
    ],
)
def test_the_peaks_of_one_h200(flags: str, gib: float) -> None:
    """docs/speed.md, 2026-11-25, 8,192 tokens: moments and gradients in bf16."""
    _, held = memory.fullest(Job.from_flags(compose("olmo-hybrid-7b", flags.split()), 1))
    assert held.total / memory.GIB == pytest.approx(gib, rel=0.02)


@pytest.mark.parametrize(
    ("flags", "ms"),
    [
        (EIGHT, 788.1),
        (f"{EIGHT} --fp8-format hybrid --fp8-recipe tensorwise", 606.8),
        (f"--global-batch-size 1 --loss-chunk-tokens 2048 {MLP} {LEAN}", 895.0),
    ],
)
def test_the_steps_of_one_h200(flags: str, ms: float) -> None:
    """The predicted time, beside docs/speed.md, 2026-11-25."""
    predicted = timing.predict(Job.from_flags(compose("olmo-hybrid-7b", flags.split()), 1), GPUS["H200"])
    assert predicted.step_s * 1e3 == pytest.approx(ms, rel=0.11)
