"""What is compared: layouts, recipes, the model, and which processes run what, in order. Plain data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from megatron_hybrid.tools.gpu_bench.cases import FP8, words


@dataclass(frozen=True)
class Layout:
    """How a model is split. flags: what goes with it beyond the sizes."""

    name: str
    tp: int = 1
    cp: int = 1
    pp: int = 1
    dp: int = 1
    flags: tuple[str, ...] = ()

    @property
    def ranks(self) -> int:
        return self.tp * self.cp * self.pp * self.dp

    @property
    def arguments(self) -> list[str]:
        """Sequence parallelism goes with tensor parallelism, as in a real run."""
        found = ["--tensor-model-parallel-size", str(self.tp), "--context-parallel-size", str(self.cp)]
        found += ["--pipeline-model-parallel-size", str(self.pp)]
        found += ["--sequence-parallel"] * (self.tp > 1)
        return [*found, "--hybrid-layer-pattern", "GG|G*" if self.pp > 1 else "GGG*", *self.flags]


ONE = Layout("one process")
#: Of two processes, then of four: the heads, six, are padded to eight under TP 4.
LAYOUTS = (
    Layout("TP 2, SP", tp=2),
    Layout("CP 2, states by all-gather", cp=2, flags=words("--gdn-cp-comm-type all_gather")),
    Layout("CP 2, states by scan", cp=2, flags=words("--gdn-cp-comm-type scan")),
    Layout("CP 2, heads by all-to-all", cp=2, flags=words("--gdn-cp-comm-type a2a")),
    Layout("PP 2", pp=2),
    Layout("DP 2", dp=2),
    Layout("TP 2, SP, CP 2", tp=2, cp=2),
    Layout("TP 2, SP, PP 2", tp=2, pp=2),
    Layout("TP 4, SP, heads padded", tp=4),
)

#: Flags of each beside --bf16, but for fp32. FP8 parameters under DP alone: they are refused where heads are padded,
#: and what is new in them is the distributed optimizer's, which gathers them in FP8.
RECIPES: dict[str, tuple[str, ...]] = {
    "fp32": (),
    "bf16": (),
    **FP8,
    "FP8 parameters": (*FP8["tensorwise"], "--fp8-param-gather"),
    #: Where there is no FP8: bf16 with the operands of the same GEMMs rounded to it (`emulated.py`).
    "rounded": (),
}
IN_FP8 = (*FP8, "FP8 parameters")

_RUN = words(
    "--mock-data --tokenizer-type NullTokenizer --num-layers 4 --train-iters 100 --lr 3e-4 --min-lr 3e-4 "
    "--lr-warmup-iters 0 --no-skip-step --no-log-health --use-distributed-optimizer --micro-batch-size 1 "
    "--global-batch-size 4"
)
#: Head sizes of the 7B, whose launches are checked. Per rank, under TP 2, the mixer's GEMMs have 1,728 rows and 576
#: columns: multiples of 16 and not of 128, as the 7B's have.
GPU_MODEL = (
    *_RUN,
    *words(
        "--hidden-size 512 --ffn-hidden-size 1024 --num-attention-heads 6 --kv-channels 128 --linear-num-key-heads 6 "
        "--linear-num-value-heads 6 --seq-length 1024 --max-position-embeddings 1024 --vocab-size 999 "
        "--padded-vocab-size 1024"
    ),
)
CPU_MODEL = (
    *_RUN,
    *words(
        "--hidden-size 96 --ffn-hidden-size 144 --num-attention-heads 6 --kv-channels 16 --linear-num-key-heads 6 "
        "--linear-num-value-heads 6 --linear-key-head-dim 24 --linear-value-head-dim 48 --seq-length 128 "
        "--max-position-embeddings 128 --vocab-size 185 --padded-vocab-size 192"
    ),
)


#: `Job.broken` where rank 1 fails and the others wait for it.
ONE_RANK_FAILS = "rank 1 fails alone"


@dataclass(frozen=True)
class Job:
    """Cells of one layout, one after another in one set of process groups.

    Args:
        processes: which of the plan's take part; their places are their ranks.
        broken: what the ranks of this job take out first, to see that the comparison notices.
    """

    layout: Layout
    recipes: tuple[str, ...]
    processes: tuple[int, ...]
    broken: str = ""


@dataclass(frozen=True)
class Plan:
    """Args:
    device: `cuda`, one process a GPU over NCCL, or `cpu`, over gloo.
    steps: optimizer steps after the gradients are measured.
    cell_limit_s: a process that has been in one cell for longer hangs. The first pays for compiling the kernels.
    grace_s: after one rank of a cell failed, the others have so long to come to an end too.
    """

    device: str
    model: tuple[str, ...]
    processes: int
    jobs: tuple[Job, ...]
    steps: int = 5
    cell_limit_s: float = 150.0
    grace_s: float = 15.0

    def as_data(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_data(cls, data: dict[str, Any]) -> Plan:
        jobs = tuple(
            Job(
                Layout(**{**job["layout"], "flags": tuple(job["layout"]["flags"])}),
                tuple(job["recipes"]),
                tuple(job["processes"]),
                job["broken"],
            )
            for job in data["jobs"]
        )
        return cls(**{**data, "model": tuple(data["model"]), "jobs": jobs})


@dataclass(frozen=True)
class Cell:
    """One recipe in one layout."""

    layout: str
    recipe: str

    @property
    def file(self) -> str:
        """Start of the names of its files."""
        return "".join(c if c.isalnum() else "_" for c in f"{self.layout}-{self.recipe}")


@dataclass
class Outcome:
    """What became of a cell: what each rank found, or why there is nothing."""

    found: list[dict[str, Any]] = field(default_factory=list)
    error: str = ""


def cells_of(jobs: Sequence[Job]) -> list[Cell]:
    return [Cell(job.layout.name, recipe) for job in jobs for recipe in job.recipes]


def schedule(processes: int, recipes: Sequence[str], layouts: Sequence[Layout] = LAYOUTS) -> tuple[Job, ...]:
    """One process alone in every recipe, spread over the processes; then the layouts, those of two side by side.

    All processes go through the jobs in this order, so that those which share one always come together.
    """
    jobs = [Job(ONE, (recipe,), (place % processes,)) for place, recipe in enumerate(recipes)]
    everywhere = tuple(recipe for recipe in recipes if recipe != "FP8 parameters")
    fitting = [layout for layout in layouts if layout.ranks <= processes]
    lanes = {size: processes // size for size in {layout.ranks for layout in fitting}}
    for place, layout in enumerate(sorted(fitting, key=lambda layout: layout.ranks)):
        first = place % lanes[layout.ranks] * layout.ranks
        own = tuple(recipes) if layout.dp > 1 else everywhere
        jobs.append(Job(layout, own, tuple(range(first, first + layout.ranks))))
    return tuple(jobs)
