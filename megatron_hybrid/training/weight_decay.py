"""Which parameters decay, through Megatron's own parameter-group overrides.

Megatron exempts everything with one dimension (norms, A_log, dt_bias) and decays the input embedding. The released
run did the opposite on both counts: everything decays but the input embedding.
"""

from __future__ import annotations

from typing import Any, Literal

from megatron.core.optimizer import get_standard_config_overrides
from megatron.core.optimizer.optimizer_config import ParamKey

Scope = Literal["all_but_embedding", "matrices"]

#: Of the input embedding in a HybridModel, whatever wraps it.
EMBEDDING = "*embedding.word_embeddings.weight"

Overrides = dict[ParamKey, dict[str, Any]]


def overrides(given: Overrides, config: Any, scope: Scope) -> Overrides:
    """What the trainer gives to the optimizer, with the exemption from decay that `scope` asks for.

    Args:
        given: the trainer's overrides: Megatron's standard ones and others (other learning rates), which stay.
        config: Megatron's OptimizerConfig.
        scope: `all_but_embedding`, or `matrices`, Megatron's choice.

    Raises:
        RuntimeError: Megatron's standard overrides are not the one exemption known here.
    """
    if scope == "matrices":
        return given
    standard = [key for key, values in get_standard_config_overrides(config).items() if "wd_mult" in values]
    exempt = [key for key, values in given.items() if "wd_mult" in values]
    if len(standard) != 1 or exempt != standard or given[standard[0]] != {"wd_mult": 0.0}:
        raise RuntimeError(
            "--weight-decay-on all_but_embedding: Megatron exempts other parameters from weight decay than it did in "
            f"0.19.2 ({exempt}); install the pinned version, or use --weight-decay-on matrices"
        )
    kept = {key: values for key, values in given.items() if key not in exempt}
    return {**kept, ParamKey(name=EMBEDDING): {"wd_mult": 0.0}}
