"""Times and errors of the Gated DeltaNet kernels and of flash-linear-attention's, on this GPU."""

from __future__ import annotations

import argparse
import importlib.util
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from megatron_hybrid.kernels import gated_delta
from megatron_hybrid.tools.bench_kernels.errors import measure_errors
from megatron_hybrid.tools.gpu_bench.fla import allow_fla_backward, compile_side_by_side

Run = Callable[[], Any]
#: At least those of a GPU's clock, which the time it is kept busy for is counted in.
CYCLES_PER_S = 2e9


class Case:
    """One shape: inputs of both implementations, as leaves."""

    def __init__(self, B: int, T: int, H: int, K: int, V: int, packed: int) -> None:
        generator = torch.Generator("cuda").manual_seed(0)

        def rand(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device="cuda")

        self.B, self.T, self.H, self.K, self.V = B, T, H, K, V
        self.D = 2 * H * K + H * V
        self.cu_seqlens = None
        if packed:
            self.cu_seqlens = torch.arange(packed + 1, device="cuda", dtype=torch.int32) * (T // packed)
        self.qkvz = rand(B, T, self.D + H * V).bfloat16().requires_grad_()
        self.ab = rand(B, T, 2 * H).bfloat16().requires_grad_()
        self.conv_weight = (0.3 * rand(self.D, 4)).bfloat16().requires_grad_()
        self.A_log = rand(H).uniform_(0.05, 16, generator=generator).log().requires_grad_()
        dt = rand(H).uniform_(-6.9, -2.3, generator=generator).exp()
        self.dt_bias = (dt + torch.log(-torch.expm1(-dt))).requires_grad_()
        self.norm_weight = torch.ones(V, device="cuda", dtype=torch.bfloat16).requires_grad_()
        self.dy = rand(B, T, H, V).bfloat16()
        # What flash-linear-attention's layer holds: tensors of their own. Making them is not timed.
        self.parts = [x.detach().contiguous() for x in self.qkvz.split([H * K, H * K, H * V, H * V], dim=-1)]
        self.parts = [x.unflatten(2, (H, -1)).requires_grad_() for x in self.parts]
        self.qkv = self.qkvz.detach()[..., : self.D].contiguous().requires_grad_()
        self.a, self.b = (x.detach().contiguous().requires_grad_() for x in self.ab.chunk(2, dim=-1))

    def ours_op(self, **kept: Any) -> tuple[Run, list[Tensor]]:
        q, k, v = self.parts[:3]
        leaves = [q, k, v, self.a, self.b, self.A_log, self.dt_bias]
        return lambda: gated_delta.gated_delta_rule(*leaves, cu_seqlens=self.cu_seqlens, **kept)[0], leaves

    def ours_mixer(self, **kept: Any) -> tuple[Run, list[Tensor]]:
        leaves = [self.qkvz, self.ab, self.conv_weight, self.A_log, self.dt_bias, self.norm_weight]
        sizes = {"num_key_heads": self.H, "num_value_heads": self.H, "key_dim": self.K, "value_dim": self.V}
        options: dict[str, Any] = sizes | {"cu_seqlens": self.cu_seqlens} | kept
        return lambda: gated_delta.mixer_core(*leaves, **options)[0].view(self.dy.shape), leaves

    def fla_op(self) -> tuple[Run, list[Tensor]]:
        q, k, v = self.parts[:3]
        leaves = [q, k, v, self.a, self.b, self.A_log, self.dt_bias]
        return lambda: gated_delta.gated_delta_rule(*leaves, cu_seqlens=self.cu_seqlens, backend="fla")[0], leaves

    def fla_mixer(self) -> tuple[Run, list[Tensor]]:
        from fla.modules.causal_conv1d import causal_conv1d
        from fla.modules.norm.fused_norm_gate import rms_norm_gated

        H, K, V, z = self.H, self.K, self.V, self.parts[3]
        leaves = [self.qkv, z, self.a, self.b, self.conv_weight, self.A_log, self.dt_bias, self.norm_weight]

        def run() -> Tensor:
            x, _ = causal_conv1d(x=self.qkv, weight=self.conv_weight, activation="silu", cu_seqlens=self.cu_seqlens)
            q, k, v = (y.unflatten(2, (H, -1)) for y in x.split([H * K, H * K, H * V], dim=-1))
            o, _ = gated_delta.gated_delta_rule(
                q, k, v, self.a, self.b, self.A_log, self.dt_bias, cu_seqlens=self.cu_seqlens, backend="fla"
            )
            return rms_norm_gated(o, z, self.norm_weight, None, activation="swish", eps=1e-5)

        return run, leaves

    def needs(self, kind: str) -> tuple[float, float]:
        """(bytes, FLOPs) that the mathematics needs, states neither saved nor read: inputs once, outputs once."""
        tokens, H, K, V = self.B * self.T, self.H, self.K, self.V
        qk, v, chunks = 2 * tokens * H * 2 * K, 2 * tokens * H * V, tokens / 64 * H
        big, by_v, by_k = 2 * 64 * K * V, 2 * 64 * 64 * V, 2 * 64 * 64 * K
        forward = chunks * (3 * big + 2 * by_v + 2 * by_k)
        backward = chunks * (7 * big + 5 * by_v + 5 * by_k)
        qkv = qk + v
        sizes = {
            "op forward": (qkv + v, forward),
            "op forward + backward": (qkv + v + qkv + v + qkv, forward + backward),  # dO in, dQ, dK, dV out
            "mixer forward": (qkv + 2 * v, forward),
            "mixer forward + backward": (qkv + 2 * v + qkv + 2 * v + qkv + v, forward + backward),
        }
        return sizes[kind]


def alternate(runs: dict[str, Run], repeats: int, queued: bool = False) -> dict[str, list[float]]:
    """Milliseconds of each, taking turns, after two rounds of warm-up.

    queued: all launches of a run are made before the GPU begins with the first, as in training, where the host is ahead
    of it; else it may wait for the host.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    longest = 0.0  # that the host took for a run
    for i in range(repeats + 2):
        for name, run in runs.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize()
            if queued and i > 0:  # the first run compiles
                torch.cuda._sleep(int(CYCLES_PER_S * (2 * longest + 0.002)))
            begun = time.perf_counter()
            start.record()
            run()
            end.record()
            took = time.perf_counter() - begun
            was_ahead = not start.query()
            torch.cuda.synchronize()
            if i > 0:
                longest = min(max(longest, took), 0.1)  # what waits for the GPU waits for this sleep too
            if i >= 2 and (was_ahead or not queued):
                times[name].append(start.elapsed_time(end))
    if short := [name for name, found in times.items() if len(found) <= repeats // 2]:
        raise RuntimeError(f"{', '.join(short)}: the host was not ahead of the GPU in half of the runs; run again")
    return times


def ceilings() -> tuple[float, float]:
    """(bytes per second of a large copy, read plus written; FLOP per second of a large bf16 product)."""
    x, y = (torch.empty(2**31, dtype=torch.int8, device="cuda") for _ in range(2))
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    times = alternate({"copy": lambda: y.copy_(x), "matmul": lambda: a @ b}, 10)
    copy, matmul = (sorted(times[name])[5] / 1e3 for name in ("copy", "matmul"))
    return 2 * 2**31 / copy, 2 * 8192**3 / matmul


def with_backward(forward: Run, leaves: list[Tensor], dy: Tensor) -> Run:
    return lambda: torch.autograd.grad(forward(), leaves, dy)


def without_grad(forward: Run) -> Run:
    def run() -> None:
        with torch.no_grad():
            forward()

    return run


def peak_bytes(run: Run) -> int:
    """Memory the run needs on top of what is allocated before it."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def measure(
    case: Case, with_fla: bool, every: int, repeats: int, rates: tuple[float, float]
) -> Iterator[dict[str, Any]]:
    for part in ("op", "mixer"):
        ours = getattr(case, f"ours_{part}")
        makers = {"ours": ours()}
        if with_fla:
            makers["fla"] = getattr(case, f"fla_{part}")()
        keeping = {"ours, all kept": ours(keep_intermediates=True)}
        if every:
            keeping[f"ours, every {every}"] = ours(states_every=every)
        for kind in ("forward", "forward + backward"):
            if kind == "forward":  # nothing is kept without a backward
                runs = {name: without_grad(run) for name, (run, _) in makers.items()}
            else:
                runs = {name: with_backward(run, leaves, case.dy) for name, (run, leaves) in (makers | keeping).items()}
            needed_bytes, flops = case.needs(f"{part} {kind}")
            lone, ahead = alternate(runs, repeats), alternate(runs, repeats, queued=True)
            for name, times in ahead.items():
                times.sort()
                median = times[len(times) // 2]
                yield {
                    "what": f"{part} {kind}", "who": name, "B": case.B, "T": case.T,
                    "packed": case.cu_seqlens is not None, "ms": median, "ms_min": times[0], "ms_max": times[-1],
                    "lone_ms": sorted(lone[name])[repeats // 2], "needed_bytes": needed_bytes, "flops": flops,
                    "of_copy": needed_bytes / rates[0] / (median / 1e3),
                    "of_matmul": flops / rates[1] / (median / 1e3),
                    "peak_bytes": peak_bytes(runs[name]),
                }  # fmt: skip


def run(args: argparse.Namespace) -> None:
    """What the flags ask for."""
    with_fla = importlib.util.find_spec("fla") is not None
    if with_fla:
        compile_side_by_side()
        if args.force_fla_backward:
            allow_fla_backward()
    rates = ceilings()
    fla_shapes = args.shapes if args.fla_shapes is None else args.fla_shapes
    print(f"{torch.cuda.get_device_name()}: copy {rates[0] / 1e12:.2f} TB/s, bf16 matmul {rates[1] / 1e12:.0f} TFLOP/s")
    lines: list[dict[str, Any]] = []
    errors: list[dict[str, Any]] = []

    def write() -> None:
        if args.json:
            found = {"copy": rates[0], "matmul": rates[1], "lines": lines, "errors": errors}
            args.json.write_text(json.dumps(found, indent=1))

    for shape in args.shapes:
        B, T = (int(x) for x in shape.removesuffix("packed").split("x"))
        packed = B if shape.endswith("packed") else 0
        case = Case(1 if packed else B, B * T if packed else T, args.heads, args.key_dim, args.value_dim, packed)
        for line in measure(case, with_fla and shape in fla_shapes, args.states_every, args.repeats, rates):
            print(
                f"{shape:>13} {line['what']:<24} {line['who']:<14} {line['ms']:8.3f} ms "
                f"({line['ms_min']:.3f} to {line['ms_max']:.3f})  by itself {line['lone_ms']:7.3f} ms  "
                f"{line['needed_bytes'] / 1e9:.3f} GB, copy {line['of_copy']:4.0%}  "
                f"{line['flops'] / 1e12:.3f} TFLOP, matmul {line['of_matmul']:4.0%}  "
                f"peak {line['peak_bytes'] / 2**30:.2f} GiB",
                flush=True,
            )
            lines.append(line)
            write()
        del case
        torch.cuda.empty_cache()
    if args.errors:
        for line in measure_errors(args.heads, args.key_dim, args.value_dim, with_fla):
            print(
                f"{line['case']:<29} {line['who']:<7} {line['tensor']:<8} error {line['error']:.4f} "
                f"(worst head {line['worst_head']:.4f})",
                flush=True,
            )
            errors.append(line)
            write()
