"""The 7B presets on the meta device: parameter count, attention layers, names."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.transformer import TransformerConfig
from transformers import Olmo3Config, Olmo3ForCausalLM

from megatron_hybrid.layer_specs.olmo3 import olmo3_stack_spec
from megatron_hybrid.layer_specs.olmo_hybrid import olmo_hybrid_stack_spec
from megatron_hybrid.model import build_model, count_parameters
from megatron_hybrid.modules.attention import OlmoAttention
from megatron_hybrid.presets import PRESETS
from tests.parallel import tiny
from tests.parallel.ranks import run_ranks

PADDED_VOCAB = 100352


def _build_7b(rank: int, preset: str) -> dict[str, Any]:
    flags = PRESETS[preset]
    pattern = str(flags["hybrid-layer-pattern"])
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    sizes = {
        name.replace("-", "_"): flags[name] for name in (*(k.replace("_", "-") for k in tiny.SIZES),) if name in flags
    }
    config: TransformerConfig = tiny.make_config(tiny.Layout(pattern=pattern), **{"linear_num_key_heads": 1, **sizes})
    with torch.device("meta"):
        spec = olmo_hybrid_stack_spec if "G" in pattern else olmo3_stack_spec
        model = build_model(
            config, pattern=pattern, padded_vocab_size=PADDED_VOCAB, max_sequence_length=8192, stack_spec=spec
        )
    attention = [i for i, layer in enumerate(model.decoder.layers) if isinstance(layer.self_attention, OlmoAttention)]
    return {"parameters": count_parameters([model]), "attention": attention}


def test_olmo_hybrid_7b() -> None:
    built = run_ranks(_build_7b, 1, "olmo-hybrid-7b")[0]
    assert built == {"parameters": 7_430_870_688, "attention": list(range(3, 32, 4))}


def test_olmo3_7b_has_the_parameters_of_transformers_olmo3() -> None:
    flags = PRESETS["olmo3-7b"]
    with torch.device("meta"):
        peer = Olmo3ForCausalLM(
            Olmo3Config(
                vocab_size=PADDED_VOCAB,
                hidden_size=flags["hidden-size"],
                intermediate_size=flags["ffn-hidden-size"],
                num_hidden_layers=flags["num-layers"],
                num_attention_heads=flags["num-attention-heads"],
                tie_word_embeddings=False,
            )
        )
    built = run_ranks(_build_7b, 1, "olmo3-7b")[0]
    assert built == {"parameters": count_parameters([peer]), "attention": list(range(32))}
