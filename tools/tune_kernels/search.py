"""Candidates for the launches of each kernel, timed and checked on this GPU, or compiled for one that is not here."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import torch
import triton

from megatron_hybrid.kernels.configs import DEFAULTS, TABLE, Launch, current_key, known_bad, trial

#: Tried for each kernel besides the default. Columns stay at 64 where a matrix product wants 64 rows.
CANDIDATES = {
    "conv": [Launch(1, 1, 32), Launch(2, 1, 16), Launch(4, 1, 16)],
    "diagonal": [],
    "prepare": [Launch(4, 1, 0, 96), Launch(4, 1, 0, 128)],
    "prepare_normalising": [Launch(4, 1, 0, 96), Launch(4, 1, 0, 128)],
    "scan": [Launch(4, 3, 64), Launch(4, 4, 64)],
    "scan_again": [Launch(4, 1, 64), Launch(4, 3, 64)],
    "norm": [Launch(warps, 1, rows) for warps, rows in ((1, 4), (1, 8), (2, 8), (2, 16), (4, 8), (4, 32), (8, 32))],
    "norm_backward": [Launch(4, 1, 16), Launch(4, 1, 4), Launch(2, 1, 4), Launch(2, 1, 4, 128), Launch(8, 1, 16, 128)],
    "adjoint_scan": [Launch(4, 3, 64), Launch(4, 4, 64)],
    "query_gradient": [Launch(8, 2, 64, 128), Launch(8, 3, 64, 128), Launch(4, 2, 64), Launch(4, 2, 64, 168)],
    "inverse_gradient": [Launch(4, 1, 64, 160), Launch(4, 2, 64, 160), Launch(4, 3, 64, 160), Launch(8, 1, 64)],
    "key_gradient": [Launch(8, 3, 64, 128), Launch(8, 1, 32, 128), Launch(8, 2, 32, 128), Launch(4, 3, 32)],
    "conv_backward": [Launch(1, 1, 256), Launch(2, 1, 256), Launch(2, 1, 128)],
    "decode": [Launch(4, 1), Launch(16, 1)],
}
#: The same for K above 128: three stages of a scan do not fit; 4 warps, or 128 registers, spill by hundreds.
WIDE = {
    "prepare": [Launch(8, 1)],
    "prepare_normalising": [Launch(8, 1)],
    "scan": [Launch(8, 2, 64)],
    "scan_again": [Launch(8, 2, 64)],
    "adjoint_scan": [Launch(8, 2, 64)],
    "query_gradient": [Launch(8, 1, 64), Launch(8, 3, 64)],
    "key_gradient": [Launch(8, 1, 32), Launch(8, 1, 64)],
}


def candidates(K: int) -> dict[str, list[Launch]]:
    """By kernel, for heads of this key dim."""
    return CANDIDATES | (WIDE if K > 128 else {})


def mixer(H: int, K: int, V: int, T: int, device: str) -> Callable[[], Any]:
    """Forward and backward of one mixer core, no states kept and then all, and of one delta rule with some states."""
    from megatron_hybrid.kernels.triton_autograd import DeltaRule, MixerCore, Options

    D = 2 * H * K + H * V
    bf16: dict[str, Any] = {"dtype": torch.bfloat16, "device": device}
    qkvz, ab = torch.randn(1, T, D + H * V, **bf16), torch.randn(1, T, 2 * H, **bf16)
    weight, norm = 0.3 * torch.randn(D, 4, **bf16), torch.ones(V, **bf16)
    A_log, dt_bias = torch.zeros(H, device=device), torch.full((H,), -3.0, device=device)
    dy = torch.randn(1, T, H, V, **bf16)

    def run() -> None:
        x, gates = qkvz.detach().requires_grad_(), ab.detach().requires_grad_()
        for keep in (False, True):
            options = Options(K**-0.5, keep_intermediates=keep)
            y, _ = MixerCore.apply(
                x, gates, weight, A_log, dt_bias, norm, None, None, (H, H, K, V), options, None, False, None
            )  # fmt: skip
            torch.autograd.grad(y, [x, gates], dy)
        q, k, v = (part.unflatten(2, (H, -1)) for part in x[..., :D].split([H * K, H * K, H * V], dim=-1))
        a, b = gates.chunk(2, dim=-1)
        options = Options(K**-0.5, states_every=32)
        o, _ = DeltaRule.apply(q, k, v, a, b, A_log, dt_bias, None, options, None, False)
        torch.autograd.grad(o, [x], dy)

    return run


def decoding(H: int, K: int, V: int, rows: int, device: str) -> Callable[[], Any]:
    """One token of each row."""
    from megatron_hybrid.kernels.gated_delta import decode_step

    D = 2 * H * K + H * V
    bf16: dict[str, Any] = {"dtype": torch.bfloat16, "device": device}
    inputs = [torch.zeros(rows, D + H * V, **bf16), torch.zeros(rows, 2 * H, **bf16), torch.zeros(rows, D, 3, **bf16)]
    state = torch.zeros(rows, H, K, V, device=device)
    weight, norm, (A_log, dt_bias) = torch.zeros(D, 4, **bf16), torch.ones(V, **bf16), torch.zeros(2, H, device=device)
    tensors: tuple[Any, ...] = (*inputs, state, weight, A_log, dt_bias, norm)
    return lambda: decode_step(*tensors, num_key_heads=H, backend="triton")


def report(H: int, K: int, V: int, targets: list[int]) -> None:
    """Compile every launch of one call, and of one token's, for each target and print what it takes."""
    from megatron_hybrid.kernels.inspection import compile_for, recording, resources
    from megatron_hybrid.tools.tune_kernels.traffic import needed_bytes

    entry = TABLE.get(("sm_90", "3.6", K, V), DEFAULTS)
    sizes = 128, 256  # tokens: what grows between them is bytes per token, weights and states are not
    found = []
    for tokens in sizes:
        with recording(**entry) as launches:
            mixer(H, K, V, tokens, "cpu")()
            decoding(H, K, V, tokens, "cpu")()
        found.append(launches)
    print(f"triton {triton.__version__}, K = {K}, V = {V}; bytes: per token of {H} heads, for decode per row")
    print(
        f"{'kernel':<16} {'target':>7} {'warps':>5} {'stages':>6} "
        f"{'regs':>5} {'stack':>6} {'spills':>6} {'shared':>7} {'warps/SM':>8} {'bytes':>9}"
    )
    seen = set()
    for small, launch in zip(*found, strict=True):
        for target in targets:
            compiled = compile_for(launch, target)
            if (launch.name, compiled.hash) in seen:
                continue
            seen.add((launch.name, compiled.hash))
            used = resources(compiled)
            warps = launch.options["num_warps"] or 1
            # 65,536 registers of a multiprocessor, and 228 KiB of shared memory, of which each block takes 1 KiB more.
            by_registers = 65536 // (max(used.registers, 1) * 32 * warps)
            by_shared = 233472 // (used.shared_bytes + 1024)
            resident = min(by_registers, by_shared, 32, 64 // warps) * warps
            grown = (needed_bytes(launch, compiled) - needed_bytes(small, compiled)) / (sizes[1] - sizes[0])
            shapes = ", ".join(f"{name} x{count}" for name, count in sorted(used.instructions.items()))
            print(
                f"{launch.name:<16} {f'sm_{target}':>7} {warps:>5} {launch.options['num_stages']:>6} "
                f"{used.registers:>5} {used.stack_bytes:>6} {used.spill_bytes:>6} {used.shared_bytes:>7} "
                f"{resident:>8} {grown:>9.0f}  {shapes}".rstrip()
            )
            for instruction in used.strange:
                print(f"{launch.name:<16} {f'sm_{target}':>7} WRONG, reads other shared memory: {instruction}")


#: Each is compiled into kernels of its own.
POLICIES: list[dict[str, Any]] = [{}, {"states_every": 1}, {"states_every": 2}, {"keep_intermediates": True}]


def passes(K: int, V: int, launches: dict[str, Launch]) -> str:
    """What is wrong with these launches on this GPU, or nothing."""
    from megatron_hybrid.kernels import self_test

    device = torch.device("cuda")
    try:
        with trial(**launches):
            for kept in POLICIES:
                if wrong := self_test.beyond(self_test.errors_of_both(K, V, device, **kept)):
                    return f"mixer, {kept or 'nothing kept'}: {wrong}"
            if wrong := self_test.beyond(self_test.delta_rule_errors(K, V, device)):
                return f"delta rule: {wrong}"
            if wrong := self_test.beyond(self_test.decode_errors(K, V, device), self_test.DECODED):
                return f"decode: {wrong}"
    except (RuntimeError, ValueError, triton.runtime.errors.OutOfResources) as problem:
        return str(problem).splitlines()[0]
    return ""


def alone(kernel: str, run: Callable[[], Any]) -> list[float]:
    """Milliseconds that each launch of one kernel in `run` takes by itself.

    Raises RuntimeError, before it runs, where its code reads other shared memory than its own.
    """
    from megatron_hybrid.kernels.inspection import holder, resources

    module = holder(kernel)
    name = f"{kernel.removesuffix('_again').removesuffix('_normalising')}_kernel"
    original = getattr(module, name)
    again: list[Callable[[], Any]] = []

    class Recorder:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            def launch(*args: Any, **kwargs: Any) -> None:
                if strange := resources(original.warmup(*args, grid=grid, **kwargs)).strange:
                    raise RuntimeError(f"compiled wrongly, reads other shared memory than its own: {strange[0]}")
                original[grid](*args, **kwargs)
                again.append(lambda: original[grid](*args, **kwargs))

            return launch

    setattr(module, name, Recorder())
    try:
        run()
    finally:
        setattr(module, name, original)
    return [float(triton.testing.do_bench_cudagraph(launch, rep=20, return_mode="median")) for launch in again]


def serve(connection: Connection, H: int, K: int, V: int, T: int) -> None:
    """Answers (launches, kernel) with its times, or with what is wrong; (launches, None) with what `passes` says."""
    run, decode = mixer(H, K, V, T, "cuda"), decoding(H, K, V, 64, "cuda")
    while True:
        launches, kernel = connection.recv()
        if kernel is None:
            connection.send(passes(K, V, launches))
            continue
        try:
            with trial(**launches):
                connection.send(alone(kernel, decode if kernel == "decode" else run))
        except (RuntimeError, ValueError, triton.runtime.errors.OutOfResources) as problem:
            connection.send(str(problem).splitlines()[0])


class Child:
    """A process that runs candidates: an illegal access ends all CUDA work in it, and must not end the search."""

    def __init__(self, *sizes: int) -> None:
        self.sizes = sizes
        self.process: BaseProcess | None = None

    def ask(self, launches: dict[str, Launch], kernel: str | None) -> Any:
        context = get_context("spawn")
        if self.process is None:
            self.connection, theirs = context.Pipe()
            self.process = context.Process(target=serve, args=(theirs, *self.sizes), daemon=True)
            self.process.start()
            theirs.close()
        try:
            self.connection.send((launches, kernel))
            answer = self.connection.recv()
        except (EOFError, OSError):
            answer = "its process died"
        if answer and isinstance(answer, str):
            self.end()
        return answer

    def end(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process = None


def compile_ahead(sizes: tuple[int, int, int, int], kernels: dict[str, list[Launch]]) -> None:
    """Run every candidate once, many side by side: compilation takes most of a search, and triton keeps its results."""
    jobs = [(kernel, launch) for kernel, launches in kernels.items() for launch in launches]
    lanes = min(os.cpu_count() or 1, 12, len(jobs))
    print(f"compiling {len(jobs)} candidates, {lanes} at a time", flush=True)

    def run(share: list[tuple[str, Launch]]) -> None:
        child = Child(*sizes)
        for kernel, launch in share:
            child.ask({kernel: launch}, kernel)
        child.end()

    with ThreadPoolExecutor(lanes) as pool:
        list(pool.map(run, (jobs[i::lanes] for i in range(lanes))))


def tune(H: int, K: int, V: int, T: int) -> None:
    """One kernel after the other, each with the best of those before it."""
    architecture, version = current_key()
    if reason := known_bad(architecture, version):
        raise SystemExit(
            f"error: {architecture} with triton {version}: {reason}; no launch can be trusted here: take a triton "
            "without that fault, or train with --gdn-backend reference"
        )
    compile_ahead((H, K, V, T), candidates(K))
    best, child = dict(DEFAULTS), Child(H, K, V, T)
    for kernel, others in candidates(K).items():
        timed = []
        for candidate in [best[kernel], *others]:
            times = child.ask(best | {kernel: candidate}, kernel)
            if isinstance(times, str):
                print(f"{kernel:<14} {tuple(candidate)}  refused: {times}", flush=True)
                continue
            timed.append((sum(times), candidate))
            print(f"{kernel:<14} {tuple(candidate)}  us: {', '.join(f'{1e3 * ms:.1f}' for ms in times)}", flush=True)
        for _, candidate in sorted(timed, key=lambda pair: pair[0]):
            problem = child.ask(best | {kernel: candidate}, None)
            if not problem:
                best[kernel] = candidate
                break
            print(f"{kernel:<14} {tuple(candidate)}  refused: {problem}", flush=True)
        else:
            raise SystemExit(f"no configuration of {kernel} passes: use the reference backend for K = {K}, V = {V}")
    print(f'("{architecture}", "{version}", {K}, {V}): {{')
    for kernel, launch in best.items():
        print(f'    "{kernel}": {launch},')
    print(f"}},  # {torch.cuda.get_device_name()}")
