"""How long a plan will take here: a sample of its inputs is read and encoded, and the disks are timed."""

import os
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from megatron_hybrid.tools.cli import ToolError
from megatron_hybrid.tools.corpus.documents import LineParser
from megatron_hybrid.tools.corpus.plan import Plan
from megatron_hybrid.tools.corpus.shard import Progress, ShardWork
from megatron_hybrid.tools.corpus.streams import is_compressed_name, open_input
from megatron_hybrid.tools.corpus.worker import Settings, make_encoders, plan_tokenizer

WRITE_CHUNK_BYTES = 8 << 20
MAX_WRITTEN_BYTES = 2 << 30
CPU_SHARE, READ_SHARE, WRITE_SHARE = 0.6, 0.2, 0.2  # of the seconds given


class _Enough(Exception):
    """The time for a sample is over."""


@dataclass(frozen=True)
class Calibration:
    """What this machine does: input bytes per core-second, tokens per input byte, disk bytes per second."""

    input_bytes_per_core_s: float
    tokens_per_input_byte: float
    startup_s: float
    read_bytes_per_s: float
    write_bytes_per_s: float


def calibrate(plan: Plan, folder: Path, settings: Settings, seconds: float) -> Calibration:
    """Measures for about `seconds`; raises ToolError if no sample holds a document."""
    started = time.process_time()
    tokenizer = plan_tokenizer(plan)
    encoder, reference, _ = make_encoders(tokenizer, plan.options.special_tokens == "keep", settings.backend)
    startup = time.process_time() - started
    parser = LineParser(plan.options)
    folder.mkdir(parents=True, exist_ok=True)
    sample = plan.shards[:: max(1, len(plan.shards) // 16)][:16]
    input_bytes = tokens = 0.0
    cpu = 0.0
    for shard in sample:
        stop_at = time.monotonic() + seconds * CPU_SHARE / len(sample)
        with TemporaryDirectory(dir=folder) as scratch:
            last: list[Progress] = []

            def watch(progress: Progress, stop_at: float = stop_at, last: list[Progress] = last) -> None:
                last[:] = [progress]
                if time.monotonic() > stop_at:
                    raise _Enough

            work = ShardWork(
                plan, shard, tokenizer, encoder, reference, parser, Path(scratch), "skip", watch
            )  # fmt: skip
            begun = time.process_time()
            with suppress(_Enough, ToolError):
                work.run()
            cpu += time.process_time() - begun
            if last:
                input_bytes += last[0].text_bytes
                tokens += last[0].tokens
    if not tokens:
        raise ToolError("--calibrate-seconds: no document in the samples; pass 0 to plan without a prediction")
    return Calibration(
        input_bytes / cpu,
        tokens / input_bytes,
        startup,
        _read_rate(plan, seconds * READ_SHARE),
        _write_rate(folder, seconds * WRITE_SHARE),
    )


def _read_rate(plan: Plan, seconds: float) -> float:
    """Stored bytes per second read by one process from the largest files, the page cache included."""
    stop = time.monotonic() + seconds
    done, started = 0, time.monotonic()
    for file in sorted(plan.files, key=lambda file: -file.stored_bytes)[:16]:
        try:
            with open_input(file.path) as handle:
                while time.monotonic() < stop and (data := handle.read(WRITE_CHUNK_BYTES)):
                    done += len(data)
        except (ToolError, OSError):
            continue
    return max(done, 1) / max(time.monotonic() - started, 1e-6)


def _write_rate(folder: Path, seconds: float) -> float:
    """Bytes per second written to the output folder by one process, flushed to the disk."""
    path = folder / f".calibrate.{os.getpid()}"
    chunk = os.urandom(WRITE_CHUNK_BYTES)
    started = time.monotonic()
    done = 0
    try:
        with open(path, "wb") as handle:
            while done < MAX_WRITTEN_BYTES and (done == 0 or time.monotonic() - started < seconds / 2):
                done += handle.write(chunk)
            handle.flush()
            os.fsync(handle.fileno())
    finally:
        path.unlink(missing_ok=True)
    return done / max(time.monotonic() - started, 1e-6)


def _uncut(plan: Plan) -> list[str]:
    """A line about the compressed files that one worker must read alone, if there are any."""
    limit = 2 * plan.options.shard_bytes  # up to here a cut would gain little
    found = [
        (shard.estimated_bytes, plan.files[shard.segments[0].file].path)
        for shard in plan.shards
        if shard.estimated_bytes > limit and is_compressed_name(plan.files[shard.segments[0].file].path)
    ]
    if not found:
        return []
    size, path = max(found)
    return [
        f"  {len(found):,} compressed parts are larger than two shards, the largest about {size / 1e9:,.2f} GB "
        f"({path}): they are one frame each, or of very large ones, which one worker must read alone; files made by "
        "bgzip, pzstd or cat of smaller ones are cut"
    ]


def describe_plan(plan: Plan, folder: Path, settings: Settings, workers: int, seconds: float) -> str:
    """What `plan` prints: the work, and how long it will take with so many workers on this machine."""
    estimated = sum(shard.estimated_bytes for shard in plan.shards)
    stored = sum(file.stored_bytes for file in plan.files)
    lines = [
        f"{len(plan.files):,} files, {stored / 1e9:,.2f} GB stored, about {estimated / 1e9:,.2f} GB of input "
        f"uncompressed, {len(plan.shards):,} work shards, plan {plan.fingerprint} in {folder}"
    ]
    for source in plan.sources:
        own = [shard.estimated_bytes for shard in plan.shards if shard.source == source]
        lines.append(f"  {source}: {len(own):,} shards, about {sum(own) / 1e9:,.2f} GB")
    lines += _uncut(plan)
    if seconds <= 0:
        return "\n".join(lines)
    measured = calibrate(plan, folder, settings, seconds)
    tokens = estimated * measured.tokens_per_input_byte
    itemsize = 2 if plan.tokenizer["vocab_size"] < 65500 else 4
    written = tokens * itemsize
    core_s = estimated / measured.input_bytes_per_core_s + workers * measured.startup_s
    times = {
        "cpu": max(
            core_s / workers, max(shard.estimated_bytes for shard in plan.shards) / measured.input_bytes_per_core_s
        ),
        "read": stored / measured.read_bytes_per_s,
        "write": written / measured.write_bytes_per_s,
    }
    slowest = max(times, key=lambda name: times[name])
    lines += [
        f"measured: {measured.input_bytes_per_core_s / 1e6:,.1f} MB/s of input per core, disk reads "
        f"{measured.read_bytes_per_s / 1e6:,.0f} MB/s and writes {measured.write_bytes_per_s / 1e6:,.0f} MB/s",
        f"predicted: {tokens / 1e9:,.3f} G tokens, {written / 1e9:,.2f} GB of .bin, {core_s / 3600:,.4f} core-hours; "
        f"with {workers} worker{'s' if workers > 1 else ''} {times[slowest]:,.0f} s ({slowest} decides; "
        + ", ".join(f"{name} {value:,.0f} s" for name, value in times.items())
        + ")",
    ]
    return "\n".join(lines)
