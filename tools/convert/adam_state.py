"""Adam's state on its way between OLMo-core, which keeps it per parameter, and Megatron's distributed optimizer.

The moments and the step are the same numbers in both: after N steps both have N, and both correct the bias by it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron_hybrid.tools.cli import ToolError
from megatron_hybrid.tools.convert.olmo_core import OlmoCoreSource
from megatron_hybrid.tools.convert.source import EXP_AVG, EXP_AVG_SQ, PARAM, Source

if TYPE_CHECKING:
    from megatron_hybrid.tools.convert.to_megatron import ImportOptions

STATES = (PARAM, EXP_AVG, EXP_AVG_SQ)  # the fp32 parameter and its moments, as Megatron stores them
ADAM_METADATA = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": False,
}
BETAS, EPSILON = (0.9, 0.95), 1e-8  # Ai2's, and the presets'


@dataclass(frozen=True)
class AdamState:
    """What Megatron wants to know besides tensors. It finds its parameter groups by their learning rates and decay."""

    step: int
    global_batch_size: int
    lr: float
    min_lr: float
    weight_decay: float

    @property
    def consumed_samples(self) -> int:
        """Sequences seen so far."""
        return self.step * self.global_batch_size

    def flags(self) -> list[str]:
        """The training flags that belong to it. The schedule is the command line's; the steps done are kept."""
        values = {
            "lr": self.lr,
            "min-lr": self.min_lr,
            "weight-decay": self.weight_decay,
            "global-batch-size": self.global_batch_size,
        }
        words = [word for name, value in values.items() for word in (f"--{name}", str(value))]
        return [*words, "--override-opt-param-scheduler"]

    def common_state(self) -> dict[str, Any]:
        """The entries of Megatron's common state."""
        groups = [
            {
                "is_expert_parallel": False,
                "default_config": True,
                "is_decoupled_lr": False,
                "wd_mult": multiplier,
                "lr_mult": 1.0,
                "max_lr": self.lr,
                "min_lr": self.min_lr,
                "lr": self.lr,
                "betas": BETAS,
                "eps": EPSILON,
                "weight_decay": self.weight_decay * multiplier,
                "step": float(self.step),
            }
            for multiplier in (1.0, 0.0)
        ]
        schedule = {
            "max_lr": self.lr,
            "min_lr": self.min_lr,
            "lr_warmup_steps": 0,
            "lr_decay_style": "cosine",
            "lr_decay_steps": 1,
            "num_steps": self.consumed_samples,
            "start_wd": self.weight_decay,
            "end_wd": self.weight_decay,
            "wd_incr_style": "constant",
            "wd_incr_steps": 1,
        }
        sharding = {"param_state_sharding_type": ADAM_METADATA["distrib_optim_sharding_type"]}
        return {"optimizer": {"optimizer": {"param_groups": groups}, **sharding}, "opt_param_scheduler": schedule}


def adam_state(source: Source, options: ImportOptions) -> AdamState:
    """Adam's state in a source; ToolError if it is not whole, or the batch size that the schedule needs is missing."""
    assert isinstance(source, OlmoCoreSource)
    if options.global_batch_size is None or options.global_batch_size < 1:
        raise ToolError(
            f"--global-batch-size {options.global_batch_size}: --optimizer needs the sequences per step of the run, "
            "by which Megatron counts its schedule"
        )
    step = source.check_optimizer()
    if step < 1 or step != int(step):
        raise ToolError(f"{source.folder}: optimizer step {step:g}, legal: a whole number above 0")
    return AdamState(int(step), options.global_batch_size, options.lr, options.min_lr, options.weight_decay)
