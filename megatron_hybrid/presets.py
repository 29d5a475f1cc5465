"""Named sets of Megatron flags: data, not code. `True` is a flag without a value, a list a flag with several.

Any flag on the command line replaces the preset's; `--print-args` prints what a preset stands for.
"""

from __future__ import annotations

from collections.abc import Mapping

from megatron_hybrid.ladder import KINDS, ladder
from megatron_hybrid.ladder import SIZES as LADDER_SIZES
from megatron_hybrid.stages import stages

FlagValue = str | int | float | bool | list[str]
Flags = Mapping[str, FlagValue]

#: What every model of the family shares (OLMo-core HEAD, transformers' OlmoHybridConfig).
_FAMILY: Flags = {
    "normalization": "RMSNorm",
    "norm-epsilon": 1e-6,
    "swiglu": True,
    "disable-bias-linear": True,
    "untie-embeddings-and-output-weights": True,
    "position-embedding-type": "rope",
    "rotary-base": 500000,
    "attention-dropout": 0.0,
    "hidden-dropout": 0.0,
    "init-method-std": 0.02,
    "make-vocab-size-divisible-by": 128,
    "calculate-per-token-loss": True,  # the mean over all tokens of the batch, not the mean of microbatch means
    "no-create-attention-mask-in-dataloader": True,
}

#: Ai2's optimizer and loss (OLMo-core), and checkpoints that can be resumed under any split.
_TRAINING: Flags = {
    "optimizer": "adam",
    "adam-beta1": 0.9,
    "adam-beta2": 0.95,
    "adam-eps": 1e-8,
    "weight-decay": 0.1,
    "clip-grad": 1.0,
    "lr-decay-style": "cosine",
    "seed": 34521,
    "weight-decay-on": "all_but_embedding",
    "z-loss": 1e-5,
    "skip-step": True,
    # It would end the run at the first NaN: SkipStep leaves such a step out, --max-nonfinite-steps ends the run.
    "no-check-for-nan-in-loss-and-grad": True,
    "no-last-target": True,
    "ckpt-format": "torch_dist",
    "dist-ckpt-optim-fully-reshardable": True,
}

_AT_SCALE: Flags = {
    "bf16": True,
    "use-distributed-optimizer": True,
    "save-interval": 1000,
    "eval-interval": 10000,
    "eval-iters": 10,
    "log-interval": 10,
}

_OPTIMIZER_7B: Flags = {
    **_TRAINING,
    "lr": 3e-4,
    "min-lr": 3e-5,
    "lr-warmup-iters": 2000,
    "train-iters": 1414078,
    "micro-batch-size": 1,
    "global-batch-size": 512,
    **_AT_SCALE,
}

_OLMO_HYBRID_7B: Flags = {
    **_FAMILY,
    "hybrid-layer-pattern": "GGG*" * 8,
    "num-layers": 32,
    "hidden-size": 3840,
    "ffn-hidden-size": 11008,
    "num-attention-heads": 30,
    "kv-channels": 128,
    "linear-num-key-heads": 30,
    "linear-num-value-heads": 30,
    "linear-key-head-dim": 96,
    "linear-value-head-dim": 192,
    "linear-conv-kernel-dim": 4,
    "seq-length": 8192,
    "max-position-embeddings": 8192,
    "spec": ["megatron_hybrid.layer_specs.olmo_hybrid", "olmo_hybrid_stack_spec"],
    **_OPTIMIZER_7B,
}

_OLMO3_7B: Flags = {
    **_FAMILY,
    "hybrid-layer-pattern": "*" * 32,
    "num-layers": 32,
    "hidden-size": 4096,
    "ffn-hidden-size": 11008,
    "num-attention-heads": 32,
    "kv-channels": 128,
    "window-size": "4095,0",
    "window-attn-skip-freq": "4",
    "seq-length": 8192,
    "max-position-embeddings": 8192,
    "spec": ["megatron_hybrid.layer_specs.olmo3", "olmo3_stack_spec"],
    **_OPTIMIZER_7B,
}

#: Trains in minutes on two CPU cores and keeps the 7B's awkward properties: a head count that is no power of two,
#: V = 2·K with K not 64 or 128, an FFN width not tied to the hidden size, two periods of the pattern.
_OLMO_HYBRID_TINY: Flags = {
    **_FAMILY,
    "hybrid-layer-pattern": "GGG*" * 2,
    "num-layers": 8,
    "hidden-size": 192,
    "ffn-hidden-size": 528,
    "num-attention-heads": 6,
    "kv-channels": 32,
    "linear-num-key-heads": 6,
    "linear-num-value-heads": 6,
    "linear-key-head-dim": 24,
    "linear-value-head-dim": 48,
    "linear-conv-kernel-dim": 4,
    "seq-length": 256,
    "max-position-embeddings": 256,
    "spec": ["megatron_hybrid.layer_specs.olmo_hybrid", "olmo_hybrid_stack_spec"],
    **_TRAINING,
    "lr": 3e-3,
    "min-lr": 3e-4,
    "lr-warmup-iters": 10,
    "train-iters": 100,
    "micro-batch-size": 4,
    "global-batch-size": 8,
    "save-interval": 100,
    "eval-interval": 100,
    "eval-iters": 4,
    "log-interval": 1,
}

PRESETS: Mapping[str, Flags] = {
    "olmo-hybrid-7b": _OLMO_HYBRID_7B,
    "olmo-hybrid-tiny": _OLMO_HYBRID_TINY,
    "olmo3-7b": _OLMO3_7B,
    **stages(_OLMO_HYBRID_7B),
    **ladder(_FAMILY, {**_TRAINING, **_AT_SCALE}),
}

#: All names, the ladder's in short.
NAMES = ", ".join([name for name in sorted(PRESETS) if not name.startswith("ladder-")]) + (
    f", ladder-SIZE-KIND with SIZE of {', '.join(LADDER_SIZES)} and KIND of {', '.join(KINDS)}"
)
