"""A flat list of flags on so many GPUs as numbers, refused where it cannot run.

Letters in the package: D hidden, F FFN width, H value heads (Hk key heads), K key dim, V value dim, h attention heads
(hk key/value heads), d their dim, R vocabulary rows, n tokens of a microbatch on one rank (all of them: before sequence
parallelism), m microbatches of a pipeline.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from megatron_hybrid import flops, fp8
from megatron_hybrid.flags import FlagError
from megatron_hybrid.parallel import padded_sizes
from megatron_hybrid.planning.hardware import CHECKED_KERNELS, CHECKED_TRITON, Gpu

_COUNTS = (
    *(("tensor-model-parallel-size", 1), ("pipeline-model-parallel-size", 1), ("context-parallel-size", 1)),
    *(("micro-batch-size", 1), ("global-batch-size", 0), ("seq-length", 0), ("train-iters", 0)),
    *(("loss-chunk-tokens", 0), ("gdn-states-every", 0), ("recompute-num-layers", 1), ("vocab-size", 0)),
    *(("padded-vocab-size", 0), ("num-distributed-optimizer-instances", 1)),
)
_SWITCHES = (
    *("bf16", "fp16", "use-distributed-optimizer", "sequence-parallel", "fp8-param-gather"),
    *("recompute-activations", "overlap-grad-reduce", "overlap-param-gather", "grad-reduce-in-bf16"),
    *("use-precision-aware-optimizer", "no-gradient-accumulation-fusion"),
    *("fp4-param-gather", "init-model-with-meta-device"),
)
#: Bytes of a number, by Megatron's name.
_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 1}
_PADDED = ": not supported where tensor parallelism pads, as --tensor-model-parallel-size {} does here; leave it out"
_OPTIMIZER_DTYPES = ("main-grads-dtype", "main-params-dtype", "exp-avg-dtype", "exp-avg-sq-dtype")


@dataclass(frozen=True)
class Job:
    """One rank's share of the work follows from these. sizes: the model's own; `held`: padded for `tp`.

    segments: layers of each pipeline segment; segment s is on pipeline rank s mod pp. local: Megatron's own linears and
    PyTorch, as on a CPU, instead of Transformer Engine's. recompute: names of --recompute-modules, or `full`.
    """

    sizes: flops.Sizes
    segments: tuple[str, ...]
    sequence_tokens: int
    micro_batch: int
    global_batch: int
    tp: int = 1
    pp: int = 1
    cp: int = 1
    dp: int = 1
    sequence_parallel: bool = False
    half: bool = True
    distributed_optimizer: bool = True
    optimizer_instances: int = 1
    grad_bytes: int = 4
    fused_gradients: bool = True  # --gradient-accumulation-fusion
    moment_bytes: int = 8  # both
    master_bytes: int = 4
    recompute: tuple[str, ...] = ()
    recompute_layers: int = 1
    fp8: str = ""  # the recipe; nvfp4 is planned as one of FP8
    fp8_param_gather: bool = False
    overlap: bool = False
    states_every: int = 0
    keep_intermediates: bool = False
    loss_chunk_tokens: int = 0
    z_loss: bool = True
    rotary: bool = True
    qk_norm: str = "full"
    norms: str = "released"
    gdn_exchange: str = "auto"
    gdn_backend: str = "auto"
    local: bool = False

    @classmethod
    def from_flags(cls, flags: Sequence[str], gpus: int) -> Job:
        """Raises FlagError where these GPUs cannot run these flags; `flags.check` has what does not depend on GPUs."""
        v = _peek(flags)
        for name in ("seq_length", "global_batch_size"):
            if getattr(v, name) < 1:
                raise FlagError(f"--{name.replace('_', '-')}: missing; a plan needs it")
        tp, pp, cp = v.tensor_model_parallel_size, v.pipeline_model_parallel_size, v.context_parallel_size
        dp = data_parallel_size(gpus, tp, pp, cp)
        microbatch_count(v.global_batch_size, v.micro_batch_size, dp)
        try:
            sizes = flops.Sizes.from_flags(flags)
        except flops.SizeError as error:
            raise FlagError(str(error)) from None
        _check_vocabulary(v)
        granularity = "selective" if v.recompute_activations else v.recompute_granularity
        modules = {"full": ("full",), "selective": tuple(v.recompute_modules or ("core_attn",))}.get(granularity, ())
        job = cls(
            sizes=sizes,
            segments=_segments(v.hybrid_layer_pattern, pp),
            sequence_tokens=v.seq_length,
            micro_batch=v.micro_batch_size,
            global_batch=v.global_batch_size,
            tp=tp,
            pp=pp,
            cp=cp,
            dp=dp,
            sequence_parallel=v.sequence_parallel and tp > 1,
            half=v.bf16 or v.fp16,
            distributed_optimizer=v.use_distributed_optimizer,
            optimizer_instances=v.num_distributed_optimizer_instances,
            **_optimizer_bytes(v),
            fused_gradients=not v.no_gradient_accumulation_fusion,
            recompute=modules,
            recompute_layers=v.recompute_num_layers if v.recompute_method != "block" else 1,
            fp8="nvfp4" if v.fp4_format else v.fp8_recipe if v.fp8_format else "",
            fp8_param_gather=v.fp8_param_gather or v.fp4_param_gather,
            overlap=v.overlap_grad_reduce,
            states_every=v.gdn_states_every,
            keep_intermediates=v.gdn_keep_intermediates,
            loss_chunk_tokens=v.loss_chunk_tokens,
            z_loss=v.z_loss > 0,
            rotary=v.position_embedding_type != "none",
            qk_norm=v.qk_norm_width,
            norms=v.norm_placement,
            gdn_exchange=v.gdn_cp_comm_type,
            gdn_backend=v.gdn_backend,
            local=v.transformer_impl == "local",
        )
        check_fp8(job)
        if v.init_model_with_meta_device and job.held != sizes:
            raise FlagError("--init-model-with-meta-device" + _PADDED.format(tp))
        return job

    @cached_property
    def held(self) -> flops.Sizes:
        """Sizes with the padding that `tp` needs."""
        s = self.sizes
        padded = padded_sizes.Sizes(s.heads, s.kv_heads, s.ffn, s.gdn_key_heads, s.gdn_value_heads).padded(self.tp)
        return replace(
            s,
            heads=padded.heads,
            kv_heads=padded.groups,
            ffn=padded.ffn,
            gdn_key_heads=padded.gdn_key_heads,
            gdn_value_heads=padded.gdn_value_heads,
            vocabulary_rows=padded_sizes.rounded_up(s.vocabulary_rows, self.tp, padded_sizes.ALIGNMENT),
        )

    @property
    def gpus(self) -> int:
        return self.tp * self.pp * self.cp * self.dp

    @property
    def tokens(self) -> int:
        """n"""
        return self.micro_batch * self.sequence_tokens // self.cp

    @property
    def microbatches(self) -> int:
        """m"""
        return self.global_batch // (self.dp * self.micro_batch)

    @property
    def chunks(self) -> int:
        """Virtual stages of a pipeline rank."""
        return len(self.segments) // self.pp

    @property
    def layers(self) -> str:
        return "".join(self.segments)

    @property
    def optimizer_shards(self) -> int:
        return max(1, self.dp * self.cp // self.optimizer_instances) if self.distributed_optimizer else 1


def _optimizer_bytes(v: argparse.Namespace) -> dict[str, int]:
    """Of a 16-bit parameter: its gradient, both moments, and its fp32 master beside it."""
    if not v.use_precision_aware_optimizer:
        return {"grad_bytes": 2 if v.grad_reduce_in_bf16 and v.bf16 else 4}
    return {
        "grad_bytes": _BYTES[v.main_grads_dtype],
        "moment_bytes": _BYTES[v.exp_avg_dtype] + _BYTES[v.exp_avg_sq_dtype],
        "master_bytes": _BYTES[v.main_params_dtype],  # whole: training/hooks.py
    }


def data_parallel_size(gpus: int, tp: int, pp: int, cp: int) -> int:
    """Raises FlagError: GPUs that the other parallel sizes do not divide."""
    split = tp * pp * cp
    if gpus < 1 or gpus % split:
        nearest = max(1, gpus // split) * split  # one has no more GPUs than one has
        legal = [n for n in range(1, 2 * tp) if gpus > 0 and gpus % (n * pp * cp) == 0]
        other = f", or --tensor-model-parallel-size {min(legal, key=lambda n: abs(n - tp))}" if legal else ""
        raise FlagError(
            f"--gpus {gpus}: must be a multiple of --tensor-model-parallel-size {tp} times "
            f"--pipeline-model-parallel-size {pp} times --context-parallel-size {cp}, {split}; "
            f"nearest legal: {nearest}{other}"
        )
    return gpus // split


def microbatch_count(global_batch: int, micro_batch: int, dp: int) -> int:
    """Raises FlagError: a global batch that microbatches do not make up."""
    step = dp * micro_batch
    if micro_batch < 1:
        raise FlagError(f"--micro-batch-size {micro_batch}: must be at least 1; nearest legal: 1")
    if global_batch % step:
        nearest = max(1, round(global_batch / step)) * step
        fitting = [n for n in range(micro_batch, 0, -1) if global_batch % (dp * n) == 0]
        smaller = f", or --micro-batch-size {fitting[0]}" if fitting else ""
        raise FlagError(
            f"--global-batch-size {global_batch}: must be a multiple of {dp} data-parallel ranks times "
            f"--micro-batch-size {micro_batch}, {step}; nearest legal: {nearest}{smaller}"
        )
    return global_batch // step


def _check_vocabulary(v: argparse.Namespace) -> None:
    if v.padded_vocab_size and v.vocab_size and v.padded_vocab_size < v.vocab_size:
        raise FlagError(
            f"--padded-vocab-size {v.padded_vocab_size}: smaller than --vocab-size {v.vocab_size}; nearest legal: "
            f"{-(-v.vocab_size // 128) * 128}"
        )


def _segments(pattern: str, pp: int) -> tuple[str, ...]:
    """The pattern's own, or without `|` one of equal length for each pipeline rank."""
    if "|" in pattern or pp == 1:
        return tuple(pattern.split("|"))
    length = len(pattern) // pp
    return tuple(pattern[i * length : (i + 1) * length] for i in range(pp))


def check_microbatches(job: Job) -> None:
    """Raises FlagError: microbatches that Megatron's interleaved schedule cannot group."""
    if job.chunks > 1 and job.microbatches % job.pp:
        step = job.pp * job.dp * job.micro_batch
        raise FlagError(
            f"--global-batch-size {job.global_batch}: gives each pipeline {job.microbatches} microbatches; with "
            f"{job.chunks} virtual stages they must be a multiple of --pipeline-model-parallel-size {job.pp}; nearest "
            f"legal: {max(1, round(job.global_batch / step)) * step}"
        )


def check_gpu(job: Job, gpu: Gpu) -> None:
    """Raises FlagError: what this GPU does not have."""
    legal = fp8.possible(gpu.capability)
    if job.fp8 and job.fp8 not in legal:
        nearest = [recipe for recipe in fp8.RECIPES if recipe in legal][-1]
        flag = "--fp4-format e2m1" if job.fp8 == "nvfp4" else f"--fp8-recipe {job.fp8}"
        raise FlagError(f"{flag}: not on {gpu.name}; nearest legal: {nearest}; legal: {', '.join(legal)}")
    if _runs_triton(job) and not job.half:
        raise FlagError(
            f"--gdn-backend {job.gdn_backend}: on a GPU it takes bf16 or fp16; add --bf16, or take "
            "--gdn-backend reference"
        )


def _runs_triton(job: Job) -> bool:
    return "G" in job.layers and job.gdn_backend in ("auto", "triton")


def kernel_warning(job: Job, gpu: Gpu) -> str:
    """One line where training would be refused for want of checked kernels, else nothing."""
    key_dim, value_dim = job.sizes.key_dim, job.sizes.value_dim
    if not _runs_triton(job) or (gpu.capability, key_dim, value_dim) in CHECKED_KERNELS:
        return ""
    legal = ", ".join(f"{k}/{v} on sm_{major}{minor}" for (major, minor), k, v in sorted(CHECKED_KERNELS))
    return (
        f"warning: --gdn-backend {job.gdn_backend}: no checked kernels for K/V {key_dim}/{value_dim} on {gpu.name} "
        f"(sm_{''.join(map(str, gpu.capability))}): training is refused there until kernels/configs.py has the entry "
        f"that tools.tune_kernels prints, or takes --gdn-backend reference; checked (triton {CHECKED_TRITON}): {legal}"
    )


def check_fp8(job: Job) -> None:
    """Raises fp8.Fp8Error: a width, a number of tokens on a rank or padding that the recipe cannot take."""
    s = job.sizes
    if job.fp8_param_gather and job.held != s:
        flag = "--fp4-param-gather" if job.fp8 == "nvfp4" else "--fp8-param-gather"
        raise fp8.Fp8Error(flag + _PADDED.format(job.tp))
    settings = {
        "fp8": job.fp8,
        "fp8_recipe": job.fp8,
        "hidden_size": s.hidden,
        "ffn_hidden_size": s.ffn,
        "num_attention_heads": s.heads,
        "num_query_groups": s.kv_heads,
        "kv_channels": s.head_dim,
        "linear_num_key_heads": s.gdn_key_heads,
        "linear_num_value_heads": s.gdn_value_heads,
        "linear_key_head_dim": s.key_dim,
        "linear_value_head_dim": s.value_dim,
        "gdn_output_gate": s.output_gate,
        "tensor_model_parallel_size": job.tp,
        "context_parallel_size": job.cp,
        "sequence_parallel": job.sequence_parallel,
        "micro_batch_size": job.micro_batch,
        "seq_length": job.sequence_tokens,
    }
    fp8.check_widths(settings)
    fp8.check_tokens(settings)


def _peek(flags: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name, number in _COUNTS:
        parser.add_argument(f"--{name}", type=int, default=number)
    for name in _SWITCHES:
        parser.add_argument(f"--{name}", action="store_true")
    parser.add_argument("--gdn-keep-intermediates", action=argparse.BooleanOptionalAction, default=False)
    for name, text in (
        *(("hybrid-layer-pattern", ""), ("position-embedding-type", "learned_absolute"), ("qk-norm-width", "full")),
        *(("norm-placement", "released"), ("gdn-cp-comm-type", "auto"), ("transformer-impl", "transformer_engine")),
        ("gdn-backend", "auto"),
        *(
            ("fp4-format", ""),
            ("fp8-format", ""),
            ("fp8-recipe", "delayed"),
            ("recompute-granularity", ""),
            ("recompute-method", ""),
        ),
    ):
        parser.add_argument(f"--{name}", default=text)
    for name in _OPTIMIZER_DTYPES:
        parser.add_argument(f"--{name}", default="fp32", choices=_BYTES)
    parser.add_argument("--recompute-modules", nargs="*")
    parser.add_argument("--z-loss", type=float, default=1e-5)
    try:
        return parser.parse_known_args(list(flags))[0]
    except argparse.ArgumentError as error:
        raise FlagError(f"{error.argument_name}: {error.message}") from None
