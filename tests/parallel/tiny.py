"""A tiny OLMo-Hybrid on real Megatron-Core: build it in any layout, one training step, gradients in global form.

It keeps what is awkward in the 7B: 6 heads, V = 2·K with K no power of two, an FFN width of its own, an odd vocabulary,
a sequence that is no multiple of the chunk. One period of the pattern and two microbatches, since every test pays for
them; where stages interleave or are many, two periods and four.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import Float16Module

from megatron_hybrid.config import HybridConfig
from megatron_hybrid.layer_specs.olmo_hybrid import build_stack_spec
from megatron_hybrid.model import build_model
from megatron_hybrid.modules.recompute import allowing_norm_out
from megatron_hybrid.parallel.head_padding import padded_config
from megatron_hybrid.parallel.packed import pack
from megatron_hybrid.training.loss import forward_step, sum_loss

PATTERN, TWO_PERIODS = "GGG*", "GGG*GGG*"
VOCAB, PADDED_VOCAB, SEQUENCE, MICROBATCH = 187, 192, 72, 2
SIZES: dict[str, Any] = {
    "hidden_size": 96,
    "num_attention_heads": 6,
    "kv_channels": 16,
    "ffn_hidden_size": 132,
    "linear_num_key_heads": 6,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 24,
    "linear_value_head_dim": 48,
    "linear_conv_kernel_dim": 4,
}


@dataclass(frozen=True)
class Layout:
    """How a model is split. pattern: with `|` between pipeline stages; more stages than `pp` interleave."""

    tp: int = 1
    sp: bool = False
    pp: int = 1
    dp: int = 1
    cp: int = 1
    packed: bool = False
    pattern: str = PATTERN
    microbatches: int = 2  # of all data-parallel ranks together
    distributed_optimizer: bool = False
    bf16: bool = False
    overrides: dict[str, Any] = field(default_factory=dict)

    @property
    def ranks(self) -> int:
        return self.tp * self.pp * self.dp * self.cp

    @property
    def vpp(self) -> int | None:
        stages = self.pattern.count("|") + 1
        return stages // self.pp if stages > self.pp else None

    def __str__(self) -> str:
        parts = [f"tp{self.tp}", "sp" * self.sp, f"pp{self.pp}", f"vpp{self.vpp}" * bool(self.vpp), f"dp{self.dp}"]
        parts += [f"cp{self.cp}" * (self.cp > 1), "packed" * self.packed]
        return "-".join([p for p in parts if p] + ["distopt"] * self.distributed_optimizer + ["bf16"] * self.bf16)


def make_config(layout: Layout, **overrides: Any) -> TransformerConfig:
    dtype = torch.bfloat16 if layout.bf16 else torch.float32
    settings: dict[str, Any] = dict(
        SIZES,
        num_layers=len(layout.pattern.replace("|", "")),
        is_hybrid_model=True,
        use_cpu_initialization=True,
        normalization="RMSNorm",
        layernorm_epsilon=1e-6,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
        gradient_accumulation_fusion=False,
        tensor_model_parallel_size=layout.tp,
        sequence_parallel=layout.sp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp,
        context_parallel_size=layout.cp,
        bf16=layout.bf16,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        calculate_per_token_loss=True,
    )
    if layout.vpp:
        settings.update(overlap_p2p_comm=True, batch_p2p_comm=False)
    return padded_config(
        allowing_norm_out(lambda values: TransformerConfig(**values)), {**settings, **layout.overrides, **overrides}
    )


def build(layout: Layout, options: HybridConfig | None = None, rope: bool = True) -> list[torch.nn.Module]:
    """The model chunks of this rank, in a fresh set of process groups."""
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp,
        context_parallel_size=layout.cp,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(1234)
    config = make_config(layout)
    return [
        build_model(
            config,
            pattern=layout.pattern,
            padded_vocab_size=PADDED_VOCAB,
            max_sequence_length=SEQUENCE,
            position_embedding_type="rope" if rope else "none",
            stack_spec=build_stack_spec(options, "local"),
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage),
            vp_stage=stage,
        )
        for stage in (range(layout.vpp) if layout.vpp else [None])
    ]


def unsettle(chunks: list[torch.nn.Module], seed: int = 7) -> None:
    """Move every weight: norms away from 1, gates and convolutions away from their small start, biases about."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for chunk in chunks:
            for name, param in chunk.named_parameters():
                noise = torch.randn(param.shape, generator=generator)
                if "norm" in name:
                    param.copy_(1.0 + 0.3 * noise)
                elif "conv1d" in name:
                    param.copy_(0.3 * noise)
                elif "word_embeddings" in name:
                    param.copy_(noise)
                elif name.endswith(("A_log", "dt_bias")):
                    param.add_(0.5 * noise)
                else:
                    param.copy_(0.06 * noise)


def _sharded(chunks: list[torch.nn.Module]) -> dict[str, Any]:
    return {
        f"model{i}": chunk.sharded_state_dict(metadata={"non_homogeneous_layers": True})
        for i, chunk in enumerate(chunks)
    }


def save_weights(chunks: list[torch.nn.Module], folder: Path) -> None:
    if dist.get_rank() == 0:
        folder.mkdir(parents=True)
    dist.barrier()
    dist_checkpointing.save(_sharded(chunks), str(folder))


def load_weights(chunks: list[torch.nn.Module], folder: Path) -> None:
    state = dist_checkpointing.load(_sharded(chunks), str(folder))
    for i, chunk in enumerate(chunks):
        chunk.load_state_dict(state[f"model{i}"], strict=True)


def global_tensors(chunks: list[torch.nn.Module], what: str = "weight") -> dict[str, list[tuple]]:
    """{checkpoint key: [(offset, global shape, local tensor), ...]} of weights, or of gradients in their places."""
    held = []
    if what == "grad":
        for chunk in chunks:
            for param in chunk.parameters():
                grad = param.main_grad if getattr(param, "main_grad", None) is not None else param.grad
                held.append((param, param.data))
                param.data = grad.detach().clone().to(param.dtype) if param.dtype != torch.float32 else grad.clone()
    found: dict[str, list[tuple]] = {}
    for state in _sharded(chunks).values():
        apply_factories(state)
        for tensor in nested_values(state):
            if isinstance(tensor, ShardedTensor):
                part = (tuple(tensor.global_offset), tuple(tensor.global_shape), tensor.data.detach().clone())
                found.setdefault(tensor.key, []).append(part)
    for param, data in held:
        param.data = data
    return found


def assemble(ranks: list[dict[str, list[tuple]]]) -> dict[str, torch.Tensor]:
    """Whole tensors from every rank's parts; a key that no rank fills completely is an error."""
    whole: dict[str, torch.Tensor] = {}
    for found in ranks:
        for key, parts in found.items():
            for offset, shape, data in parts:
                target = whole.setdefault(key, torch.full(shape, float("nan")))
                target[tuple(slice(o, o + n) for o, n in zip(offset, data.shape, strict=True))] = data.float()
    for key, tensor in whole.items():
        assert not tensor.isnan().any(), f"{key}: not covered by any rank, or NaN"
    return whole


def sample(index: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1000 + index)
    tokens = torch.randint(0, VOCAB, (MICROBATCH, SEQUENCE + 1), generator=generator)
    mask = torch.ones(MICROBATCH, SEQUENCE)
    mask[:, -1 - index :] = 0  # microbatches of unequal token counts
    return {
        "tokens": tokens[:, :-1].contiguous(),
        "labels": tokens[:, 1:].contiguous(),
        "loss_mask": mask,
        "position_ids": torch.arange(SEQUENCE).repeat(MICROBATCH, 1),
    }


#: Documents of a packed row of the same tokens, for CP 2, 3 and 4: parts of a few tokens, halos over several parts.
PACKED_LENGTHS = (24, 48, 0, 24, 48)


def packed_forward_step(batches: Iterator[Any] | None, model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
    """The rows of a microbatch as one packed row of documents, this context-parallel rank's share of it."""
    group = parallel_state.get_context_parallel_group()
    documents = pack(PACKED_LENGTHS, group.size(), group.rank())
    if batches is None:
        mask, inputs, labels = None, (None, None), None
    else:
        rows = {key: value.reshape(1, -1)[:, documents.local_index()] for key, value in next(batches).items()}
        mask, inputs, labels = rows["loss_mask"], (rows["tokens"], rows["position_ids"]), rows["labels"]
    output = model(*inputs, None, labels=labels, packed_seq_params=documents)
    return output, partial(sum_loss, mask, check_finite=False)


def microbatches(total: int) -> Iterator[dict[str, torch.Tensor]]:
    """This data-parallel rank's share of the global batch."""
    count = total // parallel_state.get_data_parallel_world_size()
    first = parallel_state.get_data_parallel_rank() * count
    yield from (sample(first + i) for i in range(count))


class Trainer:
    """The chunks under Megatron's DDP and optimizer, as the trainer would set them up."""

    def __init__(self, layout: Layout, chunks: list[torch.nn.Module], lr: float = 1e-2) -> None:
        self.layout, self.chunks = layout, chunks
        self.config = chunks[0].config
        ddp = DistributedDataParallelConfig(
            use_distributed_optimizer=layout.distributed_optimizer, grad_reduce_in_fp32=True
        )
        wrapped = [Float16Module(self.config, chunk) for chunk in chunks] if layout.bf16 else chunks
        self.model = [
            DistributedDataParallel(self.config, ddp, m, disable_bucketing=i > 0) for i, m in enumerate(wrapped)
        ]
        self.config.finalize_model_grads_func = finalize_model_grads
        optimizer = OptimizerConfig(
            optimizer="adam",
            lr=lr,
            weight_decay=0.01,
            clip_grad=1.0,
            use_distributed_optimizer=layout.distributed_optimizer,
            bf16=layout.bf16,
            params_dtype=self.config.params_dtype,
        )
        self.optimizer = get_megatron_optimizer(optimizer, self.model)

    def backward(self) -> torch.Tensor:
        """Forward and backward over the global batch. Returns [summed loss, tokens] on last stages, zeros elsewhere."""
        for chunk in self.model:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        iterators = [microbatches(self.layout.microbatches) for _ in self.model]
        step = packed_forward_step if self.layout.packed else partial(forward_step, check_finite=False)
        parts = get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=iterators if self.layout.vpp else iterators[0],
            model=self.model if self.layout.vpp else self.model[0],
            num_microbatches=self.layout.microbatches // self.layout.dp,
            seq_length=SEQUENCE * (MICROBATCH if self.layout.packed else 1),
            micro_batch_size=1 if self.layout.packed else MICROBATCH,
            forward_only=False,
        )
        total = sum((part["lm loss"].double() for part in parts), torch.zeros(2, dtype=torch.float64))
        dist.all_reduce(total, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
        return total

    def gather_gradients(self) -> None:
        """The distributed optimizer leaves each rank its shard of the reduced gradients: put the whole back."""
        if not self.layout.distributed_optimizer:
            return
        for chunk in self.model:
            for buffer in chunk.buffers:
                group = buffer.data_parallel_group
                for bucket in buffer.buckets:
                    shards = bucket.grad_data.chunk(group.size())
                    dist.all_gather([*shards], shards[group.rank()].clone(), group=group)

    def step(self) -> tuple[float, float]:
        """One optimizer step: (mean loss over tokens, gradient norm before clipping); loss −1 off the last stage."""
        total = self.backward()
        _, norm, _ = self.optimizer.step()
        return float(total[0] / total[1]) if total[1] else -1.0, float(norm)
