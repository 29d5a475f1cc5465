"""The map between Hugging Face and Megatron tensors: the released names, exact layouts, an exact round trip."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_hybrid.tools.cli import ToolError
from megatron_hybrid.tools.hf_mapping import (
    OLMO_HYBRID_7B,
    Layout,
    ModelConfig,
    TensorRule,
    config_from_sidecar,
    hf_tensor_shapes,
    parameter_count,
    tensor_rules,
    to_hf,
    to_megatron,
)
from tests.tools.tiny_model import GROUPED, TINY, random_hf_tensors, sidecar


def rule_of(config: ModelConfig, megatron: str) -> TensorRule:
    """The rule of one Megatron tensor."""
    return next(rule for rule in tensor_rules(config) if rule.megatron == megatron)


def test_7b_has_the_523_released_names_and_shapes() -> None:
    frozen = json.loads((Path(__file__).parent / "olmo_hybrid_7b_tensors.json").read_text())
    assert {name: list(shape) for name, shape in hf_tensor_shapes(OLMO_HYBRID_7B).items()} == frozen
    assert len(frozen) == 523
    assert parameter_count(OLMO_HYBRID_7B) == 7_430_870_688


def test_7b_shapes_are_those_of_transformers_own_model() -> None:
    from transformers import OlmoHybridConfig, OlmoHybridForCausalLM

    with torch.device("meta"):
        model = OlmoHybridForCausalLM(OlmoHybridConfig())  # its defaults are the released model
    theirs = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    ours = hf_tensor_shapes(OLMO_HYBRID_7B)
    for name in [name for name in theirs if name.endswith("linear_attn.conv1d.weight")]:
        # in memory one conv, on disk three
        prefix = name.removesuffix("conv1d.weight")
        parts = [ours.pop(f"{prefix}{part}_conv1d.weight") for part in "qkv"]
        assert theirs.pop(name) == (sum(part[0] for part in parts), *parts[0][1:])
    assert ours == theirs


@pytest.mark.parametrize("config", [TINY, GROUPED], ids=["heads_6_6", "grouped_kv_2_and_key_heads_3"])
def test_round_trip_is_bit_equal(config: ModelConfig) -> None:
    tensors = random_hf_tensors(config)
    returned = {}
    for rule in tensor_rules(config):
        stored = to_megatron(rule, tensors, config, vocab_rows=config.vocab_size + 128)
        if rule.layout is not Layout.VOCAB_ROWS:
            assert tuple(stored.shape) == rule.megatron_shape
        returned.update(to_hf(rule, stored, config))
    assert list(returned) == list(tensors)
    assert all(torch.equal(returned[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("config", [TINY, GROUPED], ids=["kv_heads_6", "kv_heads_2"])
def test_linear_qkv_holds_query_heads_key_value_group_by_group(config: ModelConfig) -> None:
    tensors = random_hf_tensors(config)
    head, group_heads = config.head_dim, config.num_attention_heads // config.num_key_value_heads
    q, k, v = (tensors[f"model.layers.3.self_attn.{name}_proj.weight"] for name in "qkv")
    expected = []
    for group in range(config.num_key_value_heads):
        for query_head in range(group * group_heads, (group + 1) * group_heads):
            expected.append(q[query_head * head : (query_head + 1) * head])
        expected.append(k[group * head : (group + 1) * head])
        expected.append(v[group * head : (group + 1) * head])
    rule = rule_of(config, "decoder.layers.3.self_attention.linear_qkv.weight")
    assert torch.equal(to_megatron(rule, tensors, config), torch.cat(expected))


@pytest.mark.parametrize("memory", ["apart", "in order", "reversed", "with a gap"])
def test_linear_fc1_holds_gate_rows_then_up_rows(memory: str) -> None:
    """Nothing is copied where the two lie one after the other, and nothing else is taken for that."""
    tensors = random_hf_tensors(TINY)
    gate, up = (tensors[f"model.layers.0.mlp.{name}_proj.weight"] for name in ("gate", "up"))
    both = torch.cat(
        [up, gate] if memory == "reversed" else [gate, up[:1], up] if memory == "with a gap" else [gate, up]
    )
    given = {
        "in order": (both[:88], both[88:]),
        "reversed": (both[88:], both[:88]),
        "with a gap": (both[:88], both[89:]),
    }
    pair = given.get(memory, (gate, up))
    names = [f"model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up")]
    stored = to_megatron(
        rule_of(TINY, "decoder.layers.0.mlp.linear_fc1.weight"), dict(zip(names, pair, strict=True)), TINY
    )
    assert torch.equal(stored, torch.cat([gate, up]))
    assert (stored.data_ptr() == both.data_ptr()) == (memory == "in order")


@pytest.mark.parametrize(
    ("megatron", "hf"),
    [
        ("decoder.layers.0.self_attention.ab_proj.weight.alpha", "model.layers.0.linear_attn.a_proj.weight"),
        ("decoder.layers.0.self_attention.ab_proj.weight.beta", "model.layers.0.linear_attn.b_proj.weight"),
        ("decoder.layers.0.self_attention.in_proj.weight.query", "model.layers.0.linear_attn.q_proj.weight"),
        ("decoder.layers.0.self_attention.in_proj.weight.key", "model.layers.0.linear_attn.k_proj.weight"),
        ("decoder.layers.0.self_attention.in_proj.weight.z", "model.layers.0.linear_attn.g_proj.weight"),
        ("decoder.layers.0.self_attention.in_proj.weight.value", "model.layers.0.linear_attn.v_proj.weight"),
        ("decoder.layers.0.pre_mlp_layernorm.weight", "model.layers.0.post_attention_layernorm.weight"),
        (
            "decoder.layers.3.self_attention.linear_proj.post_layernorm.weight",
            "model.layers.3.post_attention_layernorm.weight",
        ),
        (
            "decoder.layers.3.mlp.linear_fc2.post_layernorm.weight",
            "model.layers.3.post_feedforward_layernorm.weight",
        ),
    ],
    ids=lambda name: name.split(".", 3)[-1] if name.startswith("decoder") else "",
)
def test_tensors_of_equal_shape_are_not_exchanged(megatron: str, hf: str) -> None:
    assert [name for name, _ in rule_of(TINY, megatron).hf] == [hf]


def test_vocabulary_padding_is_cut_and_too_few_rows_are_refused() -> None:
    rule = rule_of(TINY, "output_layer.weight")
    padded = torch.randn(512, 120)
    assert torch.equal(to_hf(rule, padded, TINY)["lm_head.weight"], padded[:384])
    with pytest.raises(ToolError, match=r"output_layer.weight: 371 stored rows are fewer than vocab_size 384"):
        to_hf(rule, padded[:371], TINY)


def test_a_stored_tensor_of_another_shape_is_refused() -> None:
    rule = rule_of(TINY, "decoder.layers.3.self_attention.linear_qkv.weight")
    with pytest.raises(ToolError, match=r"linear_qkv.weight: stored shape \[360, 119\], .* \[360, 120\]"):
        to_hf(rule, torch.zeros(360, 119), TINY)


def test_names_are_unique_on_both_sides() -> None:
    rules = tensor_rules(OLMO_HYBRID_7B)
    assert len({rule.megatron for rule in rules}) == len(rules)
    assert sum(len(rule.hf) for rule in rules) == 523
    assert sum(math.prod(rule.megatron_shape) for rule in rules) == parameter_count(OLMO_HYBRID_7B)


def test_sidecar_gives_the_configuration() -> None:
    assert config_from_sidecar(json.loads(json.dumps(sidecar())), "here") == TINY
    staged = config_from_sidecar(sidecar(hybrid_layer_pattern="GGG*|GGG*"), "here")
    assert staged.layer_types == TINY.layer_types == (["linear_attention"] * 3 + ["full_attention"]) * 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm_placement": "post"}, "norm_placement 'post' cannot be expressed .*legal: 'released'"),
        ({"qk_norm": "head"}, "qk_norm 'head' cannot be expressed"),
        ({"output_gate": False}, "output_gate False cannot be expressed"),
        ({"gdn_norm_eps": 1e-6}, "gdn_norm_eps 1e-06 cannot be expressed"),
        ({"window_size": [4096, 0]}, "window_size .* cannot be expressed"),
        ({"model_type": "olmo3"}, "model_type 'olmo3' cannot be expressed"),
        ({"format": 2}, "format 2 is not supported, legal: 1"),
        ({"hybrid_layer_pattern": "GGG*GG-*"}, "has the symbol '-'"),
        ({"hybrid_layer_pattern": "GGGG"}, "at least one \\*"),
        ({"hidden_size": "120"}, "hidden_size must be int, but is '120'"),
        ({"hidden_size": 0}, "hidden_size must be above 0"),
        ({"linear_allow_neg_eigval": 1}, "linear_allow_neg_eigval must be bool"),
        ({"num_key_value_heads": 4}, "num_attention_heads 6 is no multiple of num_key_value_heads 4"),
        ({"true_vocab_size": 385}, "true_vocab_size 385 is above vocab_size 384"),
        ({"eos_token_id": 384}, "eos_token_id 384 is outside the vocabulary"),
        ({"head_gate": True}, "unknown key 'head_gate'"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_sidecar_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ToolError, match=f"^here: .*{message}|^here: {message}"):
        config_from_sidecar(sidecar(**changes), "here")


@pytest.mark.parametrize("key", ["rope_theta", "norm_placement", "hidden_size"])
def test_sidecar_without_a_key_is_refused(key: str) -> None:
    values = sidecar()
    del values[key]
    with pytest.raises(ToolError, match=f"^here: key '{key}' is missing"):
        config_from_sidecar(values, "here")
