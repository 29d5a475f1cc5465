"""Every flag of the plugin, once: one dataclass, registered in Megatron's own parser.

Everything else (sizes, parallelism, schedule, data) is Megatron's flags. The defaults are the released OLMo-Hybrid.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args, get_type_hints

KEEPS_STATES = "--gdn-states-every {}: --gdn-keep-intermediates keeps every state already; leave one of them out"


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
    gdn_backend: Literal["auto", "triton", "reference", "fla"] = _flag(
        "auto",
        "kernels of Gated DeltaNet: triton ('auto' on a GPU; bf16 or fp16), the PyTorch reference ('auto' on CPU), "
        "or flash-linear-attention, where installed, to measure against",
    )
    gdn_states_every: int = _flag(
        0,
        "triton kernels: keep the state entering every n-th chunk of 64 tokens for the backward pass instead of "
        "computing all again; 0 keeps none (least memory), 1 all",
    )
    gdn_keep_intermediates: bool = _flag(
        False,
        "triton kernels: keep all that the backward pass reads of the forward pass, states included, instead of "
        "computing it again: the fastest, and the most memory",
    )
    gdn_norm_epsilon: float = _flag(1e-5, "epsilon of the Gated DeltaNet output norm; all others: --norm-epsilon")
    pipeline_layout: str = _flag(
        "pattern",
        "'pattern': pipeline stages as --hybrid-layer-pattern has them; 'auto': balance them by FLOPs, 'auto:V' with V "
        "virtual stages per pipeline rank (the pattern then has no |)",
    )
    instance_data: str = _flag(
        "",
        "train on instances of fixed length in one seeded order that knows nothing of ranks: an index of tools.mix "
        "(STAGE.instances.npy), a list of label,path lines (.txt), a mixture (.yaml), a folder of tools.preprocess or "
        "of raw .npy files, a raw file, a glob, or a .bin/.idx prefix; empty: Megatron's GPTDataset on --data-path",
    )
    instance_valid_data: str = _flag("", "validation data, of the same kinds; read in its own order")
    instance_root: str = _flag("", "folder that relative paths of lists and mixtures start at")
    instance_tokenizer_dir: str = _flag("allenai/dolma2-tokenizer", "what {TOKENIZER} in paths of lists stands for")
    instance_dtype: Literal["uint32", "uint16"] = _flag("uint32", "of the ids in raw files")
    instance_epochs: int = _flag(1, "passes over --instance-data that training may make; more samples are refused")
    instance_shuffle: bool = _flag(True, "shuffle instances; else their order in the data")
    instance_packing: Literal["fixed", "best_fit"] = _flag(
        "fixed", "cut files into instances, or pack whole documents by best-fit-decreasing, padding the rest"
    )
    instance_group_files: int = _flag(1, "with --instance-packing best_fit, files whose documents are packed together")
    instance_file_seed: int = _flag(-1, "put the files in an order drawn with this seed first; -1: as listed")
    instance_label_mask: str = _flag(
        "", "'A:B': the file whose name has B where a raw file's has A holds one byte per token, 1 for labels"
    )
    mixture_tokens: int = _flag(0, "tokens of a mixture .yaml that names no requested_tokens")
    data_seed: int = _flag(-1, "seed of the order of --instance-data; -1: --seed")
    document_masking: bool = _flag(False, "documents of a row do not see each other: attention and state start afresh")
    repetition_filter: bool = _flag(
        False, "no loss from instances of --instance-data in which an n-gram of 1 to 13 ids stands 32 times in a row"
    )

    weight_decay_on: Literal["all_but_embedding", "matrices"] = _flag(
        "all_but_embedding",
        "what --weight-decay applies to: everything but the input embedding (the released model), or 'matrices' and "
        "convolutions, the embedding with them, as Megatron does",
    )
    z_loss: float = _flag(
        1e-5, "weight of the squared logsumexp of the logits, added to the loss; 'lm loss' is without; 0 for none"
    )
    loss_chunk_tokens: int = _flag(
        0,
        "compute logits for so many tokens of a microbatch at a time, forward and again backward, for sequences whose "
        "logits do not fit; 0 for all at once",
    )
    last_target: bool = _flag(
        False, "predict the token after a sample too, as Megatron does; OLMo has 8,191 targets in a sample of 8,192"
    )
    skip_step: bool = _flag(
        True,
        "leave out an update whose loss or gradient norm exceeds the mean of the last 128 steps by 6 standard "
        "deviations, or is not finite",
    )
    log_health: bool = _flag(
        True,
        "log decay, saturated beta and state norms of Gated DeltaNet layers, and gradient norms of both kinds of mixer",
    )
    peak_tflops: float = _flag(
        0.0, "dense bf16 peak of a GPU in TFLOP/s, for MFU; 0: the data sheet's of the GPU that is found"
    )
    wsds_periods: str = _flag(
        "",
        "WSD-S: ends of the periods in iterations, comma-separated, the last --train-iters; each decays to --min-lr in "
        "its last tenth and the next starts at --lr again; with --lr-decay-style WSD",
    )

    keep_moments: bool = _flag(
        False,
        "a stage's first start from --pretrained-checkpoint takes Adam's moments and step counts from there too, as "
        "midtraining and long context did; iteration, schedule, samples and random state start anew",
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
        if self.gdn_states_every < 0:
            raise ValueError(f"--gdn-states-every {self.gdn_states_every}: must be 0 or more; nearest legal: 0")
        if self.gdn_states_every and self.gdn_keep_intermediates:
            raise ValueError(KEEPS_STATES.format(self.gdn_states_every))
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
