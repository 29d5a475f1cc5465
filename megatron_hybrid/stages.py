"""The released run's later stages as presets, each as what differs from pretraining.

Tokens per step, learning rates, schedules, lengths, warm-up, seeds and positions: OLMo-core's and open-instruct's
scripts for OLMo-Hybrid 7B.
"""

from __future__ import annotations

from collections.abc import Mapping

#: 100B tokens at 4,194,304 a step.
_HUNDRED_BILLION = 23842

_LINEAR = {"lr-decay-style": "linear", "min-lr": 0.0}

_MIDTRAIN = {
    **_LINEAR,
    "lr": 2.0712352850360292e-4,
    "lr-warmup-iters": 0,
    "train-iters": _HUNDRED_BILLION,
    "keep-moments": True,
}

_LONG_CONTEXT = {
    **_MIDTRAIN,
    "lr-warmup-iters": 200,
    "seq-length": 65536,
    "max-position-embeddings": 65536,
    "global-batch-size": 64,
    "loss-chunk-tokens": 2048,
}

#: Rotary embeddings are left out from the first step on.
_DROPE = {"position-embedding-type": "none"}

#: The alternative that was not released: OLMo-core's YaRN, attention factor 0.1·ln(8) + 1 (Megatron's default).
_YARN = {
    "position-embedding-type": "yarn",
    "rotary-scaling-factor": 8.0,
    "yarn-original-max-position-embeddings": 8192,
    "yarn-beta-fast": 32.0,
    "yarn-beta-slow": 1.0,
    "no-rope-fusion": True,  # Transformer Engine's kernel has no attention factor
}

_SFT = {
    **_LINEAR,
    **_DROPE,
    "lr": 2.5e-5,
    "weight-decay": 0.0,
    "z-loss": 0.0,
    "seq-length": 32768,
    "max-position-embeddings": 32768,
    "global-batch-size": 64,
    "loss-chunk-tokens": 2048,
    "seed": 34521,
}

#: Two epochs; of the second, 3.4B tokens at 2,097,152 a step, only the tokens are published.
_SFT_STEPS = {"think": 46412, "instruct": 3243}


def _sft(steps: int) -> dict[str, object]:
    return {**_SFT, "train-iters": steps, "lr-warmup-iters": round(0.03 * steps)}


def stages(base: Mapping) -> dict[str, Mapping]:
    """The presets. base: the pretraining preset."""
    changes: dict[str, Mapping] = {
        "midtrain-1": {**_MIDTRAIN, "seed": 1337},
        "midtrain-2": {**_MIDTRAIN, "seed": 683},
        "long-context": {**_LONG_CONTEXT, **_DROPE},
        "long-context-yarn": {**_LONG_CONTEXT, **_YARN},
        **{f"sft-{name}": _sft(steps) for name, steps in _SFT_STEPS.items()},
    }
    return {f"olmo-hybrid-7b-{name}": {**base, **change} for name, change in changes.items()}
