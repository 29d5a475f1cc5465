"""Reading a run's TensorBoard files: resumed runs merge by step, empty ones say so, the picture is whole."""

import base64
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_hybrid.tools.cli import ToolError
from megatron_hybrid.tools.plot_run import Series, draw, find_event_files, read_series

Points = dict[str, dict[int, float]]
PNG_MAGIC = b"\x89PNG\r\n\x1a\n"


def write_events(folder: Path, start: float, points: Points, suffix: str = "") -> Path:
    """Writes one event file as Megatron's writer does, its values a second apart from `start` on."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    before = set(folder.glob("*")) if folder.exists() else set()
    writer = EventFileWriter(str(folder), filename_suffix=f".{start:g}{suffix}")
    for tag, values in points.items():
        for step, value in values.items():
            summary = Summary(value=[Summary.Value(tag=tag, simple_value=value)])
            writer.add_event(Event(wall_time=start + step, step=step, summary=summary))
    writer.close()
    (path,) = set(folder.glob("*")) - before
    return path


def line(first: int, last: int, value: float) -> dict[int, float]:
    """`value` at every step from `first` to `last`."""
    return dict.fromkeys(range(first, last + 1), value)


def test_values_written_by_megatrons_writer_are_read(tmp_path: Path) -> None:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(log_dir=str(tmp_path), max_queue=1000)
    for step in range(1, 6):
        writer.add_scalar("lm loss", 10.0 / step, step)
        writer.add_scalar("lm loss vs samples", 10.0 / step, step * 64)
    writer.close()
    series = read_series(tmp_path)
    assert list(series) == ["lm loss"]
    assert series["lm loss"].steps == [1, 2, 3, 4, 5]
    assert series["lm loss"].values == pytest.approx([10.0, 5.0, 10 / 3, 2.5, 2.0])


def test_all_points_of_a_long_run_are_kept(tmp_path: Path) -> None:
    write_events(tmp_path, 0, {"lm loss": line(1, 25_000, 2.0)})
    assert len(read_series(tmp_path)["lm loss"].steps) == 25_000


def test_resumed_run_replaces_the_steps_it_did_again(tmp_path: Path) -> None:
    # Written in reverse, so that the order of the file names is not the order of the starts.
    write_events(tmp_path, 2000, {"lm loss": line(9, 12, 2.0)})
    write_events(tmp_path, 1000, {"lm loss": line(1, 10, 1.0)})
    loss = read_series(tmp_path)["lm loss"]
    assert loss.steps == list(range(1, 13))
    assert loss.values == [1.0] * 8 + [2.0] * 4
    assert (loss.start, loss.end) == (1.0, 2.0)


def test_steps_abandoned_by_a_resumed_run_are_dropped(tmp_path: Path) -> None:
    write_events(tmp_path, 1000, {"lm loss": line(1, 100, 1.0), "lm loss validation": {50: 1.5, 100: 1.5}})
    write_events(tmp_path, 2000, {"lm loss": line(51, 60, 2.0)})
    series = read_series(tmp_path)
    assert series["lm loss"].steps == list(range(1, 61))
    assert series["lm loss validation"] == Series([50], [1.5])


def test_evaluation_alone_after_the_run_drops_nothing(tmp_path: Path) -> None:
    write_events(tmp_path, 1000, {"lm loss": line(1, 10, 1.0)})
    write_events(tmp_path, 2000, {"lm loss validation": {10: 1.25}})
    series = read_series(tmp_path)
    assert series["lm loss"].steps == list(range(1, 11))
    assert series["lm loss validation"] == Series([10], [1.25])


def test_file_cut_short_gives_the_values_before_the_cut(tmp_path: Path) -> None:
    path = write_events(tmp_path, 0, {"lm loss": line(1, 100, 1.0)})
    os.truncate(path, path.stat().st_size - 7)
    assert read_series(tmp_path)["lm loss"].steps == list(range(1, 100))


def test_the_only_subfolder_with_a_run_is_used(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    path = write_events(tmp_path / "tensorboard", 0, {"lm loss": {1: 1.0}})
    assert find_event_files(tmp_path) == [path]


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        pytest.param(None, r"run: no such folder; give --tensorboard-dir", id="no-folder"),
        pytest.param({}, r"run: no TensorBoard files .* was the run given --tensorboard-dir", id="no-event-files"),
        pytest.param({"a": {"lm loss": {1: 1.0}}, "b": {"lm loss": {1: 1.0}}}, "holds 2 runs", id="two-runs"),
        pytest.param({".": {}}, r"1 event files, but no values in them", id="no-values"),
        pytest.param({".": {"lm loss vs samples": {64: 1.0}}}, "no values in them", id="values-by-samples-only"),
    ],
)
def test_folder_without_one_run_is_an_error(tmp_path: Path, layout: dict[str, Points] | None, message: str) -> None:
    folder = tmp_path / "run"
    if layout is not None:
        folder.mkdir()
        for name, points in layout.items():
            write_events(folder / name, 0, points)
    with pytest.raises(ToolError, match=message) as error:
        read_series(folder)
    assert "\n" not in str(error.value)


def panels(path: Path) -> int:
    """Number of panels of a picture, from its height."""
    import struct

    content = path.read_bytes()
    assert content.startswith(PNG_MAGIC)
    return round(struct.unpack(">I", content[20:24])[0] / (2.6 * 120))


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        pytest.param(["lm loss"], 1, id="loss"),
        pytest.param(["lm loss", "lm loss validation"], 1, id="loss-and-validation"),
        pytest.param(["lm loss", "learning-rate", "grad-norm", "tokens/s/GPU", "batch-size"], 4, id="all"),
    ],
)
def test_picture_has_a_panel_for_each_quantity(tmp_path: Path, tags: list[str], expected: int) -> None:
    draw({tag: Series([1, 2, 3], [3.0, float("nan"), 1.0]) for tag in tags}, "run", tmp_path / "loss.png")
    assert panels(tmp_path / "loss.png") == expected


def test_run_without_a_tag_to_draw_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ToolError, match="none of the tags to draw; the run logged batch-size"):
        draw({"batch-size": Series([1], [8.0])}, "run", tmp_path / "loss.png")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("output", [None, "picture.png", "picture.jpg"], ids=["default", "named", "not-a-png"])
def test_command_line_prints_start_and_end_of_the_loss(tmp_path: Path, output: str | None) -> None:
    write_events(tmp_path / "run", 0, {"lm loss": {1: 8.5, 2: 7.25, 3: 6.0}})
    options = [] if output is None else ["--output", str(tmp_path / output)]
    run = subprocess.run(
        [sys.executable, "-m", "megatron_hybrid.tools.plot_run", str(tmp_path / "run"), *options],
        capture_output=True,
        text=True,
        check=False,
    )
    if output == "picture.jpg":
        assert (run.returncode, run.stdout) == (1, "")
        assert run.stderr == f"error: --output {tmp_path / output}: the picture is a PNG; end the name in .png\n"
        return
    path = tmp_path / output if output else tmp_path / "run" / "loss.png"
    assert (run.returncode, run.stderr) == (0, "")
    assert (
        run.stdout == f"lm loss: 8.5000 at step 1 -> 6.0000 at step 3 (3 points)\n{path}\n{path.with_suffix('.html')}\n"
    )
    assert panels(path) == 1
    page = path.with_suffix(".html").read_text()
    assert base64.b64encode(path.read_bytes()).decode() in page and "http" not in page
    assert "<tr><td>lm loss</td><td>3</td><td>8.5</td><td>6</td><td>6</td><td>8.5</td></tr>" in page
