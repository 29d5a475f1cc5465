"""The tiny model against transformers' OlmoHybridForCausalLM: same weights, same logits; broken on purpose, not."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import OlmoHybridForCausalLM

from megatron_hybrid.config import HybridConfig
from megatron_hybrid.kernels import reference
from megatron_hybrid.modules.gated_delta_net import GatedDeltaNet
from megatron_hybrid.modules.norms import QKNorm
from megatron_hybrid.tools.convert.hf_config import hf_config
from megatron_hybrid.tools.hf_mapping import ModelConfig, tensor_rules, to_hf
from tests.parallel import tiny
from tests.parallel.ranks import run_ranks
from tests.parallel.tiny import Layout

LENGTHS = (1, 63, 64, 65, 200)  # around the chunk of 64, and several chunks

#: fp32, eight layers, logits of order 1.
TOLERANCE = 1e-4

CONFIG = ModelConfig(
    hybrid_layer_pattern=tiny.PATTERN,
    vocab_size=tiny.PADDED_VOCAB,
    true_vocab_size=tiny.VOCAB,
    hidden_size=tiny.SIZES["hidden_size"],
    intermediate_size=tiny.SIZES["ffn_hidden_size"],
    num_attention_heads=tiny.SIZES["num_attention_heads"],
    num_key_value_heads=tiny.SIZES["num_attention_heads"],
    head_dim=tiny.SIZES["kv_channels"],
    linear_num_key_heads=tiny.SIZES["linear_num_key_heads"],
    linear_num_value_heads=tiny.SIZES["linear_num_value_heads"],
    linear_key_head_dim=tiny.SIZES["linear_key_head_dim"],
    linear_value_head_dim=tiny.SIZES["linear_value_head_dim"],
    linear_conv_kernel_dim=tiny.SIZES["linear_conv_kernel_dim"],
    linear_allow_neg_eigval=True,
    rms_norm_eps=1e-6,
    rope_theta=500000.0,
    max_position_embeddings=256,
    eos_token_id=0,
    pad_token_id=None,
)


Mutation = Callable[[nn.Module], None]


def tokens(length: int) -> torch.Tensor:
    return torch.randint(0, tiny.VOCAB, (2, length), generator=torch.Generator().manual_seed(length))


def _logits(chunk: nn.Module) -> dict[int, torch.Tensor]:
    with torch.no_grad():
        return {t: chunk(tokens(t), torch.arange(t).expand(2, t), None).clone() for t in LENGTHS}


def _reference(rank: int, folder: Path, rope: bool) -> dict[str, Any]:
    chunks = tiny.build(Layout(), rope=rope)
    tiny.unsettle(chunks)
    tiny.save_weights(chunks, folder)
    return {"weights": tiny.assemble([tiny.global_tensors(chunks)]), "logits": _logits(chunks[0])}


def _broken(rank: int, folder: Path, options: HybridConfig, rope: bool, mutate: Mutation) -> dict[int, Any]:
    chunks = tiny.build(Layout(), options, rope=rope)
    tiny.load_weights(chunks, folder)
    mutate(chunks[0])
    return _logits(chunks[0])


def _hugging_face(weights: dict[str, torch.Tensor], rope: bool, folder: Path) -> dict[int, torch.Tensor]:
    config = replace(CONFIG, rope_theta=CONFIG.rope_theta if rope else None)
    (folder / "config.json").write_text(json.dumps(hf_config(config, "float32")))
    tensors = {}
    for rule in tensor_rules(CONFIG):
        tensors.update({name: t.contiguous() for name, t in to_hf(rule, weights[rule.megatron], CONFIG).items()})
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    model, report = OlmoHybridForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(report.values()), report
    with torch.no_grad():
        return {t: model(tokens(t)).logits for t in LENGTHS}


@pytest.fixture(scope="module", params=[True, False], ids=["rope", "nope"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("parity")
    ours = run_ranks(_reference, 1, folder / "weights", request.param)[0]
    theirs = _hugging_face(ours["weights"], request.param, folder)
    return {"ours": ours["logits"], "theirs": theirs, "weights": folder / "weights", "rope": request.param}


def _worst(case: dict[str, Any], ours: dict[int, torch.Tensor]) -> float:
    return max((ours[t] - case["theirs"][t]).abs().max().item() for t in LENGTHS)


@pytest.mark.parametrize("length", LENGTHS)
def test_same_logits(length: int, case: dict[str, Any]) -> None:
    assert case["theirs"][length].std() > 0.3  # logits that carry information
    torch.testing.assert_close(case["ours"][length], case["theirs"][length], rtol=0, atol=TOLERANCE)


def _nothing(model: nn.Module) -> None: ...


def _qk_norm_over_each_head(model: nn.Module) -> None:
    """The full-width weights, but statistics of each head."""

    def per_head(self: QKNorm, query: torch.Tensor, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        def normed(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            return nn.functional.rms_norm(x, (x.shape[-1],), eps=self.eps) * weight.view(x.shape[-2:])

        return normed(query, self.q_weight), normed(key, self.k_weight)

    QKNorm._over_full_width = per_head  # type: ignore[method-assign]


def _normalise_keys_over_value_width(model: nn.Module) -> None:
    """What K = V code does to K ≠ V: groups of V channels instead of K."""
    right = reference.l2norm
    width = CONFIG.linear_value_head_dim
    reference.l2norm = lambda x: right(x.flatten(-2).unflatten(-1, (-1, width))).reshape(x.shape)


def _decay_parameters_in_bf16(model: nn.Module) -> None:
    """A_log and dt_bias rounded, as a model cast does that keeps no parameter in fp32."""
    for layer in model.decoder.layers:
        if isinstance(layer.self_attention, GatedDeltaNet):
            for param in (layer.self_attention.A_log, layer.self_attention.dt_bias):
                param.data = param.data.bfloat16().float()


def _attention_layers_pre_norm(model: nn.Module) -> None:
    """The norms after the branches of attention layers moved before them."""
    for layer in model.decoder.layers:
        if not isinstance(layer.self_attention, GatedDeltaNet):
            layer.input_layernorm = layer.self_attention.linear_proj.post_layernorm
            layer.self_attention.linear_proj.post_layernorm = nn.Identity()
            layer.pre_mlp_layernorm = layer.mlp.linear_fc2.post_layernorm
            layer.mlp.linear_fc2.post_layernorm = nn.Identity()


def _gdn_layers_post_norm(model: nn.Module) -> None:
    """The norms before the branches of Gated DeltaNet layers moved after them."""
    for layer in model.decoder.layers:
        if isinstance(layer.self_attention, GatedDeltaNet):
            for linear, name in (
                (layer.self_attention.out_proj, "input_layernorm"),
                (layer.mlp.linear_fc2, "pre_mlp_layernorm"),
            ):
                norm = getattr(layer, name)
                setattr(layer, name, nn.Identity())
                linear.register_forward_hook(lambda module, x, y, norm=norm: (norm(y[0]), y[1]))


MUTATIONS: dict[str, tuple[HybridConfig, bool, Mutation]] = {
    "beta not doubled": (HybridConfig(gdn_allow_neg_eigval=False), True, _nothing),
    "output norm eps 1e-6": (HybridConfig(gdn_norm_epsilon=1e-6), True, _nothing),
    "attention layers pre-norm": (HybridConfig(), True, _attention_layers_pre_norm),
    "gdn layers post-norm": (HybridConfig(), True, _gdn_layers_post_norm),
    "q/k norm over each head": (HybridConfig(), True, _qk_norm_over_each_head),
    "keys normalised over V channels": (HybridConfig(), True, _normalise_keys_over_value_width),
    "decay parameters in bf16": (HybridConfig(), True, _decay_parameters_in_bf16),
    "rope switched": (HybridConfig(), False, _nothing),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_broken_on_purpose_it_differs(mutation: str, case: dict[str, Any]) -> None:
    options, keep_rope, mutate = MUTATIONS[mutation]
    rope = case["rope"] if keep_rope else not case["rope"]
    broken = run_ranks(_broken, 1, case["weights"], options, rope, mutate)[0]
    assert _worst(case, broken) > 10 * TOLERANCE
