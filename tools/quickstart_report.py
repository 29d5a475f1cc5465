"""The summary table at the end of examples/quickstart.sh, from the files the run left."""

import json
from pathlib import Path

from megatron_hybrid.tools.cli import Parser, ToolError, run_cli
from megatron_hybrid.tools.plot_run import LOSS, read_series
from megatron_hybrid.tools.watch_training import read_iterations


def summary(run: Path, ranks: int, device: str) -> str:
    """The table as text.

    Args:
        run: the quickstart's folder: settings.json, train.log, tensorboard/ and the rest.
        ranks: how many trained.
        device: 'cpu' or the GPU's name.

    Raises:
        ToolError: the log holds no iteration, or TensorBoard's files no loss.
    """
    iterations = read_iterations(run / "train.log")
    if not iterations:
        raise ToolError(f"{run / 'train.log'}: no training iteration in it; look there for what went wrong")
    settings = json.loads((run / "settings.json").read_text())
    tokens = settings["seq_length"] * settings["global_batch_size"]
    # Megatron's log line shows the mean of the first two iterations at the second one; TensorBoard has each.
    loss = read_series(run / "tensorboard")[LOSS]
    times = sorted(it.milliseconds for it in iterations)
    rows = [
        ("trained on", f"{ranks} x {device}"),
        ("iterations", f"{iterations[-1].step} ({tokens:,} tokens each), stopped and resumed at {settings['stop']}"),
        ("loss at start", f"{loss.start:.3f}"),
        ("loss at end", f"{loss.end:.3f}"),
        ("tokens/s", f"{tokens / times[len(times) // 2] * 1000:,.0f} (median iteration)"),
        ("corpus", str(run / "corpus.jsonl.zst")),
        ("tokenizer", str(run / "tokenizer.model")),
        ("dataset", f"{run / 'data'}.bin, .idx, .json"),
        ("checkpoints", str(run / "checkpoints")),
        ("Hugging Face", str(run / "huggingface")),
        ("logits vs transformers", _line((run / "logits.txt").read_text(), "max abs difference")),
        ("TensorBoard", str(run / "tensorboard")),
        ("loss curve", str(run / "loss.png")),
        ("log", str(run / "train.log")),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _line(text: str, start: str) -> str:
    """The line of a table that begins with `start`, its spaces collapsed."""
    return next(" ".join(line.split()) for line in text.splitlines() if line.startswith(start))


def main() -> None:
    """Command-line entry point."""
    parser = Parser(prog="python -m megatron_hybrid.tools.quickstart_report", description=__doc__)
    parser.add_argument("run", type=Path, help="folder of the quickstart's run")
    parser.add_argument("--ranks", type=int, required=True)
    parser.add_argument("--device", required=True)
    args = parser.parse_args()
    text = summary(args.run, args.ranks, args.device)
    (args.run / "summary.txt").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    run_cli(main)
