"""Long context from a pretraining checkpoint: rotary embeddings removed (DroPE), or YaRN, against transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import OlmoHybridForCausalLM

from megatron_hybrid.checkpoint import sidecar
from megatron_hybrid.modules.attention import OlmoAttention
from megatron_hybrid.tools.convert.hf_config import hf_config, read_hf_config
from megatron_hybrid.tools.convert.model_flags import training_flags
from megatron_hybrid.tools.hf_mapping import (
    REQUIRED_OPTIONS,
    config_from_sidecar,
    sidecar_values,
    tensor_rules,
    to_hf,
)
from tests.model.test_huggingface_parity import CONFIG, LENGTHS, TOLERANCE, tokens
from tests.parallel import tiny
from tests.parallel.compare import differences, measure
from tests.parallel.ranks import run_ranks
from tests.parallel.tiny import Layout

#: Of a model trained at 32 tokens. With base 500,000 and 8 frequencies, the ramp covers some of each kind.
FACTOR, ORIGINAL = 8.0, 32

#: transformers' words.
YARN = {
    "rope_type": "yarn",
    "rope_theta": 500000.0,
    "factor": FACTOR,
    "original_max_position_embeddings": ORIGINAL,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
}


def _build(layout: Layout, positions: str, fused: bool = False) -> list[torch.nn.Module]:
    """`tiny.build`, with the config as Megatron's arguments would make it."""
    build_model = tiny.build_model

    def build(config: Any, **settings: Any) -> Any:
        if positions == "yarn":
            config.yarn_rotary_scaling_factor, config.yarn_original_max_position_embeddings = FACTOR, ORIGINAL
            config.yarn_beta_fast, config.yarn_beta_slow = 32.0, 1.0
            config.yarn_mscale, config.yarn_mscale_all_dim = 1.0, 0.0
            config.yarn_correction_range_round_to_int = True
        config.apply_rope_fusion = fused
        return build_model(config, **{**settings, "position_embedding_type": positions})

    tiny.build_model = build
    return tiny.build(layout)


def _pretrained(rank: int, folder: Path) -> dict[str, torch.Tensor]:
    chunks = _build(Layout(), "rope")
    tiny.unsettle(chunks)
    tiny.save_weights(chunks, folder)
    return tiny.assemble([tiny.global_tensors(chunks)])


def _logits(rank: int, folder: Path, positions: str, broken: str = "") -> dict[int, torch.Tensor]:
    chunks = _build(Layout(), positions)
    tiny.load_weights(chunks, folder)
    if broken:
        for module in chunks[0].modules():
            if isinstance(module, OlmoAttention):
                module._yarn_concentration_factor = 1.0
    with torch.no_grad():
        return {t: chunks[0](tokens(t), torch.arange(t).expand(2, t), None).clone() for t in LENGTHS}


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("positions")
    weights = run_ranks(_pretrained, 1, folder / "weights")[0]
    tensors = {}
    for rule in tensor_rules(CONFIG):
        tensors.update({name: t.contiguous() for name, t in to_hf(rule, weights[rule.megatron], CONFIG).items()})
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return {"folder": folder, "weights": folder / "weights"}


def _theirs(folder: Path, rope: dict[str, Any]) -> dict[int, torch.Tensor]:
    (folder / "config.json").write_text(json.dumps({**hf_config(CONFIG, "float32"), "rope_parameters": rope}))
    model = OlmoHybridForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return {t: model(tokens(t)).logits for t in LENGTHS}


def _worst(ours: dict[int, torch.Tensor], theirs: dict[int, torch.Tensor]) -> float:
    return max((ours[t] - theirs[t]).abs().max().item() for t in LENGTHS)


def test_yarn_and_its_attention_factor_are_transformers(pretrained: dict[str, Any]) -> None:
    theirs = _theirs(pretrained["folder"], YARN)
    assert _worst(run_ranks(_logits, 1, pretrained["weights"], "yarn")[0], theirs) <= TOLERANCE
    assert _worst(run_ranks(_logits, 1, pretrained["weights"], "yarn", "no attention factor")[0], theirs) > 1e-3
    assert _worst(run_ranks(_logits, 1, pretrained["weights"], "rope")[0], theirs) > 1e-3


def test_without_rotary_embeddings_it_is_transformers_nope(pretrained: dict[str, Any]) -> None:
    theirs = _theirs(pretrained["folder"], {"rope_theta": None})
    assert _worst(run_ranks(_logits, 1, pretrained["weights"], "none")[0], theirs) <= TOLERANCE
    assert _worst(run_ranks(_logits, 1, pretrained["weights"], "rope")[0], theirs) > 1e-3


def _split(rank: int, layout: Layout, folder: Path) -> dict[str, Any]:
    chunks = _build(layout, "yarn")
    tiny.load_weights(chunks, folder)
    return measure(layout, chunks)


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_yarn_over_context_parallel_ranks(packed: bool, pretrained: dict[str, Any]) -> None:
    one = run_ranks(_split, 1, Layout(packed=packed), pretrained["weights"])[0]
    two = run_ranks(_split, 2, Layout(cp=2, packed=packed), pretrained["weights"])
    assert max(differences(one, two).values()) <= 1e-6


def _fused(rank: int) -> None:
    _build(Layout(), "yarn", fused=True)


def test_fused_rotary_embeddings_are_refused_with_yarn() -> None:
    with pytest.raises(AssertionError, match=r"yarn: fused .*attention factor 1\.2079; add --no-rope-fusion"):
        run_ranks(_fused, 1)


def test_yarn_is_exported_and_read_back(tmp_path: Path) -> None:
    """With the parameters under which transformers has our logits, above."""
    values = {**sidecar_values(CONFIG), "format": 1, **REQUIRED_OPTIONS, "rope_theta": 5e5}
    config = config_from_sidecar({**values, "rope_scaling": sidecar._yarn(_Args())}, "sidecar")  # type: ignore[arg-type]
    written = hf_config(config, "float32")
    assert written["rope_parameters"] == YARN
    (tmp_path / "config.json").write_text(json.dumps(written))
    assert read_hf_config(tmp_path, CONFIG.true_vocab_size) == config
    flags = " ".join(training_flags(config))
    assert "--position-embedding-type yarn --rotary-scaling-factor 8.0 " in flags and "--no-rope-fusion" in flags


class _Args:
    rotary_scaling_factor, yarn_original_max_position_embeddings = FACTOR, ORIGINAL
    yarn_beta_fast = yarn_beta_slow = None
