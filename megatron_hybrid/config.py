"""Every flag of the plugin, once: one dataclass, registered in Megatron's own parser.

Everything else (sizes, parallelism, schedule, data) is Megatron's flags. The defaults are the released OLMo-Hybrid.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args, get_type_hints


def _flag(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class HybridConfig:
    """The plugin's flags. `--gdn-norm-epsilon 1e-5` is the field `gdn_norm_epsilon`, and so on."""

    norm_placement: Literal["released", "pre", "post"] = _flag(
        "released",
        "where a layer normalises: 'released' before mixer and MLP in Gated DeltaNet layers and after them in "
        "attention layers; 'pre' before in all; 'post' after in all (what OLMo-core HEAD's scripts build)",
    )
    qk_norm_width: Literal["full", "head", "none"] = _flag(
        "full", "RMSNorm of q and k over the full projection width (OLMo), over each head, or not at all"
    )
    gdn_allow_neg_eigval: bool = _flag(
        True, "beta = 2 sigmoid(b), so that the state's transition may have negative eigenvalues; else sigmoid(b)"
    )
    gdn_output_gate: bool = _flag(True, "multiply the Gated DeltaNet output by silu of a gate projection")
    gdn_cp_comm_type: Literal["auto", "all_gather", "scan", "a2a"] = _flag(
        "auto",
        "context parallelism of Gated DeltaNet: pass states by all-gather or by a log-step scan ('auto': whichever "
        "should be faster), or exchange heads by all-to-all (Megatron's way; needs heads % (TP * CP) == 0)",
    )
    gdn_norm_epsilon: float = _flag(1e-5, "epsilon of the Gated DeltaNet output norm; all others: --norm-epsilon")
    pipeline_layout: str = _flag(
        "pattern",
        "'pattern': pipeline stages as --hybrid-layer-pattern has them; 'auto': balance them by FLOPs, 'auto:V' with V "
        "virtual stages per pipeline rank (the pattern then has no |)",
    )

    fresh: bool = _flag(
        False, "start from random weights; checkpoints in --save are moved aside first. For a job's first start only"
    )
    verify_checkpoint: bool = _flag(True, "compare every byte of the checkpoint to load with its manifest")
    verify_data: Literal["full", "size"] = _flag(
        "full", "hash every byte of the data at the start, shared among ranks; or only indexes and 'size's"
    )
    allow_data_change: bool = _flag(False, "go on although the data are not those that the checkpoint was made with")
    stop_file: str = _flag("", "a file that stops the run by being there (default: STOP in --save)")
    max_nonfinite_steps: int = _flag(
        5, "stop, with the samples named, after so many steps in a row without a finite gradient norm; 0 for never"
    )

    def __post_init__(self) -> None:
        if self.pipeline_layout != "pattern":
            raise ValueError(
                f"--pipeline-layout {self.pipeline_layout}: only megatron_hybrid.pretrain plans a layout; elsewhere "
                "paste what python -m megatron_hybrid.parallel.pipeline_layout prints"
            )

    @classmethod
    def add_to(cls, parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        """Register every field as a flag; usable as Megatron's `extra_args_provider`."""
        group = parser.add_argument_group("megatron_hybrid")
        types = get_type_hints(cls)
        for item in fields(cls):
            flag = "--" + item.name.replace("_", "-")
            text = f"{item.metadata['help']} (default: {item.default})".replace("%", "%%")  # argparse formats it
            if types[item.name] is bool:
                group.add_argument(flag, action=argparse.BooleanOptionalAction, default=item.default, help=text)
            elif choices := get_args(types[item.name]):
                group.add_argument(flag, choices=choices, default=item.default, help=text)
            else:
                group.add_argument(flag, type=types[item.name], default=item.default, help=text)
        return parser

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> HybridConfig:
        """The plugin's part of a parsed Megatron namespace."""
        return cls(**{item.name: getattr(args, item.name) for item in fields(cls)})
