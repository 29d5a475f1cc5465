"""Writes a Hugging Face folder of random bf16 weights of any size, streamed, for measurements of conversion.

python -m tests.tools.synthetic_model FOLDER --size 7b      14.86 GB, the released model's shapes
"""

import argparse
import zlib
from dataclasses import replace
from pathlib import Path

import torch

from megatron_hybrid.tools.convert.hf_config import hf_config
from megatron_hybrid.tools.convert.output_folder import write_json
from megatron_hybrid.tools.convert.safetensors_folder import SafetensorsWriter
from megatron_hybrid.tools.convert.to_huggingface import PlannedTensor, plan_shards, shard_names
from megatron_hybrid.tools.hf_mapping import OLMO_HYBRID_7B, ModelConfig, hf_tensor_shapes

_1B = replace(
    OLMO_HYBRID_7B,
    hybrid_layer_pattern="GGG*" * 4,
    vocab_size=16384,
    true_vocab_size=16384,
    eos_token_id=0,
    pad_token_id=None,
    hidden_size=1920,
    num_attention_heads=15,
    num_key_value_heads=15,
    linear_num_key_heads=15,
    linear_num_value_heads=15,
    intermediate_size=8192,
)
SIZES: dict[str, ModelConfig] = {
    "7b": OLMO_HYBRID_7B,  # 14.86 GB
    "2gb": _1B,
    "small": replace(_1B, hidden_size=640, num_attention_heads=5, num_key_value_heads=5, intermediate_size=2048),
}


def write_synthetic(folder: Path, config: ModelConfig, max_shard_bytes: int) -> int:
    """Writes the folder and returns the bytes of its weights."""
    folder.mkdir(parents=True)
    write_json(folder / "config.json", hf_config(config, "bfloat16"))
    planned = [PlannedTensor(name, shape, "bfloat16") for name, shape in hf_tensor_shapes(config).items()]
    shards = plan_shards(planned, max_shard_bytes)
    block = torch.randn(2**23, generator=torch.Generator().manual_seed(3)).bfloat16()
    weight_map = {}
    for file, shard in zip(shard_names(len(shards)), shards, strict=True):
        writer = SafetensorsWriter(folder / file, {tensor.name: (tensor.dtype, tensor.shape) for tensor in shard})
        for tensor in shard:
            count = torch.Size(tensor.shape).numel()
            start = zlib.crc32(tensor.name.encode()) % 2**22  # so that tensors of one shape differ
            writer.write(tensor.name, block[start:].repeat(-(-count // (2**23 - start)))[:count])
            weight_map[tensor.name] = file
        writer.close()
    if len(shards) > 1:
        write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    return sum(tensor.size_bytes for tensor in planned)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", choices=sorted(SIZES), required=True)
    arguments = parser.parse_args()
    size = write_synthetic(arguments.folder, SIZES[arguments.size], 5 * 10**9)
    print(f"{arguments.folder}: {size:,} bytes of weights")


if __name__ == "__main__":
    main()
