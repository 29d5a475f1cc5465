"""The process that runs visits, one after another; its parent starts another one when it ends."""

from __future__ import annotations

import json
import logging
import os
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from megatron_hybrid.compat import software
from megatron_hybrid.tools.gpu_bench import harness
from megatron_hybrid.tools.gpu_bench.cases import Case, visits

#: A visit that leaves more behind is the last of its process, so that the next one has all the memory.
MOST_LEFT_BYTES = 2**29


def run(cases: list[Case], first: int, events: Path, deadline: float, tokens_file: str | None) -> None:
    """Visits from number `first` on; every beginning and end is a line of `events`."""
    logging.disable(logging.WARNING)
    plan = visits(cases)
    _write(events, {"event": "about", "software": software()})
    tokens = {False: harness.read_tokens(None), True: harness.read_tokens(tokens_file)}
    harness.start()
    before = harness.live_bytes()
    for index in range(first, len(plan)):
        case, number = plan[index]
        began = time.time()
        if began > deadline:
            _write(events, {"event": "end", "visit": index, "error": "not run: no time left"})
            continue
        _write(events, {"event": "begin", "visit": index, "time": began})
        result = _visit(case, tokens[case.text])
        left = harness.live_bytes() - before
        result |= {"seconds": time.time() - began, "left_bytes": left}
        _write(events, {"event": "end", "visit": index, "round": number, **result})
        if left > MOST_LEFT_BYTES:
            return


def _write(events: Path, entry: dict[str, Any]) -> None:
    with events.open("a") as file:
        file.write(json.dumps(entry) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _visit(case: Case, tokens: torch.Tensor) -> dict[str, Any]:
    if torch.cuda.is_available() or case.needs_gib:
        have = torch.cuda.get_device_properties(0).total_memory / 2**30 if torch.cuda.is_available() else 0
        if have < case.needs_gib:
            return {"error": f"not run: needs {case.needs_gib:.0f} GiB of GPU memory, this one has {have:.0f}"}
    harness.free()
    try:
        return RUNNERS[case.kind](case, tokens)
    except torch.OutOfMemoryError:
        return {"error": "out of memory", "peak_bytes": harness.peak_bytes()}
    except BaseException as error:  # SystemExit too: Megatron's parser raises it
        traceback.print_exc()
        if isinstance(error, KeyboardInterrupt):
            raise
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    finally:
        harness.free()


def _train(case: Case, tokens: torch.Tensor) -> dict[str, Any]:
    model = harness.Trained(harness.parse(case.preset, case.flags), tokens, case.optimizer)
    try:
        return _steps(case, model, model.tokens_per_step, model.flops_per_step)
    finally:
        model.close()


def _steps(case: Case, model: Any, tokens_per_step: int, flops: float) -> dict[str, Any]:
    first = [model.step() for _ in range(case.warmup)]
    steps = [model.step() for _ in range(case.steps)]
    return {
        "ms": [step["ms"] for step in steps],
        "backward_ms": [step["backward_ms"] for step in steps],
        "losses": [step["loss"] for step in (*first, *steps)],
        "tokens": tokens_per_step,
        "flops": flops,
        "peak_bytes": harness.peak_bytes(),
    }


def _peer(case: Case, tokens: torch.Tensor) -> dict[str, Any]:
    from megatron_hybrid.flops import Sizes, training_flops_per_token
    from megatron_hybrid.tools.gpu_bench import peer

    args = harness.parse(case.preset, case.flags)
    count = args.seq_length * args.global_batch_size
    flops = count * training_flops_per_token(Sizes.from_args(args), args.hybrid_layer_pattern, args.seq_length)
    if case.kind == "huggingface":
        model = peer.huggingface(args, tokens)
    else:
        model = peer.olmo_core(args, tokens, compiled=bool(case.options["compiled"]))
    try:
        return {**_steps(case, model, count, flops), "note": model.note()}
    finally:
        model.close()


def _profile(case: Case, tokens: torch.Tensor) -> dict[str, Any]:
    from megatron_hybrid.tools.gpu_bench.profiling import profile_step

    model = harness.Trained(harness.parse(case.preset, case.flags), tokens)
    try:
        for _ in range(case.warmup):
            model.step()
        return {"profile": profile_step(model.step)}
    finally:
        model.close()


def _decode(case: Case, tokens: torch.Tensor) -> dict[str, Any]:
    from megatron_hybrid.tools.gpu_bench.decode import Decoder

    rows = {}
    args = harness.parse(case.preset, case.flags)
    layers = len(args.hybrid_layer_pattern)
    for name, pattern, windows in (
        ("hybrid", args.hybrid_layer_pattern, False),
        ("transformer, sliding windows", "*" * layers, True),
        ("transformer, full attention", "*" * layers, False),
    ):
        args.hybrid_layer_pattern = pattern
        args.window_size, args.window_attn_skip_freq = ((4095, 0), 4) if windows else (None, None)
        decoder = Decoder(args, case.options["context"])
        rows[name] = {"ms": decoder.measure(), "state_bytes": decoder.state_bytes}
        del decoder
        harness.free()
    return {"decode": rows}


RUNNERS = {"train": _train, "huggingface": _peer, "olmo_core": _peer, "profile": _profile, "decode": _decode}
