"""Writes torch_dist checkpoints with Megatron's own dist_checkpointing, for the tests of the tools that read them.

    python torch_dist_writer.py JOBS.json

Runs in a process of its own, since the tests must not import Megatron. A job is {"tensors": safetensors file with
the global tensors, "split": how many tensor-parallel ranks write it, "output": folder}. Tensors are split as the
model's modules split them.
"""

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

# Which dimension tensor parallelism splits, by the end of the key; what is not here is replicated.
SPLIT_DIMENSION = {
    "word_embeddings.weight": 0,
    "output_layer.weight": 0,
    "in_proj.weight.query": 0,
    "in_proj.weight.key": 0,
    "in_proj.weight.value": 0,
    "in_proj.weight.z": 0,
    "ab_proj.weight.alpha": 0,
    "ab_proj.weight.beta": 0,
    "conv1d.weight.query": 0,
    "conv1d.weight.key": 0,
    "conv1d.weight.value": 0,
    "A_log": 0,
    "dt_bias": 0,
    "out_proj.weight": 1,
    "linear_qkv.weight": 0,
    "q_weight": 0,
    "k_weight": 0,
    "linear_proj.weight": 1,
    "linear_fc2.weight": 1,
}


def sharded_state(tensors: dict[str, Any], rank: int, ranks: int) -> dict[str, Any]:
    """What one rank passes to dist_checkpointing.save, with objects that are no tensors among it."""
    from megatron.core.dist_checkpointing import ShardedTensor
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    state: dict[str, Any] = {"iteration": 7, "args": {"hidden_size": 1}}
    for key, tensor in tensors.items():
        dimension = next((d for suffix, d in SPLIT_DIMENSION.items() if key.endswith(suffix)), None)
        if key.endswith("linear_fc1.weight"):  # a rank holds its gate rows, then its up rows
            blocks = tensor.chunk(2 * ranks)
            for half in (0, 1):
                place = half * ranks + rank
                state[f"{key}/{half}"] = ShardedTensor.from_rank_offsets(key, blocks[place], (0, place, 2 * ranks))
        elif dimension is None or tensor.dim() == 0:
            state[key] = ShardedTensor.from_rank_offsets(key, tensor, replica_id=rank)
        else:
            local = tensor.chunk(ranks, dim=dimension)[rank].contiguous()
            state[key] = ShardedTensor.from_rank_offsets(key, local, (dimension, rank, ranks))
    state["extra"] = ShardedObject("decoder.layers.0.mlp._extra_state", {"a": [1]}, (1,), (0,), replica_id=rank)
    return state


def write(job: dict[str, Any], rank: int, rendezvous: str) -> None:
    """One rank of one job."""
    import torch
    from megatron.core import dist_checkpointing
    from safetensors.torch import load_file

    ranks = job["split"]
    torch.distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=ranks)
    output = Path(job["output"])
    if rank == 0:
        output.mkdir(parents=True)
    torch.distributed.barrier()
    state = sharded_state(load_file(job["tensors"]), rank, ranks)
    dist_checkpointing.save(state, str(output), async_strategy="mcore")
    torch.distributed.barrier()


def main() -> None:
    """Forks the ranks of each job after a single import of Megatron."""
    import megatron.core.dist_checkpointing  # noqa: F401 before the fork

    from megatron_hybrid import cpu_backend

    cpu_backend.enable()
    for job in json.loads(Path(sys.argv[1]).read_text()):
        with tempfile.TemporaryDirectory() as folder:
            children = []
            for rank in range(job["split"]):
                child = os.fork()
                if child == 0:
                    write(job, rank, f"{folder}/rendezvous")
                    sys.stdout.flush()
                    os._exit(0)  # an exception ends the child with a traceback and status 1
                children.append(child)
            if any(os.waitpid(child, 0)[1] for child in children):
                sys.exit(f"writing {job['output']} failed")


if __name__ == "__main__":
    main()
