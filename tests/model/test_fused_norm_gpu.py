"""On a GPU: the MLP's norm and fc1 as one module of Transformer Engine's against two, in bf16 and in FP8.

The same kernels run on the same numbers, except with delayed scaling, where the fused norm rounds to FP8 at once and a
separate one to bf16 before.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from megatron_hybrid import compat
from megatron_hybrid.config import HybridConfig
from megatron_hybrid.layer_specs.olmo_hybrid import build_stack_spec
from megatron_hybrid.model import build_model
from megatron_hybrid.modules import norms
from tests.model.test_transformer_engine import unfused
from tests.parallel import tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(
        importlib.util.find_spec("transformer_engine") is None, reason="Transformer Engine is not installed here"
    ),
]

SIZES = {
    "hidden_size": 512,
    "num_attention_heads": 4,
    "kv_channels": 128,
    "ffn_hidden_size": 1024,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 96,
    "linear_value_head_dim": 192,
}
ROWS, SEQUENCE = 2, 512
PRECISIONS: dict[str, dict[str, Any]] = {
    "bf16": {},
    "tensorwise": {"fp8": "hybrid", "fp8_recipe": "tensorwise"},
    "blockwise": {"fp8": "e4m3", "fp8_recipe": "blockwise"},
    "delayed": {"fp8": "hybrid", "fp8_recipe": "delayed"},
    "recomputed": {
        "fp8": "hybrid",
        "fp8_recipe": "tensorwise",
        "recompute_granularity": "selective",
        "recompute_modules": ["mlp"],
    },
}
#: Norms whose output is freed and made again, each beside what it is compared with.
RECOMPUTED_NORMS: dict[str, dict[str, Any]] = {
    f"{name}, norms recomputed": {
        **PRECISIONS[name],
        "recompute_granularity": "selective",
        "recompute_modules": ["layernorm"],
    }
    for name in ("bf16", "tensorwise", "blockwise")
}
#: Groups of numbers: the loss of every token; gradients, those of one parameter in all layers together.
Found = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Megatron's process groups, of this process alone."""
    rendezvous = tmp_path_factory.mktemp("groups") / "rendezvous"
    compat.start_backend()
    torch.cuda.set_device(0)
    dist.init_process_group("nccl", init_method=f"file://{rendezvous}", rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    yield "cuda"
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def build(fused: bool, device: str, **overrides: Any) -> Any:
    """All blocks pre-normed, each weight away from its start; the same weights, fused or not."""
    torch.manual_seed(1)
    with patch.object(norms, "fuses_norms", lambda config: fused):
        model = build_model(
            tiny.make_config(tiny.Layout(bf16=True), **SIZES, **overrides),
            pattern=tiny.PATTERN,
            padded_vocab_size=tiny.PADDED_VOCAB,
            max_sequence_length=SEQUENCE,
            stack_spec=build_stack_spec(HybridConfig(norm_placement="pre"), "transformer_engine"),
        )
    tiny.unsettle([model])  # parameters are in the same order
    assert ("decoder.layers.0.mlp.linear_fc1.layer_norm_weight" in dict(model.named_parameters())) == fused
    return model.to(device)


def measure(precision: str, fused: bool, device: str) -> Found:
    """Of the second of two equal passes: then delayed scaling knows the range of its tensors."""
    from transformer_engine.pytorch.fp8 import FP8GlobalStateManager

    FP8GlobalStateManager.reset()
    model = build(fused, device, **{**PRECISIONS, **RECOMPUTED_NORMS}[precision])
    tokens = torch.randint(0, tiny.VOCAB, (ROWS, SEQUENCE + 1), generator=torch.Generator().manual_seed(2)).to(device)
    positions = torch.arange(SEQUENCE, device=device).repeat(ROWS, 1)
    for _ in range(2):
        model.zero_grad()
        losses = model(tokens[:, :-1].contiguous(), positions, None, labels=tokens[:, 1:].contiguous()).float()
        losses.mean().backward()
    assert {bool(layer.mlp.linear_fc1.fp8) for layer in model.decoder.layers} == {not precision.startswith("bf16")}
    parts: dict[str, list[torch.Tensor]] = {"loss": [losses.detach().flatten()]}
    for name, param in model.named_parameters():
        assert param.grad is not None, name
        kind = ".".join(word for word in unfused(name).split(".") if not word.isdigit())
        parts.setdefault(kind, []).append(param.grad.float().flatten())
    return {kind: torch.cat(tensors) for kind, tensors in parts.items()}


def distances(one: Found, other: Found) -> dict[str, float]:
    """Norm of the difference of each group over that of the other's."""
    assert one.keys() == other.keys()
    return {kind: ((one[kind] - other[kind]).norm() / other[kind].norm()).item() for kind in one}


def test_fused_and_separate_norms_agree(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0")  # of attention's backward pass
    separate: dict[str, Found] = {}
    fused: dict[str, Found] = {}
    wrong: dict[Any, Any] = {}
    for precision in PRECISIONS:
        separate[precision], fused[precision] = (measure(precision, one, device) for one in (False, True))
        again = measure(precision, True, device)
        if any(distances(again, fused[precision]).values()):
            wrong[precision, "repeated"] = distances(again, fused[precision])
        apart = distances(fused[precision], separate[precision])
        print(f"{precision}: fused from separate, relative: {apart}")
        if precision != "delayed" and any(apart.values()):
            wrong[precision, "fused from separate"] = apart

    if any(distances(fused["recomputed"], fused["tensorwise"]).values()):
        wrong["recomputed from tensorwise"] = distances(fused["recomputed"], fused["tensorwise"])
    apart = distances(fused["delayed"], separate["delayed"])
    rounding, fused_rounding = (distances(found["delayed"], separate["bf16"]) for found in (separate, fused))
    print(f"delayed from bf16: separate {rounding}, fused {fused_rounding}")
    for kind, size in rounding.items():
        # Independent roundings of one size lie 1.4 times that apart; of few numbers (A_log: 12) the ratio is less sure.
        slack = 1.0 if separate["delayed"][kind].numel() >= 500 else 3.0
        if not size or apart[kind] > 1.5 * slack * size or fused_rounding[kind] > 1.25 * slack * size:
            wrong["delayed", kind] = {"separate": size, "fused": fused_rounding[kind], "apart": apart[kind]}
    assert not wrong, wrong


def test_recomputed_norms_change_nothing(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An FP8 copy that a linear makes in the backward pass is the one that it made, and kept, in the forward pass."""
    monkeypatch.setenv("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0")
    for name in RECOMPUTED_NORMS:
        kept, again = (measure(precision, False, device) for precision in (name.split(",")[0], name))
        assert not any(distances(again, kept).values()), (name, distances(again, kept))
