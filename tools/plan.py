"""Whether a job can run, before a GPU is asked for, and which layouts are worth trying. Needs no GPU and no torch.

python -m megatron_hybrid.tools.plan check --gpu H100 --gpus 512 -- --preset olmo-hybrid-7b FLAGS
python -m megatron_hybrid.tools.plan search --gpu H100 --gpus 512 --preset olmo-hybrid-7b FLAGS
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_hybrid import flops
from megatron_hybrid.flags import FlagError, check, check_names, compose, print_report
from megatron_hybrid.fp8 import RECIPES, possible
from megatron_hybrid.parallel import pipeline_layout
from megatron_hybrid.planning import hardware, memory, search, traffic
from megatron_hybrid.planning.hardware import GPUS, RESERVED_GIB
from megatron_hybrid.planning.job import Job, check_gpu, check_microbatches, kernel_warning
from megatron_hybrid.planning.remedies import remedy
from megatron_hybrid.planning.search import Found
from megatron_hybrid.planning.timing import Measured
from megatron_hybrid.tools.cli import Parser

#: Flags that `search` chooses itself.
_CHOSEN = (
    *("--tensor-model-parallel-size", "--pipeline-model-parallel-size", "--context-parallel-size"),
    *("--sequence-parallel", "--pipeline-layout", "--micro-batch-size", "--recompute-granularity"),
    *("--recompute-activations", "--recompute-modules", "--recompute-method", "--recompute-num-layers"),
)

TOKENS_6T = 6e12


def check_job(flags: Sequence[str], gpu_name: str, gpus: int) -> str:
    """A short verdict on memory, and below it a warning where no kernels are checked for these GPUs.

    Raises:
        FlagError: what cannot run on these GPUs, or does not fit; one line.
    """
    gpu, job = GPUS[gpu_name], Job.from_flags(flags, gpus)
    check_gpu(job, gpu)
    check_microbatches(job)
    rank, needed = memory.fullest(job)
    room = gpu.memory_gib - RESERVED_GIB
    where = f"on pipeline rank {rank} " if job.pp > 1 else ""
    if needed.total > room * memory.GIB:
        raise FlagError(
            f"--gpu {gpu_name}: {needed.total / memory.GIB:.1f} GiB {where}do not fit in {room:g} GiB ({needed}); "
            f"{remedy(job, room * memory.GIB)}"
        )
    verdict = (
        f"fits: TP {job.tp}, PP {job.pp}, CP {job.cp}, DP {job.dp} on {gpus} {gpu_name}, {job.microbatches} "
        f"microbatches; of {room:g} GiB {where}{needed}"
    )
    return "\n".join(filter(None, (verdict, kernel_warning(job, gpu))))


def search_report(flags: Sequence[str], gpu_name: str, gpus: int, costs: Path | None, top: int) -> str:
    """Tables of the best layouts in bf16 and in FP8, and the best of each in full.

    Raises:
        FlagError: flags that the search chooses itself, nothing that fits, an unreadable table of costs.
    """
    chosen = [word for word in flags if word.split("=")[0] in _CHOSEN and word.split("=")[0] != "--micro-batch-size"]
    if chosen:
        raise FlagError(f"{chosen[0]}: `plan search` chooses it; leave it out, or use `plan check`")
    gpu, base = GPUS[gpu_name], Job.from_flags([*flags, "--micro-batch-size", "1"], 1)
    recipes = [base.fp8] if base.fp8 else ["", [recipe for recipe in RECIPES if recipe in possible(gpu.capability)][-1]]
    measured = _measured(costs, base) if costs else None
    found = search.search(base, gpus, gpu, recipes, measured)
    lines = [hardware.table(), ""]
    for recipe in recipes:
        best = [one for one in found if one.job.fp8 == recipe][:top]
        name = f"FP8 {recipe}" if recipe else "bf16"
        lines += [f"{name} on {gpus} {gpu_name}: {'the fastest that fit' if best else 'nothing fits'}"]
        lines += [*_table(best), "", *(_detail(best[0]) if best else ()), ""]
    times = "measured layer times" if measured else "published ceilings and shares of them (docs/planning.md)"
    lines += filter(None, [kernel_warning(base, gpu)])
    return "\n".join([*lines, f"times are predictions from {times}; no step of several GPUs was measured against them"])


def _measured(path: Path, base: Job) -> Measured:
    costs = pipeline_layout.Costs.from_file(path, base.layers, base.sizes)
    named = {
        "*window" if symbol == "*" and base.sizes.windowed(number) else symbol: sum(parts.values())
        for number, (symbol, parts) in enumerate(zip(base.layers, costs.layers, strict=True), start=1)
    }
    return {**named, "embedding": sum(costs.embedding.values()), "output": sum(costs.output.values())}


def _table(found: Sequence[Found]) -> Iterator[str]:
    yield "  TP  PP  VPP  CP   DP  micro  GiB   bubble  tokens/s/GPU  MFU    recompute"
    for one in found:
        job, said = one.job, one.predicted
        yield (
            f"  {job.tp:2d}  {job.pp:2d}  {job.chunks:3d}  {job.cp:2d}  {job.dp:3d}  {job.micro_batch:5d}  "
            f"{one.needed.total / memory.GIB:5.1f}  {said.bubble:5.1%}  {said.tokens_per_s:12,.0f}  {said.mfu:5.1%}  "
            f"{' '.join(job.recompute) or '-'}"
        )


def _detail(one: Found) -> Iterator[str]:
    job, said = one.job, one.predicted
    per_token = flops.training_flops_per_token(job.sizes, job.layers, job.sequence_tokens)
    step = job.global_batch * job.sequence_tokens
    yield "the first of them:"
    where = f" on pipeline rank {one.rank}, the fullest" if job.pp > 1 else ""
    yield f"  memory      {one.needed}{where}"
    share = per_token * step / job.gpus
    yield f"  work        {per_token / 1e9:.1f} GFLOP a token, {share / 1e12:,.0f} TFLOP a GPU and step"
    received = traffic.per_step(job, one.rank)
    parts = ", ".join(f"{kind} {size / 1e9:.2f}" for kind, size in received.items() if size)
    yield f"  received    {parts or 0} GB a GPU and step"
    waits = ", ".join(f"{kind} {seconds:.3f}" for kind, seconds in said.exposed_s.items() if seconds)
    yield f"  prediction  {said.step_s:.2f} s a step, of which messages that nothing hides: {waits or 0}"
    days = TOKENS_6T / (said.tokens_per_s * job.gpus) / 86400
    yield f"              {said.tokens_per_s:,.0f} tokens/s/GPU, MFU {said.mfu:.1%}, {days:.1f} days for 6T tokens"
    yield f"  flags       {search.flags(job)}"


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number from 1 on")
    return int(text)


def _arguments(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = Parser(prog="python -m megatron_hybrid.tools.plan", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("check", "refuse what cannot run or does not fit: exit status 2 and one line"),
        ("search", "try layouts, print the best"),
    ):
        command = commands.add_parser(name, help=text, allow_abbrev=False)
        command.add_argument("--gpu", choices=list(GPUS), required=True)
        command.add_argument("--gpus", type=_positive, required=True, help="of the whole job")
        command.add_argument("--preset", metavar="NAME", help="named set of flags; Megatron's flags replace them")
        command.add_argument("--without", metavar="FLAG", action="append", default=[], help="as in training")
    command.add_argument("--top", type=_positive, default=5, help="layouts to print (default: 5)")
    command.add_argument(
        "--costs", type=Path, metavar="FILE",
        help="JSON with measured ms of one sequence on one GPU, forward and backward: {G, *, embedding, output}",
    )  # fmt: skip
    return parser.parse_known_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    words = [word for word in (sys.argv[1:] if argv is None else argv) if word != "--"]
    own, rest = _arguments(words)
    try:
        check_names(rest)
        flags, _ = pipeline_layout.resolve(compose(own.preset, rest, own.without))
        check([*flags, "--mock-data"])  # data are not looked for
        if own.command == "check":
            print_report(check_job(flags, own.gpu, own.gpus))
        else:
            print_report(search_report(flags, own.gpu, own.gpus, own.costs, own.top))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
