"""Any tensor-parallel degree: heads, FFN width and vocabulary are rounded up with zeros that stay exactly zero.

Thirty heads on four ranks become thirty-two. The padding stands at the end, so the last ranks hold fewer real heads,
or none. It costs time and memory, nothing else: 30 heads padded to 32 are 6.7 % more mixer (projections, recurrence,
attention), on every rank, since all wait for the fullest. The FFN and the vocabulary keep the alignment (up to 16)
that their width had and that GEMMs need; at 7B that is 0.3 % at TP 3, 5 and 6, and nothing at 2, 4 and 8.

**Why padding stays zero.** A padded head has zero rows in q, k, v (and z, a, b, convolution, q/k-norm weight) and zero
columns in the output projection W. Its value is zero, hence its output y: GDN's gated norm of 0 is 0, attention
averages zeros. The gradient of W's padded columns is g·yᵀ with y = 0: exactly 0. The gradient that flows back
into the head is Wᵀg with W = 0: exactly 0, and so is that of everything before it. The FFN is the same: silu(0)·0 = 0
through zero columns. Adam turns a zero gradient into a zero step, weight decay multiplies zero. The full-width q/k
norm sums squares of zeros, and divides by the true width. Padded vocabulary rows are different: their logits would
be 0, not −∞, and take part in the softmax; they are masked, which also makes their gradient exactly 0.

**Checkpoints hold no trace of it.** Every parameter that is split says how (`describe_split`): its dimension is a row
of parts, each with a true and a padded size. `without_padding` makes of that the place of each rank's real rows in
the true tensor, for weights and, as Megatron applies the same factories to them, for optimizer states.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import (
    LocalNonpersistentObject,
    ReplicaId,
    ShardedStateDict,
    ShardedTensor,
    ShardedTensorFactory,
)
from megatron.core.transformer import TransformerConfig

from megatron_hybrid.parallel.padded_sizes import ALIGNMENT, Sizes, rounded_up

_SPLIT = "tensor_parallel_split"
_TRUE_SIZES = "true_sizes"


def padded_config(
    make: Callable[[dict[str, Any]], TransformerConfig], settings: Mapping[str, Any]
) -> TransformerConfig:
    """`make(settings)` with sizes rounded up to what the tensor-parallel size divides; the true ones stay beside them.

    Args:
        make: builds Megatron's config of a mapping with Megatron's names.
    """
    true = Sizes.of(settings)
    # Megatron derives the head dimension from the number of heads: the true one.
    head_dim = settings.get("kv_channels") or settings["hidden_size"] // true.heads
    padded = true.padded(settings["tensor_model_parallel_size"])
    config = make({**settings, "kv_channels": head_dim, **padded.settings()})
    setattr(config, _TRUE_SIZES, true)
    return config


def true_sizes(config: TransformerConfig) -> Sizes:
    """Without padding: the model's own sizes. A config that `padded_config` did not make has none."""
    return getattr(config, _TRUE_SIZES, None) or Sizes.of(vars(config))


def summary(sizes: Sizes, tp: int, pattern: str, vocabulary: int) -> str | None:
    """One line: what `tp` pads, and how much larger that makes it; None where nothing is padded."""
    padded = sizes.padded(tp)
    changes = {
        "attention heads": (sizes.heads, padded.heads) if "*" in pattern else None,
        "Gated DeltaNet heads": (sizes.gdn_value_heads, padded.gdn_value_heads) if "G" in pattern else None,
        "FFN width": (sizes.ffn, padded.ffn),
        "vocabulary": (vocabulary, rounded_up(vocabulary, tp, ALIGNMENT)),
    }
    if changes["attention heads"] == changes["Gated DeltaNet heads"]:
        changes = {"heads": changes["attention heads"], **{k: v for k, v in changes.items() if "heads" not in k}}
    said = [
        f"{name} {pair[0]} to {pair[1]} (+{100 * (pair[1] / pair[0] - 1):.1f} %)"
        for name, pair in changes.items()
        if pair and pair[0] != pair[1]
    ]
    return f"--tensor-model-parallel-size {tp}: padded with zeros: {', '.join(said)}" if said else None


@dataclass(frozen=True)
class Part:
    """A section of a split dimension, sizes over all ranks. Parts of one name lie in one stored tensor, in order."""

    true: int
    padded: int
    name: str = ""


@dataclass(frozen=True)
class Split:
    """How a parameter's dimension is split: each part over all ranks, a rank holding its shares one after another."""

    dim: int
    parts: tuple[Part, ...]
    rank: int
    ranks: int

    @property
    def padded(self) -> bool:
        return any(part.true != part.padded for part in self.parts)

    def shares(self) -> Iterator[tuple[Part, int, int, int]]:
        """(part, start of this rank's share in its tensor, size of the share, how much of that is real)."""
        start = 0
        for part in self.parts:
            size = part.padded // self.ranks
            yield part, start, size, min(max(part.true - self.rank * size, 0), size)
            start += size

    def zero_padding_(self, tensor: torch.Tensor) -> None:
        for _, start, size, real in self.shares():
            tensor.narrow(self.dim, start + real, size - real).zero_()


def describe_split(
    param: torch.Tensor | None, parts: Sequence[Part], tp_group: torch.distributed.ProcessGroup, dim: int = 0
) -> None:
    """Note on a parameter how it is split, and zero its padding.

    Args:
        param: None or empty is a bias that is not there.
        parts: what dimension `dim` consists of, sizes over all ranks.

    Raises:
        ValueError: the parts do not add up to the parameter's size.
    """
    if param is None or not param.numel():
        return
    split = Split(dim, tuple(parts), tp_group.rank(), tp_group.size())
    size = sum(part.padded for part in parts) // split.ranks
    if param.shape[dim] != size:
        raise ValueError(f"dimension {dim} of {list(param.shape)} is split as if it were {size}: {parts}")
    setattr(param, _SPLIT, split)
    if not param.is_meta:
        with torch.no_grad():
            split.zero_padding_(param)


def split_of(param: torch.Tensor | None) -> Split | None:
    """What `describe_split` noted."""
    return getattr(param, _SPLIT, None)


def real_numel(param: torch.Tensor) -> int:
    """Elements of this rank's parameter that are not padding."""
    split = split_of(param)
    if split is None:
        return param.numel()
    return param.numel() // param.shape[split.dim] * sum(real for *_, real in split.shares())


class _RealRows(ShardedTensorFactory):
    """A factory that `without_padding` made, and a second pass leaves alone."""


def without_padding(state: ShardedStateDict) -> ShardedStateDict:
    """The sharded state dict of a module and its children with each entry in the place it has in the true tensor.

    Entries whose parameter has no padding and no named parts are left as Megatron made them.
    """
    return {key: _true_entry(entry) for key, entry in state.items()}


def _true_entry(entry: Any) -> Any:
    split = split_of(getattr(entry, "data", None))
    if split is None or isinstance(entry, _RealRows) or not (split.padded or any(part.name for part in split.parts)):
        return entry
    one = entry if isinstance(entry, ShardedTensor) else entry.build()[0]  # Megatron's own factory for gate and up
    return _real_rows(entry, replace(one, data=None), split)


def _real_rows(entry: Any, template: ShardedTensor, split: Split) -> _RealRows:
    """Stores the real rows, and puts zeros back around loaded ones. template: for what the split does not say."""
    before = template.prepend_axis_num
    # A grid of equal shards lets Megatron check that each is written once; torch checks the coverage of others.
    regular = not split.padded and len({part.name for part in split.parts}) == len(split.parts)

    @torch.no_grad()
    def build(key: str, tensor: torch.Tensor, replica_id: ReplicaId, flattened_range: slice | None) -> Any:
        stored, first = [], dict.fromkeys((part.name for part in split.parts), 0)
        for part, start, size, real in split.shares():
            offset = first[part.name] + split.rank * size
            first[part.name] += part.true
            if not real:
                continue
            shape, place, grid = list(tensor.shape), [0] * tensor.dim(), [1] * tensor.dim()
            shape[split.dim] = sum(other.true for other in split.parts if other.name == part.name)
            place[split.dim], grid[split.dim] = offset, split.ranks
            data = tensor.narrow(split.dim, start, real).detach().contiguous()
            stored.append(
                replace(
                    template,
                    key=f"{key}.{part.name}" if part.name else key,
                    data=data,
                    dtype=data.dtype,
                    local_shape=tuple(data.shape),
                    global_shape=(*template.global_shape[:before], *shape),
                    global_offset=(*template.global_offset[:before], *place),
                    axis_fragmentations=(*template.axis_fragmentations[:before], *grid) if regular else None,
                    replica_id=replica_id,
                )
            )
        # A rank without any real row stores nothing and, when loading, keeps its zeros.
        return stored or LocalNonpersistentObject(torch.zeros_like(tensor))

    @torch.no_grad()
    def merge(loaded: Any) -> torch.Tensor:
        if isinstance(loaded, torch.Tensor):
            return loaded
        shape = list(loaded[0].shape)
        shape[split.dim] = sum(size for _, _, size, _ in split.shares())
        whole = loaded[0].new_zeros(shape)
        pieces = iter(loaded)
        for _, start, _, real in split.shares():
            if real:
                whole.narrow(split.dim, start, real).copy_(next(pieces))
        return whole

    return _RealRows(entry.key, entry.data, build, merge, entry.replica_id)
