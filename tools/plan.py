"""Whether a job can run, before a GPU is asked for, and which layouts are worth trying. Needs no GPU and no torch.

python -m megatron_hybrid.tools.plan check --gpu H100 --gpus 512 -- --preset olmo-hybrid-7b FLAGS
python -m megatron_hybrid.tools.plan search --gpu H100 --gpus 512 --preset olmo-hybrid-7b FLAGS
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from megatron_hybrid.flags import FlagError, check, compose
from megatron_hybrid.parallel import pipeline_layout
from megatron_hybrid.planning import memory
from megatron_hybrid.planning.hardware import GPUS, RESERVED_GIB
from megatron_hybrid.planning.job import Job, check_gpu, check_microbatches
from megatron_hybrid.planning.remedies import remedy


def _composed(preset: str | None, rest: Sequence[str], without: Sequence[str]) -> list[str]:
    """Flags as training would take them, pipeline stages laid out; data are not looked for."""
    flags, _ = pipeline_layout.resolve(compose(preset, rest, without))
    check([*flags, "--mock-data"])
    return flags


def check_job(flags: Sequence[str], gpu_name: str, gpus: int) -> str:
    """A short verdict on memory.

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
    return (
        f"fits: TP {job.tp}, PP {job.pp}, CP {job.cp}, DP {job.dp} on {gpus} {gpu_name}, {job.microbatches} "
        f"microbatches; of {room:g} GiB {where}{needed}"
    )


def _arguments(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(prog="python -m megatron_hybrid.tools.plan", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (("check", "refuse what cannot run: exit status 2 and one line"),):
        command = commands.add_parser(name, help=text, allow_abbrev=False)
        command.add_argument("--gpu", choices=list(GPUS), required=True)
        command.add_argument("--gpus", type=int, required=True, help="of the whole job")
        command.add_argument("--preset", metavar="NAME", help="named set of flags")
        command.add_argument("--without", metavar="FLAG", action="append", default=[], help="as in training")
    own, rest = parser.parse_known_args(argv)
    return own, [word for word in rest if word != "--"]


def main(argv: Sequence[str] | None = None) -> None:
    words = list(sys.argv[1:] if argv is None else argv)
    own, rest = _arguments([word for word in words if word != "--"])
    try:
        flags = _composed(own.preset, rest, own.without)
        print(check_job(flags, own.gpu, own.gpus))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
