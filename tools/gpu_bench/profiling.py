"""Where the time of one training step goes: kernels of the GPU by category, as data and as a chart."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

#: First match wins; names are kernels' own.
CATEGORIES = (
    ("loss", r"cross_entropy|logsumexp_kernel|logits_gradient|softmax|nll"),
    (
        "Gated DeltaNet kernels",
        r"^(conv|diagonal|prepare|scan|norm|adjoint|query|key|gradients)\w*_kernel",
    ),
    (  # flash-linear-attention's
        "Gated DeltaNet kernels",
        r"^(chunk_|causal_conv1d|l2norm|recompute_w_u|solve_tril|merge_16|layer_norm_gated|prepare_wy|gdn_|fused_gdn)",
    ),
    ("attention core", r"flash|fmha|fused_attn|cudnn.*(sdpa|attn)|attention"),
    ("FP8 casts and scales", r"quantiz|cast_transpose|fp8|amax|transpose_kernel|nvte.*(cast|transpose)|block_scal"),
    ("GEMM", r"gemm|nvjet|cutlass|xmma|cublas|splitk|gemv"),
    ("optimizer", r"adam|multi_tensor|l2norm"),
    ("norms", r"wide_norm|rmsnorm|layernorm|ln_fwd|ln_bwd|rms_norm|layer_norm"),
    ("embedding", r"embedding|indexSelect|index_select|sort|index_put"),
    ("copies and fills", r"memcpy|memset|copy|CatArray|fill"),
    ("elementwise and reductions", r"elementwise|vectorized|reduce|swiglu|rope|triton_|dgated|gated"),
)
OTHER = "other kernels"
IDLE = "no kernel running"


def category(kernel: str) -> str:
    return next((name for name, pattern in CATEGORIES if re.search(pattern, kernel, re.IGNORECASE)), OTHER)


def profile_step(step: Any) -> dict[str, Any]:
    """Run `step()` under torch's profiler: {categories: {name: ms}, kernels: [[name, calls, ms], ...], ...}."""
    from torch.profiler import ProfilerActivity, profile

    on_gpu = torch.cuda.is_available()
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as recorded:
        timed = step()
    wanted = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU
    spans: list[tuple[float, float]] = []
    totals: dict[str, float] = {}
    calls: dict[str, int] = {}
    for event in recorded.events():
        if event.device_type == wanted:
            spans.append((event.time_range.start, event.time_range.end))
            totals[event.name] = totals.get(event.name, 0.0) + event.time_range.elapsed_us() / 1e3
            calls[event.name] = calls.get(event.name, 0) + 1
    busy, end = 0.0, float("-inf")
    for start, stop in sorted(spans):
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    by_category: dict[str, float] = {}
    for name, ms in totals.items():
        by_category[category(name)] = by_category.get(category(name), 0.0) + ms
    by_category[IDLE] = max(0.0, timed["ms"] - busy / 1e3)
    kernels = [(name, calls[name], totals[name]) for name in sorted(totals, key=lambda name: -totals[name])]
    return {
        "categories": dict(sorted(by_category.items(), key=lambda item: -item[1])),
        "kernels": kernels[:80],
        "launches": sum(calls.values()),
        "busy_ms": busy / 1e3,
        "wall_ms": timed["ms"],
    }


def draw(profiles: dict[str, dict[str, Any]], output: Path) -> None:
    """Horizontal bars: milliseconds of each category, one colour per profile."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = list(dict.fromkeys(name for profile in profiles.values() for name in profile["categories"]))
    figure, axes = plt.subplots(figsize=(8, 0.35 * len(names) * len(profiles) + 1.2), dpi=120)
    height = 0.8 / len(profiles)
    for index, (label, profile) in enumerate(profiles.items()):
        places = [at + index * height for at in range(len(names))]
        values = [profile["categories"].get(name, 0.0) for name in names]
        bars = axes.barh(places, values, height, label=f"{label}: {profile['wall_ms']:.0f} ms")
        axes.bar_label(bars, [f"{value:.1f}" for value in values], padding=2, fontsize=7)
    axes.set_yticks([at + 0.4 - height / 2 for at in range(len(names))], names)
    axes.invert_yaxis()
    axes.set_xlabel("ms of one step")
    axes.legend()
    figure.tight_layout()
    figure.savefig(output)
    plt.close(figure)
