"""One cell in one process: the model of Megatron's arguments, with weights that do not depend on the layout.

Every rank makes the whole tensor of each of its parameters from its checkpoint key and takes its own part: no file and
no other rank is needed, and a mistake in the initialisation of split modules cannot hide.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_outplace, nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_hybrid.model import OlmoHybridModel
from megatron_hybrid.tools.gpu_bench import harness
from megatron_hybrid.tools.gpu_bench.rounding import IN_FP8
from megatron_hybrid.training.loss import forward_step
from tests.parallel.split import emulated
from tests.parallel.split.cells import RECIPES, Layout

Parts = dict[str, list[tuple[tuple[int, ...], tuple[int, ...], torch.Tensor]]]

#: Passes over the same batch, the last of which is measured: delayed scaling knows the range of its tensors then.
PASSES = {"delayed": 3}


@lru_cache(maxsize=1024)
def weight(key: str, shape: tuple[int, ...]) -> torch.Tensor:
    """The whole tensor of a checkpoint key, fp32, away from where training starts.

    bf16 holds all values exactly (but A_log and dt_bias, which stay in fp32), so that models of every precision start
    from the same ones.
    """
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(key.encode())))
    if key.endswith("A_log"):
        return noise.mul_(0.5).add_(1.0)
    if key.endswith("dt_bias"):
        return noise.mul_(0.5).sub_(3.0)
    if len(shape) == 1:  # norms
        noise.mul_(0.3).add_(1.0)
    elif "conv1d" in key:
        noise.mul_(0.3)
    elif "word_embeddings" not in key:
        noise.mul_(0.6 / shape[-1] ** 0.5)
    return noise.bfloat16().float()


def placed(entry: Any, tensor: torch.Tensor) -> Any:
    """The stored parts of a parameter, as `entry` of a sharded state dict describes them, with `tensor`'s values."""
    if isinstance(entry, ShardedTensorFactory):
        return replace(entry, data=tensor).build()
    return replace(entry, data=tensor, dtype=tensor.dtype)


@torch.no_grad()
def fill(whole: OlmoHybridModel) -> None:
    """Give every parameter its part of `weight`. Before an optimizer takes its masters from them."""

    def cut(part: Any) -> torch.Tensor:
        if not isinstance(part, ShardedTensor):
            return part.unwrap()  # padding and nothing else
        window = zip(part.global_offset, part.local_shape, strict=True)
        return weight(part.key, tuple(part.global_shape))[tuple(slice(o, o + n) for o, n in window)]

    state = sharded(whole)
    for name, param in whole.named_parameters():
        values: Any = dict_list_map_outplace(cut, placed(state[name], torch.zeros(param.shape)))
        if isinstance(state[name], ShardedTensorFactory):
            values = state[name].merge_fn(values)
        values = values.to(param.device, param.dtype)
        param.copy_(values)
        if (
            getattr(param, "_high_precision_init_val", None) is not None
        ):  # what Megatron makes an FP8 weight's master of
            param._high_precision_init_val = values.cpu()


def parts(whole: OlmoHybridModel, tensors: dict[str, torch.Tensor]) -> Parts:
    """{checkpoint key: this rank's parts} of tensors that belong to its parameters, in fp32 on the CPU."""
    state, found = sharded(whole), Parts()
    for name, tensor in tensors.items():
        for part in nested_values({"": placed(state[name], tensor.detach().float().cpu())}):
            if isinstance(part, ShardedTensor):
                where = (tuple(part.global_offset), tuple(part.global_shape))
                found.setdefault(part.key, []).append((*where, part.data.clone()))
    return found


def sharded(whole: OlmoHybridModel) -> dict[str, Any]:
    found: dict[str, Any] = whole.sharded_state_dict(metadata={"non_homogeneous_layers": True})
    return found


class Model(harness.Trained):
    """A model of parsed arguments in any layout, stepped as Megatron's trainer steps it."""

    def __init__(self, layout: Layout, recipe: str, flags: tuple[str, ...]) -> None:
        given = [*flags, *layout.arguments, *RECIPES[recipe]]
        args = harness.parse("olmo-hybrid-7b", given)
        if recipe == "fp32":
            args.bf16, args.params_dtype = False, torch.float32
        super().__init__(args, torch.empty(0), with_optimizer=False)
        self.device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
        self.whole = next(module for module in self.model[0].modules() if isinstance(module, OlmoHybridModel))
        if recipe == "rounded":
            emulated.round_operands(self.whole)
        fill(self.whole)
        self.optimizer = self._optimizer()
        self.config.grad_scale_func = self.optimizer.scale_loss

    def batch(self) -> Iterator[dict[str, torch.Tensor]]:
        """This data-parallel rank's microbatches of the one global batch. They count unequal numbers of tokens."""
        args, rank = self.args, parallel_state.get_data_parallel_rank()
        share = self.microbatches // parallel_state.get_data_parallel_world_size()
        for index in range(rank * share, (rank + 1) * share):
            generator = torch.Generator().manual_seed(1000 + index)
            shape = (args.micro_batch_size, args.seq_length + 1)
            tokens = torch.randint(0, args.vocab_size, shape, generator=generator)
            mask = torch.ones(args.micro_batch_size, args.seq_length)
            mask[:, args.seq_length - 1 - 7 * index :] = 0
            yield {
                "tokens": tokens[:, :-1].contiguous(),
                "labels": tokens[:, 1:].contiguous(),
                "loss_mask": mask,
                "position_ids": torch.arange(args.seq_length).repeat(args.micro_batch_size, 1),
            }

    def backward(self) -> torch.Tensor:
        """Forward and backward over the global batch; the mean loss over its tokens, on every rank."""
        for chunk in self.model:
            chunk.zero_grad_buffer()
        parts = get_forward_backward_func()(
            forward_step_func=partial(forward_step, check_finite=False, z_loss=self.args.z_loss),
            data_iterator=self.batch(),
            model=self.model[0],
            num_microbatches=self.microbatches // parallel_state.get_data_parallel_world_size(),
            seq_length=self.args.seq_length,
            micro_batch_size=self.args.micro_batch_size,
            forward_only=False,
        )
        total = torch.zeros(2, dtype=torch.float64, device=self.device)
        for part in parts:
            total += part["lm loss"].double()
        dist.all_reduce(total)  # tensor-parallel ranks count twice, losses and tokens alike
        return total[0] / total[1]

    def gradients(self) -> Parts:
        """Of `main_grad`, whole again on every rank that holds the parameter."""
        for chunk in self.model:
            for buffer in chunk.buffers:  # the distributed optimizer left each rank its shard of the sums
                group = buffer.data_parallel_group
                for bucket in buffer.buckets:
                    shards = bucket.grad_data.chunk(group.size())
                    dist.all_gather([*shards], shards[group.rank()].clone(), group=group)
        return parts(self.whole, {name: param.main_grad for name, param in self.whole.named_parameters()})

    def in_fp8(self) -> dict[str, int]:
        """Linears that --fp8-format is for, how many of them computed in FP8, and how many weights are in it."""
        from megatron.core.fp8_utils import is_float8tensor

        linears = [module for name, module in self.whole.named_modules() if name.rpartition(".")[2] in IN_FP8]
        return {
            "linears": len(linears),
            "in FP8": sum(getattr(module, "fp8", False) is True for module in linears),
            "FP8 weights": sum(is_float8tensor(param) for param in self.whole.parameters()),
        }


def measure(layout: Layout, recipe: str, flags: tuple[str, ...], steps: int) -> dict[str, Any]:
    """{loss, norm, grads: Parts, losses: of each step, fp8: counts}."""
    model = Model(layout, recipe, flags)
    try:
        for _ in range(PASSES.get(recipe, 1)):
            model.optimizer.zero_grad()
            loss = float(model.backward())
        found = {"loss": loss, "grads": model.gradients(), "fp8": model.in_fp8(), "losses": []}
        found["norm"] = float(model.optimizer.step()[1])
        for _ in range(steps):
            model.optimizer.zero_grad()
            found["losses"].append(float(model.backward()))
            model.optimizer.step()
        return found
    finally:
        model.close()
