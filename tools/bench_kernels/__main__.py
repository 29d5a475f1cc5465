"""Time the Gated DeltaNet kernels beside flash-linear-attention's, alternating in one process, on this GPU.

Prints one line per measurement: median and spread in milliseconds with all launches made before the GPU begins, as in
training, where the host is ahead of it; the median of a call by itself, which can wait for the host; bytes and FLOPs
that the mathematics needs, what fraction of this GPU's measured copy and matmul rates that is, and peak memory. --json
writes the same as a file.
flash-linear-attention is timed when installed, at --fla-shapes. Its autotuner chooses among all its configurations;
their compilation alone is spread over the cores. Its backward refuses Hopper with triton 3.4 to 3.7.0 (its issue #640:
gradients of the gate are wrong there); --force-fla-backward switches that check off in this process, which leaves its
time valid and those gradients not. --errors prints the errors of both, of outputs and gradients, against the reference
in fp64; with `--shapes` followed by no shape, nothing is timed.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_hybrid.tools.cli import Parser


def main() -> None:
    parser = Parser(
        prog="python -m megatron_hybrid.tools.bench_kernels",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--heads", type=int, default=30)
    parser.add_argument("--key-dim", type=int, default=96)
    parser.add_argument("--value-dim", type=int, default=192)
    parser.add_argument("--shapes", nargs="*", default=["1x8192", "2x8192", "1x65536", "8x1024packed"], help="BxT")
    parser.add_argument("--fla-shapes", nargs="*", help="those at which flash-linear-attention is timed; default: all")
    parser.add_argument("--errors", action="store_true", help="print errors as well")
    parser.add_argument("--states-every", type=int, default=4, help="also time ours with every n-th state kept; 0: not")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--force-fla-backward", action="store_true", help="see above")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if not (args.shapes or args.errors):
        parser.error("--shapes: without a shape there is nothing to time; name some, 1x8192, or add --errors")
    import torch  # takes seconds, so after the flags are read

    from megatron_hybrid.tools.bench_kernels.measure import run

    if not torch.cuda.is_available():
        parser.error("no GPU here: these are timings of kernels")
    run(args)


if __name__ == "__main__":
    main()
