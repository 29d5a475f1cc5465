"""Shows a Megatron training run as a progress bar: reads its output on stdin, keeps all of it in a log file.

    torchrun ... 2>&1 | python -m megatron_hybrid.tools.watch_training --log train.log

The log lines are Megatron's own; nothing is taken out. Without a terminal every tenth iteration is printed instead.
"""

import argparse
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from megatron_hybrid.tools.cli import Parser, run_cli

_ITERATION = re.compile(
    r"iteration\s+(?P<step>\d+)/\s*(?P<total>\d+) \|.*?elapsed time per iteration \(ms\): (?P<ms>[\d.]+)"
    r".*?lm loss: (?P<loss>[\d.E+-]+)"
)
_ERROR = re.compile(r"^(error: |.*\b\w*Error: )")


@dataclass(frozen=True)
class Iteration:
    """One of Megatron's log lines. step counts from 1; total is --train-iters."""

    step: int
    total: int
    milliseconds: float
    lm_loss: float


def parse_iteration(line: str) -> Iteration | None:
    """The iteration that a line of Megatron's log reports, or None."""
    found = _ITERATION.search(line)
    if found is None:
        return None
    return Iteration(int(found["step"]), int(found["total"]), float(found["ms"]), float(found["loss"]))


def read_iterations(log: Path) -> list[Iteration]:
    """Every iteration in a log file, in its order."""
    lines = log.read_text(errors="replace").splitlines()
    return [found for line in lines if (found := parse_iteration(line))]


def watch(lines: Iterable[str], log: Path) -> None:
    """Append `lines` to `log` as they come and show the iterations in them; errors are shown as they are."""
    from tqdm import tqdm

    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a") as kept, tqdm(desc="training", unit="iteration", disable=None, dynamic_ncols=True) as bar:
        shown, last = 0, None
        for line in lines:
            kept.write(line)
            kept.flush()
            if found := parse_iteration(line):
                bar.total = found.total
                bar.update(found.step - bar.n)
                bar.set_postfix_str(f"loss {found.lm_loss:.3f}")
                last = found
                if bar.disable and found.step % 10 == 0:
                    _print(found)
                    shown = found.step
            elif _ERROR.match(line):
                bar.write(line.rstrip(), file=sys.stderr)
        if bar.disable and last is not None and last.step != shown:
            _print(last)


def _print(found: Iteration) -> None:
    said = f"iteration {found.step}/{found.total}  loss {found.lm_loss:.3f}  {found.milliseconds:.0f} ms"
    print(said, file=sys.stderr, flush=True)


def main() -> None:
    """Command-line entry point."""
    parser = Parser(
        prog="python -m megatron_hybrid.tools.watch_training",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--log", type=Path, required=True, help="file that gets every line")
    watch(sys.stdin, parser.parse_args().log)


if __name__ == "__main__":
    run_cli(main)
