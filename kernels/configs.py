"""How each kernel is launched: a table, not a search at start-up.

An entry belongs to one GPU architecture, triton version and pair of head sizes, because each of these can change
whether a configuration is right as well as how fast it is. `tools/tune_kernels` tries configurations and prints an
entry of those that passed: agreement with the reference, and the same bits twice. Pairs of GPU and triton that are
known to compute something else (KNOWN_BAD) run with no configuration.

Importing this file needs neither torch nor triton: `tools/doctor` reads it where nothing is installed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import NamedTuple


class Launch(NamedTuple):
    """warps, stages and registers as triton's num_warps, num_stages and maxnreg; block: columns of V, of the norms
    rows, of the convolution tokens, of its backward channels."""

    warps: int
    stages: int
    block: int = 0
    registers: int | None = None

    @property
    def options(self) -> dict[str, int | None]:
        return {"num_warps": self.warps, "num_stages": self.stages, "maxnreg": self.registers}


Entry = Mapping[str, Launch]

#: Where the search for an entry starts, and what the interpreter runs. Little shared memory: it fits K = V = 256.
DEFAULTS: dict[str, Launch] = {
    "conv": Launch(1, 1, 16),
    "diagonal": Launch(1, 1),
    "prepare": Launch(4, 1),
    "prepare_normalising": Launch(4, 1),  # the same kernel, when it makes q and k unit vectors itself
    "scan": Launch(4, 2, 64),
    "scan_again": Launch(4, 2, 64),  # states and new values too: backward, or all kept
    "norm": Launch(4, 1, 16),
    "norm_backward": Launch(4, 1, 8),
    "adjoint_scan": Launch(4, 2, 64),
    "query_gradient": Launch(8, 1, 64, 128),
    "inverse_gradient": Launch(4, 1, 64),
    "key_gradient": Launch(8, 1, 64, 128),
    "conv_backward": Launch(1, 1, 64),
    "decode": Launch(8, 1),
}

#: (architecture, triton's major.minor, K, V): checked on that architecture by tools/tune_kernels or the GPU tests, with
#: the kernels of the day named. A run's own self-test compares forward and gradients once more on its GPU.
TABLE: dict[tuple[str, str, int, int], Entry] = {
    # NVIDIA H200, 2026-11-29
    ("sm_90", "3.6", 96, 192): DEFAULTS
    | {
        "prepare": Launch(4, 1, 0, 96),
        "prepare_normalising": Launch(4, 1, 0, 128),
        "scan": Launch(4, 4, 64),
        "scan_again": Launch(4, 3, 64),
        "norm_backward": Launch(2, 1, 4, 128),
        "adjoint_scan": Launch(4, 3, 64),
        "query_gradient": Launch(4, 2, 64, 168),
        "inverse_gradient": Launch(4, 3, 64, 160),
        "key_gradient": Launch(4, 3, 32),
    },
    # NVIDIA H100, 2026-11-25, chosen while others used that GPU: not much slower than the best. Checked again on an
    # H200, 2026-11-29.
    ("sm_90", "3.6", 128, 256): DEFAULTS
    | {
        "scan": Launch(4, 3, 64),
        "scan_again": Launch(4, 3, 64),
        "norm": Launch(1, 1, 4),
        "norm_backward": Launch(4, 1, 16),
        "adjoint_scan": Launch(4, 3, 64),
        "key_gradient": Launch(8, 2, 32, 128),
        "conv_backward": Launch(2, 1, 128),
    },
    ("sm_90", "3.6", 128, 128): DEFAULTS
    | {
        "scan": Launch(4, 3, 64),
        "scan_again": Launch(4, 3, 64),
        "norm": Launch(1, 1, 8),
        "norm_backward": Launch(2, 1, 4),
        "adjoint_scan": Launch(4, 3, 64),
        "key_gradient": Launch(8, 3, 64, 128),
    },
    ("sm_90", "3.6", 64, 64): DEFAULTS
    | {
        "scan_again": Launch(4, 3, 64),
        "norm": Launch(2, 1, 8),
        "norm_backward": Launch(4, 1, 16),
        "key_gradient": Launch(8, 2, 32, 128),
    },
    # NVIDIA H200, 2026-11-29; the gradients of k and decoding not tuned.
    ("sm_90", "3.6", 256, 256): DEFAULTS
    | {
        "norm": Launch(4, 1, 8),
        "norm_backward": Launch(2, 1, 4),
        "query_gradient": Launch(8, 3, 64),
        "key_gradient": Launch(8, 1, 32),
    },
}


class Versions(NamedTuple):
    """Versions of triton from `first` on and before `end`."""

    first: tuple[int, ...]
    end: tuple[int, ...]


#: (what the architecture's name begins with, versions of triton) -> why the kernels are wrong there.
KNOWN_BAD: dict[tuple[str, Versions], str] = {
    ("sm_103", Versions((3, 6), (3, 9))): (
        "two dots into one accumulator are wrong (triton issue 10821; whether 3.9 mends it is not known)"
    ),
    (
        "sm_10",
        Versions((0,), (3, 8)),
    ): "recurrences of 4 or 8 warps race before triton 3.8 (its issues 9871, 10590)",
    (
        "sm_12",
        Versions((0,), (3, 8)),
    ): "recurrences of 4 or 8 warps race before triton 3.8 (its issues 9871, 10590)",
}


def known_bad(architecture: str, version: str) -> str | None:
    """Why this architecture ("sm_100") and triton ("3.6.0") do not go together, or None."""
    numbers = tuple(map(int, re.findall(r"\d+", version.split("+")[0])[:3]))
    reasons = [
        reason
        for (prefix, versions), reason in KNOWN_BAD.items()
        if architecture.startswith(prefix) and versions.first <= numbers < versions.end
    ]
    return "; ".join(reasons) or None


_trial: list[Entry] = []


@cache
def current_key() -> tuple[str, str]:
    """(architecture, triton version) that launches run on now; the interpreter is an architecture of its own."""
    import torch
    import triton

    version = ".".join(triton.__version__.split(".")[:2])
    if triton.knobs.runtime.interpret:
        return "interpreter", version
    major, minor = torch.cuda.get_device_capability()
    return f"sm_{major}{minor}", version


def launch_for(kernel: str, K: int, V: int) -> Launch:
    """The launch of one kernel for these head sizes on the current device.

    Raises RuntimeError for a pair that is known to be bad, and when the table has no entry: an unchecked configuration
    may compute something else.
    """
    if _trial:
        return _trial[-1][kernel]
    architecture, version = current_key()
    if architecture == "interpreter":
        return DEFAULTS[kernel]
    if reason := known_bad(architecture, version):
        raise RuntimeError(
            f"Gated DeltaNet kernels on {architecture} with triton {version}: {reason}; take a triton without that "
            "fault and run megatron_hybrid.tools.tune_kernels with it, or choose the reference backend"
        )
    entry = TABLE.get((architecture, version, K, V))
    if entry is None:
        raise RuntimeError(
            f"no checked kernel configuration for {architecture}, triton {version}, K = {K}, V = {V}; run "
            f"`python -m megatron_hybrid.tools.tune_kernels --key-dim {K} --value-dim {V}` on this GPU and add the "
            "entry it prints to kernels/configs.py, or choose the reference backend"
        )
    return entry[kernel]


@contextmanager
def trial(**launches: Launch) -> Iterator[None]:
    """Inside, launches are these or the defaults, checked or not: for the tools and tests that do the checking."""
    _trial.append(DEFAULTS | launches)
    try:
        yield
    finally:
        _trial.pop()
