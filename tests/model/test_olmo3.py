"""The transformer baseline against transformers' Olmo3ForCausalLM, sliding windows included."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import Olmo3Config, Olmo3ForCausalLM

from tests.model.test_huggingface_parity import TOLERANCE, tokens
from tests.parallel import tiny
from tests.parallel.ranks import run_ranks
from tests.parallel.tiny import Layout

PATTERN, WINDOW, LENGTH = "****", 16, 90


def _ours(rank: int, window: tuple[int, int] | None) -> dict[str, Any]:
    layout = Layout(pattern=PATTERN, overrides={"window_size": window, "window_attn_skip_freq": 4})
    chunks = tiny.build(layout)
    tiny.unsettle(chunks)
    with torch.no_grad():
        logits = chunks[0](tokens(LENGTH), torch.arange(LENGTH).expand(2, LENGTH), None)
    return {"weights": tiny.assemble([tiny.global_tensors(chunks)]), "logits": logits.clone()}


def _theirs(weights: dict[str, torch.Tensor]) -> torch.Tensor:
    heads, dim = tiny.SIZES["num_attention_heads"], tiny.SIZES["kv_channels"]
    config = Olmo3Config(
        vocab_size=tiny.PADDED_VOCAB,
        hidden_size=tiny.SIZES["hidden_size"],
        intermediate_size=tiny.SIZES["ffn_hidden_size"],
        num_hidden_layers=len(PATTERN),
        num_attention_heads=heads,
        rms_norm_eps=1e-6,
        sliding_window=WINDOW,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        tie_word_embeddings=False,
        eos_token_id=0,
        pad_token_id=None,
        attn_implementation="eager",
    )
    state = {
        "model.embed_tokens.weight": weights["embedding.word_embeddings.weight"],
        "model.norm.weight": weights["decoder.final_norm.weight"],
        "lm_head.weight": weights["output_layer.weight"],
    }
    for i in range(len(PATTERN)):
        ours, theirs = f"decoder.layers.{i}.", f"model.layers.{i}."
        qkv = weights[ours + "self_attention.linear_qkv.weight"].view(heads, 3, dim, -1)
        for j, name in enumerate("qkv"):
            state[f"{theirs}self_attn.{name}_proj.weight"] = qkv[:, j].flatten(0, 1)
        for name in "qk":
            state[f"{theirs}self_attn.{name}_norm.weight"] = weights[f"{ours}self_attention.qk_norm.{name}_weight"]
        state[theirs + "self_attn.o_proj.weight"] = weights[ours + "self_attention.linear_proj.weight"]
        gate, up = weights[ours + "mlp.linear_fc1.weight"].chunk(2)
        state[theirs + "mlp.gate_proj.weight"], state[theirs + "mlp.up_proj.weight"] = gate, up
        state[theirs + "mlp.down_proj.weight"] = weights[ours + "mlp.linear_fc2.weight"]
        for norm, place in (
            ("post_attention_layernorm", "self_attention.linear_proj"),
            ("post_feedforward_layernorm", "mlp.linear_fc2"),
        ):
            state[f"{theirs}{norm}.weight"] = weights[f"{ours}{place}.post_layernorm.weight"]
    model = Olmo3ForCausalLM(config).eval()
    model.load_state_dict(state, strict=True)
    with torch.no_grad():
        return model(tokens(LENGTH)).logits


@pytest.mark.parametrize(("left", "equal"), [(WINDOW - 1, True), (WINDOW, False), (None, False)])
def test_same_logits_with_the_right_window(left: int | None, equal: bool) -> None:
    """Megatron's left window leaves the query out, transformers' `sliding_window` counts it."""
    ours = run_ranks(_ours, 1, None if left is None else (left, 0))[0]
    difference = (ours["logits"] - _theirs(ours["weights"])).abs().max()
    assert (difference <= TOLERANCE) == equal, difference
