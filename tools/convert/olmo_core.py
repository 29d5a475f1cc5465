"""OLMo-core's distributed checkpoints as a source: names of HEAD and of the research branch the release came from.

A checkpoint is a `stepN` folder with `model_and_optim/`, or that folder itself. Its config.json describes modules whose
form changes with OLMo-core's version, so the model is taken from a Hugging Face config.json, and every tensor's shape
is checked against it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_hybrid.tools.cli import ToolError
from megatron_hybrid.tools.convert.hf_config import read_hf_config
from megatron_hybrid.tools.convert.safetensors_folder import ITEM_BYTES
from megatron_hybrid.tools.convert.source import EXP_AVG, EXP_AVG_SQ, PARAM
from megatron_hybrid.tools.convert.tokenizer_files import tokenizer_size
from megatron_hybrid.tools.dcp_reader import CONFIG_FILE, METADATA_FILE, TorchDistCheckpoint
from megatron_hybrid.tools.hf_mapping import LAYER_TYPES, ModelConfig, TensorRule, tensor_rules

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS_FOLDER = "model_and_optim"
MODEL, STATE = "model.", "optim.state."  # prefixes of a parameter and of its optimizer state
WHOLE_MODEL = {
    "model.embed_tokens.weight": "embeddings.weight",
    "model.norm.weight": "lm_head.norm.weight",
    "lm_head.weight": "lm_head.w_out.weight",
}
FEED_FORWARD = {
    "mlp.gate_proj.weight": "feed_forward.w1.weight",
    "mlp.down_proj.weight": "feed_forward.w2.weight",
    "mlp.up_proj.weight": "feed_forward.w3.weight",
}
ATTENTION_LAYER = {
    **{f"self_attn.{part}_proj.weight": f"attention.w_{part}.weight" for part in "qkv"},
    "self_attn.o_proj.weight": "attention.w_out.weight",
    "self_attn.q_norm.weight": "attention.q_norm.weight",
    "self_attn.k_norm.weight": "attention.k_norm.weight",
    "post_attention_layernorm.weight": "attention_norm.weight",
    "post_feedforward_layernorm.weight": "feed_forward_norm.weight",
    **FEED_FORWARD,
}
_SAME_IN_BOTH = (*(f"{part}_conv1d.weight" for part in "qkv"), "o_norm.weight", "A_log", "dt_bias")
_GDN_SHARED = {"post_attention_layernorm.weight": "feed_forward_norm.weight", **FEED_FORWARD}
GDN_LAYER = {
    "HEAD": {
        **{f"linear_attn.{part}_proj.weight": f"attention.w_{part}.weight" for part in "qkvabg"},
        "linear_attn.o_proj.weight": "attention.w_out.weight",
        **{f"linear_attn.{name}": f"attention.{name}" for name in _SAME_IN_BOTH},
        "input_layernorm.weight": "attention_norm.weight",
        **_GDN_SHARED,
    },
    "research branch": {
        **{f"linear_attn.{part}_proj.weight": f"fla.inner.{part}_proj.weight" for part in "qkvabgo"},
        **{f"linear_attn.{name}": f"fla.inner.{name}" for name in _SAME_IN_BOTH},
        "input_layernorm.weight": "fla_norm.weight",
        **_GDN_SHARED,
    },
}


@dataclass(frozen=True)
class OlmoCoreSource:
    """An OLMo-core checkpoint that was found to be whole. `names` are OLMo-core's, by released name."""

    checkpoint: TorchDistCheckpoint
    config: ModelConfig
    rules: list[TensorRule]
    names: dict[str, str]
    dialect: str

    @property
    def folder(self) -> Path:
        return self.checkpoint.folder

    @property
    def has_optimizer(self) -> bool:
        """Whether Adam's moments are there."""
        return any(name.startswith(STATE) and name.endswith(f".{EXP_AVG}") for name in self.checkpoint.tensors)

    def dtype(self, rule: TensorRule) -> str:
        return self.checkpoint.stored(MODEL + self.names[rule.hf[0][0]]).dtype

    def read(self, rule: TensorRule, state: str = PARAM) -> dict[str, Tensor]:
        return {name: self.checkpoint.read(stored_name(self.names[name], state)) for name, _ in rule.hf}

    def check_optimizer(self) -> float:
        """Adam's step; ToolError unless every parameter has both moments, of its shape, and they share the step."""
        steps: dict[float, str] = {}
        for rule in self.rules:
            for name, shape in rule.hf:
                for state in (EXP_AVG, EXP_AVG_SQ):
                    moment = self.checkpoint.stored(stored_name(self.names[name], state))
                    if moment.shape != shape:
                        raise ToolError(
                            f"{self.folder}: {moment.name} is {list(moment.shape)} instead of {list(shape)}"
                        )
                    self.checkpoint.check(moment.name)
                step = stored_name(self.names[name], "step")
                steps.setdefault(self.checkpoint.read(step).item(), step)
        if len(steps) > 1:
            said = ", ".join(f"{name} {step:g}" for step, name in list(steps.items())[:2])
            raise ToolError(
                f"{self.folder}: parameters have different optimizer steps ({said}), Megatron has one for all"
            )
        return next(iter(steps))


def stored_name(name: str, state: str) -> str:
    """The checkpoint's key of a parameter, or of a part of its optimizer state."""
    return MODEL + name if state == PARAM else f"{STATE}{name}.{state}"


def core_names(config: ModelConfig, dialect: str) -> dict[str, str]:
    """OLMo-core's name of every released one."""
    names = dict(WHOLE_MODEL)
    for index, kind in enumerate(config.layer_types):
        layer = GDN_LAYER[dialect] if kind == LAYER_TYPES["G"] else ATTENTION_LAYER
        names |= {f"model.layers.{index}.{hf}": f"blocks.{index}.{core}" for hf, core in layer.items()}
    return names


def is_olmo_core(folder: Path) -> bool:
    """Whether a folder is an OLMo-core checkpoint."""
    return (folder / WEIGHTS_FOLDER / METADATA_FILE).is_file() or (
        (folder / METADATA_FILE).is_file() and not (folder / CONFIG_FILE).exists()
    )


def open_olmo_core(folder: Path, config_folder: Path | None, true_vocab_size: int | None = None) -> OlmoCoreSource:
    """Opens a checkpoint and checks names, shapes, chunks and file sizes of all parameters.

    Args:
        folder: `stepN`, or `stepN/model_and_optim`.
        config_folder: with the Hugging Face config.json of the model, and its tokenizer if there is one.
        true_vocab_size: tokens of the tokenizer; None: by tokenizer.json, else all rows.
    """
    if config_folder is None:
        raise ToolError(
            f"{folder}: an OLMo-core checkpoint; give --config FOLDER with the model's Hugging Face config.json too"
        )
    config = read_hf_config(config_folder, true_vocab_size or tokenizer_size(config_folder))
    inner = folder / WEIGHTS_FOLDER
    reader = TorchDistCheckpoint(inner if inner.is_dir() else folder, megatron=False)
    is_research = any(re.match(rf"{MODEL}blocks\.\d+\.fla\.", name) for name in reader.tensors)
    dialect = "research branch" if is_research else "HEAD"
    names, rules = core_names(config, dialect), tensor_rules(config)
    for rule in rules:
        for name, shape in rule.hf:
            stored = reader.stored(MODEL + names[name])
            if stored.dtype not in ITEM_BYTES:
                raise ToolError(f"{reader.folder}: {stored.name} is {stored.dtype}, legal: {', '.join(ITEM_BYTES)}")
            if stored.shape != shape:
                raise ToolError(
                    f"{reader.folder}: {stored.name} has shape {list(stored.shape)}, "
                    f"but config.json makes it {list(shape)}"
                )
            reader.check(stored.name)
    known = {MODEL + name for name in names.values()}
    if foreign := [name for name in reader.tensors if name.startswith(MODEL) and name not in known]:
        raise ToolError(f"{reader.folder}: {foreign[0]} has no place in the model that config.json describes")
    return OlmoCoreSource(reader, config, rules, names, dialect)
