"""FP8 against the plugin's own bf16: the same seeded run on real text, side by side.

    python -m megatron_hybrid.tools.fp8_acceptance --data-path PREFIX --tokenizer-model FILE --output FOLDER

Each variant is a `megatron_hybrid.pretrain` of its own, all started together, spread over the GPUs that are visible:
final losses are compared with bf16's (at most 0.5 % away, no step skipped that bf16 found ordinary). Then, at once,
each run is resumed from its checkpoint a few steps before the end, whose losses must be the same bits, and one process
loads bf16's checkpoint under every variant and compares the gradients of one batch, layer by layer. FOLDER gets
acceptance.json, acceptance.md and a log per run.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from megatron_hybrid.tools.cli import Parser, ToolError, run_cli
from megatron_hybrid.tools.gpu_bench.cases import FP8, LEAN, words

#: Four layers of the width of the 1B model, with the head sizes and learning rates of the 7B.
MODEL = words(
    "--preset olmo-hybrid-7b --num-layers 4 --hybrid-layer-pattern GGG* --hidden-size 2048 --ffn-hidden-size 8192 "
    "--num-attention-heads 16 --linear-num-key-heads 16 --linear-num-value-heads 16 --seq-length 1024 "
    "--max-position-embeddings 1024 --micro-batch-size 8 --global-batch-size 8"
)
TINY = words(
    "--preset olmo-hybrid-tiny --num-layers 4 --hybrid-layer-pattern GGG* --seq-length 64 --micro-batch-size 2 "
    "--global-batch-size 2 --bf16 --use-distributed-optimizer"
)
RUN = words(
    "--lr 3e-4 --min-lr 3e-5 --split 98,2,0 --eval-iters 0 --eval-interval 100000 --log-interval 1 --no-log-health"
)

#: What is compared; the first is the yardstick. The second, whose weight gradients are rounded to bf16 before they are
#: added, shows how far apart two runs end that differ by rounding alone. FP8 parameters go with moments and gradients
#: in bf16.
VARIANTS: dict[str, tuple[str, ...]] = {
    "bf16": (),
    "bf16, rounded otherwise": ("--no-gradient-accumulation-fusion",),
    **FP8,
    "tensorwise, FP8 parameters": (*FP8["tensorwise"], "--fp8-param-gather", *LEAN),
}
#: For the gradients alone.
EDGES = words("--first-last-layers-bf16 --num-layers-at-start-in-bf16 1 --num-layers-at-end-in-bf16 1")
#: To try the tool itself where there is no FP8.
TINY_VARIANTS: dict[str, tuple[str, ...]] = {"bf16": (), "no z-loss": ("--z-loss", "0")}

LARGEST_LOSS_DIFFERENCE = 0.005
#: Kept back for what follows the runs: resumptions, and beside them gradients of six variants, one after another.
RESERVED_S = 200
LINE = re.compile(r"iteration\s+(\d+)/.*?lm loss: ([0-9.E+-]+|nan|inf)")
NORM = re.compile(r"grad norm: ([0-9.E+-]+|nan|inf)")
SKIPPED = re.compile(r"skipped steps: ([0-9.E+-]+)")
#: A step at which bf16's own gradient norm or loss is so many standard deviations above the steps before it counts as
#: hard in any precision: SkipStep, which leaves out what exceeds six, may do so there.
HARD_STEP_SIGMAS = 3.0
WINDOW_STEPS = 128  #: that SkipStep looks back on


def folder_name(variant: str) -> str:
    return re.sub(r"\W+", "_", variant)


def launch(args: argparse.Namespace, variant: str, name: str, more: list[str]) -> subprocess.Popen[bytes]:
    """A training run whose log and curves are called `name`."""
    folder = args.output / folder_name(variant)
    folder.mkdir(parents=True, exist_ok=True)
    flags = [*(TINY if args.tiny else MODEL), *RUN]
    flags += ["--data-path", str(args.data_path), "--data-cache-path", str(folder / "cache")]
    flags += ["--tensorboard-dir", str(folder / name), "--tensorboard-log-interval", "1"]
    flags += ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", str(args.tokenizer_model)]
    flags += ["--train-iters", str(args.steps), "--lr-warmup-iters", str(args.steps // 10)]
    chosen = (TINY_VARIANTS if args.tiny else VARIANTS)[variant]
    command = [sys.executable, "-m", "megatron_hybrid.pretrain", *flags, *chosen, *more]
    with (folder / f"{name}.log").open("w") as out:
        return subprocess.Popen(command, stdout=out, stderr=out, env=environment(variant))


def environment(variant: str) -> dict[str, str]:
    """One GPU; attention kernels that give the same bits twice, so that a resumed run can be compared bit by bit."""
    gpus = visible_gpus()
    place = list({**VARIANTS, **TINY_VARIANTS}).index(variant)
    one = {"CUDA_VISIBLE_DEVICES": gpus[place % len(gpus)]} if gpus else {}
    return {**os.environ, **one, "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0"}


def visible_gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES names, or else every GPU by number."""
    if (named := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name for name in named.split(",") if name]
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return []
    return [str(number) for number in range(listed.count("GPU "))]


def wait(running: dict[str, subprocess.Popen[bytes]], deadline: float, what: str) -> dict[str, str]:
    """{variant: error} of those that did not end well by the deadline."""
    failed = {}
    for variant, process in running.items():
        try:
            if status := process.wait(max(1.0, deadline - time.monotonic())):
                failed[variant] = f"{what} ended with status {status}"
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            failed[variant] = f"{what} was ended: out of time"
        print(f"{what} {variant}: {failed.get(variant, 'done')}", flush=True)
    return failed


def read_log(log: Path) -> dict[str, Any]:
    """{losses, norms: {step: as printed}, skipped: [steps]} of a console log."""
    found: dict[str, Any] = {"losses": {}, "norms": {}, "skipped": []}
    for line in log.read_text(errors="replace").splitlines() if log.exists() else []:
        if loss := LINE.search(line):
            step = int(loss[1])
            found["losses"][step] = float(loss[2])
            if norm := NORM.search(line):
                found["norms"][step] = float(norm[1])
            if (skipped := SKIPPED.search(line)) and float(skipped[1]):
                found["skipped"].append(step)
    return found


def is_hard(row: dict[str, Any], step: int) -> bool:
    """Whether this run's gradient norm or loss at a step stands out as HARD_STEP_SIGMAS says, or is not finite."""
    for series in (row["norms"], row["losses"]):
        before = [series[s] for s in range(step - WINDOW_STEPS, step) if math.isfinite(series.get(s, math.nan))]
        if len(before) < 2 or step not in series:
            continue
        if not math.isfinite(series[step]):
            return True
        if series[step] - statistics.fmean(before) > HARD_STEP_SIGMAS * statistics.stdev(before):
            return True
    return False


def exact_losses(tensorboard: Path) -> dict[int, float]:
    """{step: loss} in full fp32, which the console rounds."""
    from megatron_hybrid.tools.plot_run import LOSS, read_series

    series = read_series(tensorboard)[LOSS]
    return dict(zip(series.steps, series.values, strict=True))


def why(log: Path) -> str:
    """The last line of a log that names a fault."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if re.search(r"(Error|\berror): ", line)]
    return lines[-1][:300] if lines else "see its log"


def train(args: argparse.Namespace, variants: list[str], deadline: float) -> dict[str, dict[str, Any]]:
    """The runs; {variant: what was measured}."""
    rows: dict[str, dict[str, Any]] = {variant: {"errors": []} for variant in variants}
    running = {}
    for variant in variants:
        save = ["--save", str(args.checkpoints / folder_name(variant)), "--save-interval", str(saved_step(args))]
        running[variant] = launch(args, variant, "straight", save if args.resumed_steps else [])
    for variant, error in wait(running, deadline, "run").items():
        rows[variant]["errors"].append(f"{error}: {why(args.output / folder_name(variant) / 'straight.log')}")
    for variant in variants:
        _losses(rows[variant], args.output / folder_name(variant), args.steps)
    return rows


def saved_step(args: argparse.Namespace) -> int:
    return int(args.steps - args.resumed_steps)


def has_checkpoint(args: argparse.Namespace, variant: str) -> bool:
    """The one that is resumed from is there, whole."""
    return bool((args.checkpoints / folder_name(variant) / f"iter_{saved_step(args):07d}" / "COMPLETE").exists())


def resume(args: argparse.Namespace, variants: list[str]) -> dict[str, subprocess.Popen[bytes]]:
    running = {}
    for variant in variants:
        load = ["--load", str(args.checkpoints / folder_name(variant)), "--ckpt-step", str(saved_step(args))]
        running[variant] = launch(args, variant, "resumed", load)
    return running


def _losses(row: dict[str, Any], folder: Path, steps: int) -> None:
    found = read_log(folder / "straight.log")
    losses = found["losses"]
    row |= found | {"steps": max(losses, default=0)}
    if row["steps"] == steps:
        last = [losses[step] for step in sorted(losses)[-20:]]
        row |= {"final": losses[steps], "final_20": statistics.fmean(last)}


def _resumed(row: dict[str, Any], folder: Path) -> None:
    try:
        straight, resumed = (exact_losses(folder / name) for name in ("straight", "resumed"))
    except (ToolError, OSError, ImportError, KeyError) as error:
        row["errors"].append(f"no losses of the resumption: {error}")
        return
    pairs = {step: (straight[step], resumed[step]) for step in resumed if step in straight}
    row["resumed_steps"] = len(pairs)
    row["resumed_equal"] = sum(a == b for a, b in pairs.values())
    row["resumed_largest_difference"] = max((abs(a - b) for a, b in pairs.values()), default=float("nan"))


def start_gradients(args: argparse.Namespace, variants: list[str]) -> subprocess.Popen[bytes]:
    """tools.gpu_bench.gradients, in a process of its own."""
    flags = [*(TINY if args.tiny else MODEL)[2:], *RUN, "--train-iters", str(args.steps), "--lr-warmup-iters", "1"]
    flags += ["--load", str(args.checkpoints / folder_name(variants[0])), "--ckpt-step", str(saved_step(args))]
    known = TINY_VARIANTS if args.tiny else VARIANTS
    compared = {name: list(known[name]) for name in variants}
    if not args.tiny:
        compared["tensorwise, first and last layer bf16"] = [*FP8["tensorwise"], *EDGES]
    question = {
        "preset": (TINY if args.tiny else MODEL)[1],
        "flags": flags,
        "tokenizer": ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", str(args.tokenizer_model)],
        "tokens": f"{args.data_path}.bin",
        "variants": compared,
    }
    (args.output / "gradients_question.json").write_text(json.dumps(question))
    command = [sys.executable, "-m", "megatron_hybrid.tools.gpu_bench.gradients"]
    command += [str(args.output / "gradients_question.json"), str(args.output / "gradients.json")]
    with (args.output / "gradients.log").open("w") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment(variants[0]))


def read_gradients(args: argparse.Namespace, failed: dict[str, str]) -> dict[str, Any]:
    answer = args.output / "gradients.json"
    found: dict[str, Any] = json.loads(answer.read_text()) if answer.exists() else {}
    for error in failed.values():
        found["error"] = f"{error}: {why(args.output / 'gradients.log')}"
    return found


def verdict(row: dict[str, Any], yardstick: dict[str, Any], resumed_steps: int) -> str:
    """'passed', or what is wrong."""
    if "final_20" not in row or "final_20" not in yardstick:
        return "; ".join(row["errors"]) or "not finished"
    wrong = list(row["errors"])
    if not abs(row["final_20"] / yardstick["final_20"] - 1) <= LARGEST_LOSS_DIFFERENCE:  # NaN too
        wrong.append("final loss")
    if steps := [step for step in row["skipped"] if not is_hard(yardstick, step)]:
        wrong.append(f"skipped steps that bf16 found ordinary: {', '.join(map(str, steps))}")
    if resumed_steps and "resumed_equal" not in row:
        wrong.append("not resumed")
    elif resumed_steps and row["resumed_equal"] != resumed_steps:
        wrong.append(f"resumption: {row['resumed_equal']} of {resumed_steps} losses equal")
    return "; ".join(wrong) or "passed"


def write(args: argparse.Namespace, rows: dict[str, dict[str, Any]], cosines: dict[str, Any] | None = None) -> None:
    yardstick = next(iter(rows.values()))
    lines = [
        f"{args.steps} steps, losses of the last step and mean of the last 20; resumed: equal bits of how many steps",
        "",
        "| | loss | last 20 | of bf16's | skipped steps | resumed | largest difference | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for variant, row in rows.items():
        row["verdict"] = verdict(row, yardstick, args.resumed_steps)
        if "final" not in row:
            lines.append(f"| {variant} | | | | | | | {row['verdict']} |")
            continue
        share = row["final_20"] / yardstick["final_20"] if "final_20" in yardstick else float("nan")
        resumed = f"{row['resumed_equal']} of {row['resumed_steps']}" if "resumed_equal" in row else ""
        largest = f"{row['resumed_largest_difference']:.2e}" if "resumed_equal" in row else ""
        skipped = ", ".join(map(str, row["skipped"]))
        cells = [variant, f"{row['final']:.5f}", f"{row['final_20']:.5f}", f"{share:.5f}", skipped, resumed, largest]
        lines.append(f"| {' | '.join([*cells, row['verdict']])} |")
    if cosines:
        lines += ["", *cosines.get("table", []), *([cosines["error"]] if "error" in cosines else [])]
    (args.output / "acceptance.md").write_text("\n".join(lines) + "\n")
    (args.output / "acceptance.json").write_text(json.dumps({"rows": rows, "gradients": cosines}, indent=1))


def main() -> None:
    parser = Parser(
        prog="python -m megatron_hybrid.tools.fp8_acceptance",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data-path", type=Path, required=True, help="prefix of .bin/.idx (uint16 ids)")
    parser.add_argument("--tokenizer-model", type=Path, required=True, help="the SentencePiece model of these ids")
    parser.add_argument("--output", type=Path, required=True, help="folder for the results; must be new")
    parser.add_argument("--checkpoints", type=Path, help="folder for checkpoints, 10 GB a run (default: in --output)")
    parser.add_argument("--variant", action="append", default=[], help="besides bf16, only this one (repeatable)")
    parser.add_argument("--steps", type=int, default=500, help="of each run (500)")
    parser.add_argument(
        "--resumed-steps",
        type=int,
        default=20,
        help="before the end, to be run again (20); 0: the runs alone, without checkpoints and gradients",
    )
    parser.add_argument("--budget-s", type=float, default=560, help="end what runs after so many seconds (560)")
    parser.add_argument("--tiny", action="store_true", help="small sizes without FP8, to try this tool itself")
    args = parser.parse_args()
    args.checkpoints = args.checkpoints or args.output / "checkpoints"
    known = list(TINY_VARIANTS if args.tiny else VARIANTS)
    if unknown := [name for name in args.variant if name not in known]:
        raise ToolError(f"--variant {unknown[0]!r}: unknown; legal: {', '.join(map(repr, known))}")
    if not 0 <= args.resumed_steps < args.steps // 2:
        raise ToolError(
            f"--resumed-steps {args.resumed_steps}: must be 0 or more and below half of --steps {args.steps}"
        )
    for path in (args.tokenizer_model, *(Path(f"{args.data_path}.{end}") for end in ("bin", "idx"))):
        if not path.is_file():
            raise ToolError(f"{path}: no such file; examples/gpu/prepare.sh makes --data-path and --tokenizer-model")
    if args.output.exists():
        raise ToolError(f"--output {args.output}: exists; name a new folder")
    variants = [known[0], *(name for name in known[1:] if not args.variant or name in args.variant)]
    args.output.mkdir(parents=True)
    deadline = time.monotonic() + args.budget_s
    reserved = min(RESERVED_S, args.budget_s / 3) if args.resumed_steps else 0
    rows = train(args, variants, deadline - reserved)
    write(args, rows)
    saved = [variant for variant in variants if has_checkpoint(args, variant)]
    judged = {"of one batch": start_gradients(args, variants)} if variants[0] in saved else {}
    resumed = resume(args, saved)
    cosines = read_gradients(args, wait(judged, deadline, "gradients"))
    write(args, rows, cosines)
    for variant, error in wait(resumed, deadline, "resumption").items():
        rows[variant]["errors"].append(f"{error}: {why(args.output / folder_name(variant) / 'resumed.log')}")
    for variant in resumed:
        _resumed(rows[variant], args.output / folder_name(variant))
    write(args, rows, cosines)
    print((args.output / "acceptance.md").read_text())
    if "error" in cosines or any(row["verdict"] != "passed" for row in rows.values()):
        raise ToolError(f"not passed; see {args.output}/acceptance.md")


if __name__ == "__main__":
    run_cli(main)
