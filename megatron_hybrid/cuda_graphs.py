"""CUDA graphs, which were not tried with these layers, and are refused by flag.

What is known from reading: `modules/recompute.py` runs a backward pass inside one, whose parameters Megatron's graphs
do not find, so that on replay their gradients would be lost without a word; and what the log line observes of the
mixers would stay what it was when the graph was captured.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence


def problems(flags: Sequence[str]) -> Iterator[str]:
    """What is wrong with a flat list of flags, in one line each."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--cuda-graph-impl", default="none")
    for name in ("enable-cuda-graph", "external-cuda-graph"):
        parser.add_argument(f"--{name}", action="store_true")
    values = parser.parse_known_args(list(flags))[0]
    given = [f"--cuda-graph-impl {values.cuda_graph_impl}"] * (values.cuda_graph_impl != "none")
    given += ["--enable-cuda-graph"] * values.enable_cuda_graph + ["--external-cuda-graph"] * values.external_cuda_graph
    for flag in given:
        yield f"{flag}: CUDA graphs were not tried with these layers, and may lose gradients; leave it out"
