"""Draws a training run from its TensorBoard files: loss, learning rate, gradient norm and throughput.

    python -m megatron_hybrid.tools.plot_run runs/first/tensorboard --output loss.png

One PNG, and beside it one HTML page with the picture in it and a table of everything that was logged.

A resumed run leaves one event file per start. They are merged by step: where a later start took the run
up again from an earlier step, what the earlier start had logged from there on is dropped.
Tags are those of Megatron's training log (megatron/training/training.py), written every
--tensorboard-log-interval steps.
"""

import argparse
import base64
import html
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_hybrid.tools.atomic_file import atomic_open
from megatron_hybrid.tools.cli import Parser, ToolError, run_cli

EVENT_FILES = "events.out.tfevents.*"
LOSS = "lm loss"
VALIDATION_LOSS = "lm loss validation"
#: A panel without data is left out.
PANELS = ((LOSS, VALIDATION_LOSS), ("learning-rate",), ("grad-norm",), ("tokens/s/GPU",))
BY_SAMPLES = " vs samples"  # Megatron logs every value a second time, against samples instead of steps
VALIDATION = " validation"
MARKERS_UP_TO = 50  # points; a longer series is a line alone
FIGURE_INCHES, DOTS_PER_INCH = (8.0, 2.6), 120  # of one panel
PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<style>body {{ font-family: sans-serif; margin: 2em; }} img {{ max-width: 100%; }} td {{ padding: 0 1em 0 0; }}</style>
</head><body><h1>{title}</h1>
<img alt="loss, learning rate, gradient norm, throughput" src="data:image/png;base64,{image}">
<table><tr><th>tag</th><th>points</th><th>first</th><th>last</th><th>lowest</th><th>highest</th></tr>
{rows}
</table></body></html>
"""


@dataclass
class Series:
    """The values of one tag, in rising order of steps."""

    steps: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)

    @property
    def start(self) -> float:
        """The first value."""
        return self.values[0]

    @property
    def end(self) -> float:
        """The last value."""
        return self.values[-1]


def find_event_files(folder: Path) -> list[Path]:
    """Event files of the one run in `folder`, or in its only subfolder with a run; ToolError otherwise."""
    if not folder.is_dir():
        raise ToolError(f"{folder}: {'not a folder' if folder.exists() else 'no such folder'}; give --tensorboard-dir")
    files = sorted(folder.glob(EVENT_FILES))
    if files:
        return files
    runs = sorted({path.parent for path in folder.rglob(EVENT_FILES)})
    if len(runs) > 1:
        raise ToolError(f"{folder}: holds {len(runs)} runs, {', '.join(map(str, runs[:5]))}; give one of them")
    if not runs:
        raise ToolError(
            f"{folder}: no TensorBoard files ({EVENT_FILES}); was the run given --tensorboard-dir, and did it "
            "reach the first logged step?"
        )
    return sorted(runs[0].glob(EVENT_FILES))


def read_event_file(path: Path) -> tuple[float, dict[str, dict[int, float]]]:
    """(time of the first value in seconds, {tag: {step: value}}) of one file; tags by samples are left out.

    A file cut short, by a crash or because the run still writes it, gives the values before the cut.
    """
    from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

    accumulator = EventAccumulator(str(path), size_guidance={SCALARS: 0}, purge_orphaned_data=False)
    accumulator.Reload()
    started = math.inf
    values: dict[str, dict[int, float]] = {}
    for tag in accumulator.Tags()[SCALARS]:
        events = accumulator.Scalars(tag)
        started = min([started, *(event.wall_time for event in events)])
        if not tag.endswith(BY_SAMPLES):
            values[tag] = {event.step: event.value for event in events}
    return started, values


def read_series(folder: Path) -> dict[str, Series]:
    """Every scalar of the run in `folder`, by tag, merged over its event files; see the top of this file.

    Raises ToolError if the folder is missing, holds no event files or several runs, or no values.
    """
    files = find_event_files(folder)
    starts = sorted((read_event_file(path) for path in files), key=lambda start: start[0])
    merged: dict[str, dict[int, float]] = {}
    for _, values in starts:
        resumed_at = min((min(points) for tag, points in values.items() if VALIDATION not in tag), default=math.inf)
        for points in merged.values():
            for step in [step for step in points if step >= resumed_at]:
                del points[step]
        for tag, points in values.items():
            merged.setdefault(tag, {}).update(points)
    series = {
        tag: Series(sorted(points), [points[step] for step in sorted(points)])
        for tag, points in sorted(merged.items())
        if points
    }
    if not series:
        raise ToolError(
            f"{files[0]}: {len(files)} event files, but no values in them; the run ended, or was read, before "
            "--tensorboard-log-interval steps"
        )
    return series


def draw_panel(axes: Any, tags: tuple[str, ...], series: dict[str, Series]) -> None:
    """Draws the `tags` that have data on one set of axes."""
    for tag in tags:
        if tag in series:
            steps, values = series[tag].steps, series[tag].values
            marker = "o" if len(steps) <= MARKERS_UP_TO else None
            axes.plot(steps, values, label=tag, linewidth=1.2, marker=marker, markersize=3)
    axes.set_ylabel(tags[0])
    axes.grid(alpha=0.3)
    if tags[0] == "learning-rate":
        axes.ticklabel_format(axis="y", style="scientific", scilimits=(0, 0))
    if sum(tag in series for tag in tags) > 1:
        axes.legend()


def draw(series: dict[str, Series], title: str, output: Path) -> None:
    """Writes the PNG: a panel for each of PANELS, over a common step axis."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = [tags for tags in PANELS if any(tag in series for tag in tags)]
    if not panels:
        raise ToolError(f"{title}: none of the tags to draw; the run logged {', '.join(series)}")
    width, height = FIGURE_INCHES
    figure, grid = pyplot.subplots(
        len(panels), 1, sharex=True, squeeze=False, figsize=(width, height * len(panels)), layout="constrained"
    )
    for axes, tags in zip(grid[:, 0], panels, strict=True):
        draw_panel(axes, tags, series)
    grid[0, 0].set_title(title)
    grid[-1, 0].set_xlabel("step")
    with atomic_open(output) as handle:
        figure.savefig(handle, format="png", dpi=DOTS_PER_INCH)
    pyplot.close(figure)


def write_page(series: dict[str, Series], title: str, picture: Path, output: Path) -> None:
    """Writes the HTML page: the picture, and every tag's first, last, lowest and highest value; no other file."""
    rows = []
    for tag, points in series.items():
        finite = [value for value in points.values if math.isfinite(value)] or [math.nan]
        numbers = (points.start, points.end, min(finite), max(finite))
        cells = "".join(f"<td>{number:.6g}</td>" for number in numbers)
        rows.append(f"<tr><td>{html.escape(tag)}</td><td>{len(points.steps):,}</td>{cells}</tr>")
    image = base64.b64encode(picture.read_bytes()).decode()
    with atomic_open(output) as handle:
        handle.write(PAGE.format(title=html.escape(title), image=image, rows="\n".join(rows)).encode())


def parser() -> argparse.ArgumentParser:
    """The command line of this tool."""
    result = Parser(
        prog="python -m megatron_hybrid.tools.plot_run",
        description="Draws loss, learning rate, gradient norm and throughput of a run from its TensorBoard files: "
        "one PNG and, beside it, one self-contained HTML page.",
    )
    result.add_argument("directory", type=Path, metavar="DIR", help="the run's --tensorboard-dir")
    result.add_argument("--output", type=Path, metavar="FILE.png", help="picture to write (default: DIR/loss.png)")
    return result


def main() -> None:
    """Command-line entry point."""
    args = parser().parse_args()
    output = args.output or args.directory / "loss.png"
    if output.suffix != ".png":
        raise ToolError(f"--output {output}: the picture is a PNG; end the name in .png")
    series = read_series(args.directory)
    page = output.with_suffix(".html")
    draw(series, str(args.directory), output)
    write_page(series, str(args.directory), output, page)
    for tag in (LOSS, VALIDATION_LOSS):
        if tag in series:
            points = series[tag]
            print(
                f"{tag}: {points.start:.4f} at step {points.steps[0]:,} -> {points.end:.4f} at step "
                f"{points.steps[-1]:,} ({len(points.steps):,} points)"
            )
    print(output, page, sep="\n")


if __name__ == "__main__":
    run_cli(main)
