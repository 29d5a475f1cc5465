"""Find launch configurations of the Gated DeltaNet kernels, or report what they compile to.

--report   needs no GPU: registers, stack, spills (loads and stores of local memory), shared memory, occupancy, bytes
           to read and write per token and matrix instructions of every kernel of an entry, for Hopper (sm_90) and
           Blackwell (sm_100); for Hopper, what ptxas compiled wrongly
otherwise  needs the GPU to tune for: times configurations kernel by kernel, each kernel by itself, keeps the fastest
           of those with which the mixer (y, last states, all gradients; one document and packed; every save policy),
           the delta rule by itself and token-by-token generation agree with the reference and give the same bits
           twice, and prints an entry for kernels/configs.py. Refuses a GPU whose kernels this triton is known to
           compile wrongly. The adjoint scan and query_gradient run beside each other in training: where the two
           fastest do not fit one multiprocessor together, others may be faster there
"""

from __future__ import annotations

import argparse

from megatron_hybrid.tools.cli import Parser


def main() -> None:
    parser = Parser(
        prog="python -m megatron_hybrid.tools.tune_kernels",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--report", action="store_true", help="compile and report instead of tuning")
    parser.add_argument("--heads", type=int, default=30)
    parser.add_argument("--key-dim", type=int, default=96)
    parser.add_argument("--value-dim", type=int, default=192)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--targets", type=int, nargs="+", default=[90, 100], help="compute capabilities to report on")
    args = parser.parse_args()
    import torch  # takes seconds, so after the flags are read

    from megatron_hybrid.tools.tune_kernels.search import report, tune

    if args.report:
        report(args.heads, args.key_dim, args.value_dim, args.targets)
    elif torch.cuda.is_available():
        tune(args.heads, args.key_dim, args.value_dim, args.tokens)
    else:
        parser.error("no GPU here to tune for; --report needs none")


if __name__ == "__main__":
    main()
