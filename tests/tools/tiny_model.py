"""A small awkward OLMo-Hybrid for the tests of conversion, and torch_dist checkpoints of it made by Megatron."""

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from safetensors.torch import save_file

from megatron_hybrid.tools.convert.hf_config import hf_config
from megatron_hybrid.tools.hf_mapping import ModelConfig, hf_tensor_shapes, tensor_rules, to_megatron

ROOT = Path(__file__).resolve().parents[2]
PYTHON_SOURCE = (
    "class Stack:\n"
    '    """A stack.\n\n        indented text   with runs\n    """\n\n'
    "    def push(self, item):\n"
    "        if item is not None :\n"
    "            self.items += [ item ]\t# tab\n\n\n"
    "        return len( self.items )  \n"
    "x = {'é': \"中文\", 1: '🙂'} ; print( x )  # don 't , really .\n"
)
STORED_VOCAB_ROWS = 512  # what the widest tensor parallelism would pad to; vocab_size is 384

# Nothing is equal to anything else by accident: 6 heads, K 24, V 48, hd 20, ffn 88, 371 tokens in 384 rows.
TINY = ModelConfig(
    hybrid_layer_pattern="GGG*GGG*",
    vocab_size=384,
    true_vocab_size=371,
    hidden_size=120,
    intermediate_size=88,
    num_attention_heads=6,
    num_key_value_heads=6,
    head_dim=20,
    linear_num_key_heads=6,
    linear_num_value_heads=6,
    linear_key_head_dim=24,
    linear_value_head_dim=48,
    linear_conv_kernel_dim=4,
    linear_allow_neg_eigval=True,
    rms_norm_eps=1e-6,
    rope_theta=500000.0,
    max_position_embeddings=256,
    eos_token_id=1,
    pad_token_id=None,
)
GROUPED = replace(TINY, num_key_value_heads=2, linear_num_key_heads=3)


def sidecar(config: ModelConfig = TINY, **changes: Any) -> dict[str, Any]:
    """What the trainer writes for `config`, with changes."""
    options = {"norm_placement": "released", "qk_norm": "full", "output_gate": True}
    return {"format": 1, "model_type": "olmo_hybrid", **asdict(config), **options} | changes


def random_hf_tensors(config: ModelConfig) -> dict[str, torch.Tensor]:
    """A tensor of the right shape under each Hugging Face name."""
    generator = torch.Generator().manual_seed(5)
    return {name: torch.randn(shape, generator=generator) for name, shape in hf_tensor_shapes(config).items()}


def megatron_tensors(config: ModelConfig, hf: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors that the trainer stores for a Hugging Face model."""
    return {
        rule.megatron: to_megatron(rule, hf, config, STORED_VOCAB_ROWS).contiguous() for rule in tensor_rules(config)
    }


@dataclass(frozen=True)
class Job:
    """A checkpoint to be written by `ranks` tensor-parallel ranks into `folder`, which must not exist."""

    tensors: dict[str, torch.Tensor]
    ranks: int
    folder: Path


def write_checkpoints(jobs: list[Job], scratch: Path) -> None:
    """Writes all jobs with Megatron in one process of its own."""
    listed = []
    for number, job in enumerate(jobs):
        tensors = scratch / f"job_{number}.safetensors"
        save_file(job.tensors, tensors)
        listed.append({"tensors": str(tensors), "split": job.ranks, "output": str(job.folder)})
    (scratch / "jobs.json").write_text(json.dumps(listed))
    done = subprocess.run(
        [
            sys.executable,
            "-W",
            "ignore",
            str(Path(__file__).parent / "torch_dist_writer.py"),
            str(scratch / "jobs.json"),
        ],
        env=os.environ | {"PYTHONPATH": str(ROOT), "TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]


def train_sentencepiece(path: Path, **changes: Any) -> None:
    """Trains a model of 371 pieces, of the kind that this project trains unless `changes` say otherwise."""
    options: dict[str, Any] = {
        "model_type": "bpe",
        "vocab_size": 371,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "add_dummy_prefix": False,
        "allow_whitespace_only_pieces": True,
        "user_defined_symbols": ["\n", "\t"],
        "eos_id": 1,
        "bos_id": -1,
        "eos_piece": "<|endoftext|>",
    }
    text = [line for line in (PYTHON_SOURCE + Path(__file__).read_text()).split("\n") if line]
    with open(path, "wb") as handle:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(text), model_writer=handle, num_threads=1, minloglevel=2, **options | changes
        )


def directly_filled_model(config: ModelConfig, tensors: dict[str, torch.Tensor]) -> Any:
    """transformers' model with parameters set one by one: no file, no key mapping of transformers or of ours."""
    from transformers import OlmoHybridConfig, OlmoHybridForCausalLM

    model = OlmoHybridForCausalLM(OlmoHybridConfig(**hf_config(config, "float32"))).eval()
    tensors = {name: tensor.float() for name, tensor in tensors.items()}
    for name, parameter in model.named_parameters():
        if name.endswith("linear_attn.conv1d.weight"):
            prefix = name.removesuffix("conv1d.weight")
            parameter.data = torch.cat([tensors.pop(f"{prefix}{part}_conv1d.weight") for part in "qkv"])
        else:
            assert parameter.shape == tensors[name].shape
            parameter.data = tensors.pop(name)
    assert not tensors
    return model
