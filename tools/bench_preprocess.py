"""How fast preprocessing is on one core of this machine, beside the encoder most tools use, on the same text.

    python -m megatron_hybrid.tools.bench_preprocess --input corpus.jsonl.zst --tokenizer-model tokenizer.json

Every process is pinned to one core. MB/s are of text (UTF-8 bytes of the documents) per CPU second of the
process, its start and its children included, so that other work on the machine matters little.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

from megatron_hybrid.tools.cli import Parser, ToolError, run_cli

REFERENCE_MB = 8.0  # of text the reference encodes; it is slow
STAGES = ("read", "parse", "encode", "check", "write", "rest")

RUN_SCRIPT = "import sys; from megatron_hybrid.tools import preprocess; preprocess.main()"
REFERENCE_SCRIPT = """
import json, sys, time, tokenizers
tokenizer = tokenizers.Tokenizer.from_file(sys.argv[1])
tokenizer.encode_special_tokens = True
texts = json.load(open(sys.argv[2]))
started = time.process_time()
for at in range(0, len(texts), 64):
    tokenizer.encode_batch_fast(texts[at : at + 64], add_special_tokens=False)
print(sum(len(text.encode()) for text in texts) / (time.process_time() - started))
"""
DATATROVE_SCRIPT = """
import sys
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.tokens import MegatronDocumentTokenizer
source, tokenizer, output = sys.argv[1:]
folder, _, name = source.rpartition("/")
LocalPipelineExecutor(
    pipeline=[
        JsonlReader(folder, glob_pattern=name),
        MegatronDocumentTokenizer(output_folder=output, tokenizer_name_or_path=tokenizer, eos_token="<|endoftext|>"),
    ],
    tasks=1,
    logging_dir=output + "/logs",
).run()
"""


@dataclass(frozen=True)
class Measured:
    """One process or several at once: CPU seconds of all, wall seconds, and the largest resident size."""

    cpu_s: float
    wall_s: float
    peak_bytes: int
    output: str


def measure(commands: list[list[str]], cores: list[int], environment: dict[str, str]) -> Measured:
    """Runs commands at the same time, each pinned to one of `cores`; raises ToolError if one fails."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.perf_counter()
    processes = [
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | environment,
            preexec_fn=lambda core=core: os.sched_setaffinity(0, {core}),  # type: ignore[misc]
        )
        for command, core in zip(commands, cores, strict=True)
    ]
    output = ""
    for command, process in zip(commands, processes, strict=True):
        out, errors = process.communicate()
        if process.returncode:
            raise ToolError(f"{' '.join(command[:3])}: failed: {errors.strip().splitlines()[-1:]}")
        output += out
    wall = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return Measured(cpu, wall, after.ru_maxrss * 1024, output)


def preprocess_command(source: Path, tokenizer: Path, output: Path, backend: str) -> list[str]:
    """The command line of one run of preprocess."""
    words = ["--input", str(source), "--tokenizer-model", str(tokenizer), "--output-dir", str(output)]
    return [sys.executable, "-c", RUN_SCRIPT, *words, "--append-eod", "--backend", backend, "--shard-bytes", "2G"]


class StageClock:
    """CPU seconds by stage of a run in this process; a stage inside another counts for the inner one."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(STAGES, 0.0)
        self._stack = ["rest"]
        self._since = time.process_time()

    def _switch(self) -> None:
        now = time.process_time()
        self.seconds[self._stack[-1]] += now - self._since
        self._since = now

    def timed(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, its time counted for `stage`."""

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            self._switch()
            self._stack.append(stage)
            try:
                return function(*args, **kwargs)
            finally:
                self._switch()
                self._stack.pop()

        return wrapper

    def timed_iterator(self, stage: str, items: Iterable[Any]) -> Iterator[Any]:
        """`items`, the time to get each counted for `stage`."""
        get = self.timed(stage, iter(items).__next__)
        while True:
            try:
                item = get()
            except StopIteration:
                return
            yield item


def stage_shares(source: Path, tokenizer: Path, folder: Path) -> dict[str, float]:
    """Share of the CPU time of a run that each of STAGES takes, imports and loading left out."""
    from megatron_hybrid.tools import preprocess
    from megatron_hybrid.tools.corpus import documents, shard
    from megatron_hybrid.tools.corpus.shard import ShardWork
    from megatron_hybrid.tools.indexed_dataset import IndexedDatasetWriter

    clock = StageClock()
    read_chunks = documents.read_chunks

    class TimedEncoder:
        """The encoder of a worker, its time counted."""

        def __init__(self, encoder: Any) -> None:
            self.name = encoder.name
            self.encode = clock.timed("encode", encoder.encode)

    run_shard = ShardWork.run

    def run(work: Any) -> Any:
        work.encoder = TimedEncoder(work.encoder)
        clock._switch()
        clock.seconds = dict.fromkeys(STAGES, 0.0)
        try:
            return run_shard(work)
        finally:
            clock._switch()

    patches = [
        mock.patch.object(
            documents, "read_chunks", lambda *args, **kw: clock.timed_iterator("read", read_chunks(*args, **kw))
        ),
        mock.patch.object(documents.LineParser, "block", clock.timed("parse", documents.LineParser.block)),
        mock.patch.object(ShardWork, "_check", clock.timed("check", ShardWork._check)),
        mock.patch.object(shard, "insert_eod", clock.timed("write", shard.insert_eod)),
        mock.patch.object(
            IndexedDatasetWriter, "add_documents", clock.timed("write", IndexedDatasetWriter.add_documents)
        ),
        mock.patch.object(IndexedDatasetWriter, "commit", clock.timed("write", IndexedDatasetWriter.commit)),
        mock.patch.object(ShardWork, "run", run),
    ]
    words = ["--input", str(source), "--tokenizer-model", str(tokenizer), "--output-prefix", str(folder / "stages")]
    with ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        preprocess.run(preprocess.parser().parse_args([*words, "--append-eod", "--shard-bytes", "100G"]))
    total = sum(clock.seconds.values())
    return {stage: seconds / total for stage, seconds in clock.seconds.items()}


def sample_texts(source: Path, key: str, megabytes: float) -> list[str]:
    """The first documents of a file, about so many MB of text."""
    from megatron_hybrid.tools.jsonl_reader import RejectedLine, parse_text, read_lines

    texts, size = [], 0
    for number, line in read_lines(source):
        try:
            texts.append(parse_text(line, key, number == 1))
        except RejectedLine:
            continue
        size += len(texts[-1].encode())
        if size > megabytes * 1e6:
            break
    return texts


def shard_cpu_seconds(output: Path) -> float:
    """CPU seconds the work shards of a finished run took, from its ledger: start-up is not in them."""
    events = [
        json.loads(line.partition(" ")[2])
        for path in (output / "work" / "ledger").iterdir()
        for line in path.read_text().splitlines()
    ]
    return sum(event["cpu_seconds"] for event in events if event["event"] == "done")


class Bench:
    """The measurements of one table."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.args, self.folder = args, folder
        self.cores = sorted(os.sched_getaffinity(0))
        self.rows: list[tuple[str, str]] = []
        self.sample = folder / "sample.json"
        self.texts = sample_texts(args.input, "text", args.reference_mb)
        self.sample.write_text(json.dumps(self.texts))

    def measure(self, *commands: list[str]) -> Measured:
        """Runs commands at the same time, one core each."""
        environment = {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
        return measure(list(commands), self.cores[-len(commands) :], environment)

    def reference(self) -> float:
        """MB/s of encode_batch_fast, encoding alone."""
        command = [sys.executable, "-c", REFERENCE_SCRIPT, str(self.args.tokenizer_model), str(self.sample)]
        return float(self.measure(command).output) / 1e6

    def tool(self, backend: str) -> None:
        """Adds the rows of preprocess with one backend, between two runs of the reference."""
        before = self.reference()
        outputs = [self.folder / f"{backend}{number}" for number in range(3)]
        commands = [preprocess_command(self.args.input, self.args.tokenizer_model, path, backend) for path in outputs]
        one = self.measure(commands[0])
        reference = (before + self.reference()) / 2
        content = json.loads((outputs[0] / "manifest.json").read_bytes())
        text_mb = sum(source["text_bytes"] for source in content["sources"].values()) / 1e6
        steady = text_mb / shard_cpu_seconds(outputs[0])
        tokens = content["tokens"] / text_mb / 1e6
        self.rows += [
            (f"{backend}, one process", f"{steady:.1f} MB/s per core, {steady * tokens:.1f} M tokens/s"),
            (
                "  with start-up",
                f"{text_mb / one.cpu_s:.1f} MB/s ({text_mb:.0f} MB of text, {one.cpu_s:.2f} CPU s, {one.wall_s:.2f} s, "
                f"peak {one.peak_bytes / 1e6:.0f} MB)",
            ),
            ("  tokenizers encode_batch_fast, encoding alone", f"{reference:.2f} MB/s per core"),
            ("  ratio", f"{steady / reference:.1f}, with start-up {text_mb / one.cpu_s / reference:.1f}"),
        ]
        if len(self.cores) > 1:
            two = self.measure(*commands[1:])
            again = self.measure(
                preprocess_command(self.args.input, self.args.tokenizer_model, self.folder / "x", backend)
            )
            ratio = (one.wall_s + again.wall_s) / two.wall_s
            by_cpu = 2 * (one.cpu_s + again.cpu_s) / two.cpu_s  # what it is where no other work takes the cores
            self.rows.append(("  two processes to one", f"{ratio:.2f} by wall time, {by_cpu:.2f} by CPU time"))

    def datatrove(self) -> None:
        """Adds the row of datatrove's writer of Megatron files."""
        plain = self.folder / "datatrove" / "sample.jsonl"
        plain.parent.mkdir()
        plain.write_text("".join(json.dumps({"text": text}) + "\n" for text in self.texts))
        words = [str(plain), str(self.args.tokenizer_model), str(self.folder / "datatrove-out")]
        result = self.measure([self.args.datatrove_python, "-c", DATATROVE_SCRIPT, *words])
        rate = sum(len(text.encode()) for text in self.texts) / 1e6 / result.cpu_s
        self.rows.append(("datatrove MegatronDocumentTokenizer, with start-up", f"{rate:.2f} MB/s per core"))


def bench(args: argparse.Namespace) -> list[tuple[str, str]]:
    """Measures everything; returns (what, value) rows."""
    with TemporaryDirectory(dir=args.scratch) as name:
        table = Bench(args, Path(name))
        for backend in args.backend:
            table.tool(backend)
        if args.datatrove_python:
            table.datatrove()
        shares = stage_shares(args.input, args.tokenizer_model, Path(name))
        table.rows.append(("share of CPU time", ", ".join(f"{stage} {share:.0%}" for stage, share in shares.items())))
        return table.rows


def parser() -> argparse.ArgumentParser:
    """The command line of this tool."""
    result = Parser(
        prog="python -m megatron_hybrid.tools.bench_preprocess",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument(
        "--input", type=Path, required=True, metavar="FILE", help="JSONL, best .zst, 100 MB of text or more"
    )
    result.add_argument("--tokenizer-model", type=Path, required=True, metavar="FILE", help="tokenizer.json")
    result.add_argument(
        "--backend", nargs="+", default=["fastokens"], choices=("fastokens", "gigatoken"), help="encoders to measure"
    )
    result.add_argument(
        "--reference-mb", type=float, default=REFERENCE_MB, metavar="MB", help="text the slow encoders get (default: 8)"
    )
    result.add_argument("--scratch", type=Path, metavar="DIR", help="folder for outputs (default: the system's)")
    result.add_argument(
        "--datatrove-python", metavar="PYTHON", help="interpreter that has datatrove, to measure it too"
    )
    return result


def main() -> None:
    """Command-line entry point."""
    rows = bench(parser().parse_args())
    width = max(len(what) for what, _ in rows)
    for what, value in rows:
        print(f"{what:<{width}}  {value}")


if __name__ == "__main__":
    run_cli(main)
