"""Megatron's flags that the plugin's data, loss and start do not carry out: ignored without a word, or a crash later.

Those of another model are in `architecture.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from megatron_hybrid.architecture import given_flags, number

Given = dict[str, list[str]]


def _always(given: Given) -> bool:
    return True


@dataclass(frozen=True)
class Refusal:
    """A flag that does not do here what it says.

    Args:
        reason: what would happen.
        instead: what to give, or to do.
        when: whether it is so with the other flags of the run.
    """

    flag: str
    reason: str
    instead: str = "leave it out"
    when: Callable[[Given], bool] = _always

    def __str__(self) -> str:
        return f"{self.reason}; {self.instead}"


def _is_on(given: Given, flag: str) -> bool:
    """Of a flag that has a --no- form: the later one counts."""
    return [name for name in given if name in (flag, f"no-{flag}")][-1:] == [flag]


def _value(given: Given, flag: str, default: str = "") -> str:
    return " ".join(given.get(flag, [default]))


def _with_instances(given: Given) -> bool:
    return bool(_value(given, "instance-data"))


def _unmasked(given: Given) -> bool:
    return not _is_on(given, "document-masking")


def _from_scratch(given: Given) -> bool:
    return "load" not in given or _is_on(given, "fresh")


def _from_scratch_without_fsdp(given: Given) -> bool:
    return _from_scratch(given) and not given.keys() & {"use-megatron-fsdp", "use-torch-fsdp2"}


def _post_normed(given: Given) -> bool:
    placement = _value(given, "norm-placement", "released")
    return placement == "post" or (placement == "released" and "*" in _value(given, "hybrid-layer-pattern"))


def _differ(flag: str, other: str, default: str) -> Callable[[Given], bool]:
    """Whether a flag has another number than `other`, which is `default` unless given."""
    return lambda given: number(_value(given, flag)) != number(_value(given, other, default))


_SEE_EACH_OTHER = "documents of a row would see each other all the same"
_MASK = "give --document-masking"
_BATCHES = "under tensor parallelism ranks would read different batches from then on, and the learning rate would lag"
_OUTLIERS = "leave it out: --skip-step leaves out updates that stand out"
_ONE_INIT = "every weight is drawn from the same truncated normal here, so it would be ignored"
_WIDTH = "its width is --init-method-std"
_MEMORY = "with no checkpoint to load the weights would be whatever the memory held"
_LOAD = "leave it out, or give --load FOLDER"
_QK = "with --weight-decay-on matrices it does nothing: Megatron looks for norms of other names"
_ALL = "leave it out, or take --weight-decay-on all_but_embedding"
_NO_ROWS = "the embedding would have no size"
_GRAPHS = "not tried; by reading, gradients of what modules/recompute.py computes again would be lost on replay"
_PADDING = "leave it out; --make-vocab-size-divisible-by 1 adds no rows"

REFUSALS = (
    # Data
    Refusal("dataloader-inter-document-masking", _SEE_EACH_OTHER, _MASK),
    Refusal("reset-attention-mask", _SEE_EACH_OTHER, _MASK, _unmasked),
    Refusal("reset-position-ids", "positions would run on over the ends of documents", _MASK, _unmasked),
    Refusal(
        "eod-mask-loss",
        "is for --data-path; in --instance-data the end of a document is a target",
        "leave it out, or mask labels with --instance-label-mask",
        _with_instances,
    ),
    Refusal(
        "last-target",
        "is for --data-path; no token comes after the last one of an instance",
        "leave it out",
        lambda given: _with_instances(given) and _is_on(given, "last-target"),
    ),
    Refusal(
        "data-seed",
        "is for --instance-data; the order of --data-path comes from --seed",
        "give that",
        lambda given: not _with_instances(given) and number(_value(given, "data-seed")) != -1,
    ),
    Refusal("fim-data", "samples would be as without it"),
    Refusal("sft", "samples would be as without it", "give --instance-data with --instance-label-mask"),
    Refusal(
        "full-validation",
        "validation on --instance-valid-data starts over where its data ends, so it would not end",
        "leave it out, and give --eval-iters",
        _with_instances,
    ),
    Refusal("iterations-to-skip", _BATCHES, _OUTLIERS),
    Refusal("result-rejected-tracker-filename", f"where it names iterations, {_BATCHES}", _OUTLIERS),
    # Loss
    Refusal("logits-load-dir", "the loss would be the plain cross entropy, without distillation"),
    Refusal(
        "logits-save-dir",
        "with --loss-chunk-tokens there are no whole logits to save",
        "take --loss-chunk-tokens 0",
        lambda given: number(_value(given, "loss-chunk-tokens", "0")) != 0,
    ),
    # Start
    Refusal(
        "use-checkpoint-args",
        "positions and spec would be those of the checkpoint against the command line, the epsilon and the plugin's "
        "flags not",
        "give the flags that it was trained with",
    ),
    Refusal(
        "use-rotary-position-embeddings",
        "would put rotary embeddings in the place of --position-embedding-type",
        "leave one of them out",
        lambda given: _value(given, "position-embedding-type", "rope") != "rope",
    ),
    Refusal(
        "embedding-init-method-std", _ONE_INIT, _WIDTH, _differ("embedding-init-method-std", "init-method-std", "0.02")
    ),
    Refusal("init-method-xavier-uniform", _ONE_INIT, _WIDTH),
    Refusal("no-initialization", _MEMORY, _LOAD, _from_scratch),
    Refusal("init-model-with-meta-device", _MEMORY, _LOAD, _from_scratch_without_fsdp),
    *(
        Refusal(name, _QK, _ALL, lambda given: _value(given, "weight-decay-on", "all_but_embedding") == "matrices")
        for name in ("apply-wd-to-qk-layernorm", "no-weight-decay-cond-type")
    ),
    *(
        Refusal(name, _NO_ROWS, _PADDING, lambda given: "padded-vocab-size" not in given)
        for name in ("no-pad-vocab-size", "disable-pad-vocab-size")
    ),
    Refusal("yaml-cfg", "holds none of the plugin's flags", "give its settings as flags"),
    # Parallelism and precision
    Refusal("cuda-graph-impl", _GRAPHS, when=lambda given: _value(given, "cuda-graph-impl") != "none"),
    Refusal("enable-cuda-graph", _GRAPHS),
    Refusal("external-cuda-graph", _GRAPHS),
    Refusal("defer-embedding-wgrad-compute", "hybrid models keep nothing to compute it from"),
    Refusal("hybrid-context-parallel", "batches here have no such split", "give --context-parallel-size"),
    Refusal(
        "tensor-parallel-num-weight-shards",
        "these layers are split by --tensor-model-parallel-size alone",
        "leave it out",
        _differ("tensor-parallel-num-weight-shards", "tensor-model-parallel-size", "1"),
    ),
    Refusal(
        "fp32-residual-connection",
        "layers that normalise after their branches would give fp32 to bf16 weights",
        "leave it out, or take --norm-placement pre",
        _post_normed,
    ),
)


def problems(flags: Sequence[str]) -> Iterator[str]:
    """One line for each flag that does not do here what it says, and for one whose absence does harm."""
    given = given_flags(flags)
    for refusal in REFUSALS:
        if refusal.flag in given and refusal.when(given):
            yield f"{' '.join([f'--{refusal.flag}', *given[refusal.flag]])}: {refusal}"
    if "calculate-per-token-loss" not in given:
        yield (
            "--calculate-per-token-loss: missing; without it --micro-batch-size and --context-parallel-size change "
            "how much a token counts: add it"
        )
