"""One pass through a sequence in each direction, and what of it runs beside what. Letters as in triton_tiles.py.

The scans have too few programs for all multiprocessors, 90 for the 7B's 30 heads, and each waits for itself. All other
kernels are wide and wait for memory: beside a scan they do about half of what they do alone. So the forward cuts a long
row in pieces (`Problem.pieces`), and while the scan goes through one, on a second stream, the others do what comes
before and after it. Pieces change no bit: a state goes from one to the next in fp32, as it is. The adjoint scan needs
none: the gradient of q takes as long, and runs beside it.

Launches are made in an order in which they can start: with CUDA_DEVICE_MAX_CONNECTIONS=1 none starts before those that
were made earlier.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from megatron_hybrid.kernels import triton_launch as launch
from megatron_hybrid.kernels.streams import Beside, beside
from megatron_hybrid.kernels.triton_launch import Preparation
from megatron_hybrid.kernels.triton_problem import (
    Gates,
    Gradients,
    InverseGradient,
    Piece,
    Prepared,
    Problem,
    QueryGradient,
    Scanned,
    Solved,
)


def run_scan(
    problem: Problem, preparation: Preparation, *, initial: Tensor | None, kept: Tensor | None = None,
    o: Tensor | None, want_final: bool = False, finish: Callable[[Piece], None] | None = None,
) -> Scanned:  # fmt: skip
    """Runs a preparation, the scan after it and `finish` after that, piece by piece. o: as in `launch.scan`.

    kept: the states that the forward kept, if any; from them all stretches are scanned at once.
    """
    is_again = not preparation.is_first
    pieces = problem.pieces if kept is None else [problem.whole]
    made, solved, v = preparation.made, preparation.solved, preparation.v
    out = launch.new_states(problem, made.k, kept, want_final=want_final, is_again=is_again)
    preparation.run(pieces[0])
    if len(pieces) == 1:
        launch.scan(problem, made, solved, v, out, problem.whole, initial=initial, o=o, is_again=is_again)
        if finish is not None:
            finish(problem.whole)
        return out
    shape = (len(pieces) - 1, problem.layout.N, problem.H, problem.K, problem.V)
    between = list(made.k.new_empty(shape, dtype=torch.float32))  # states, from each piece to the next
    with beside(v) as second:
        for i, (piece, before, after) in enumerate(
            zip(pieces, [initial, *between], [*between, out.final], strict=True)
        ):
            begun = second.here()
            launch.scan(
                problem, made, solved, v, out._replace(final=after), piece, initial=before, o=o, is_again=is_again
            )
            if i + 1 < len(pieces):
                with second.after(begun):
                    preparation.run(pieces[i + 1])
            ready = second.there()
            if finish is not None and i > 0:
                with second.after(begun):
                    finish(pieces[i - 1])
            second.wait(ready)
        if finish is not None:
            finish(pieces[-1])
    return out


def run_gradients(
    problem: Problem, made: Prepared, solved: Solved, states: Scanned, do: Tensor, dfinal: Tensor | None, gates: Gates,
    da: Tensor, db: Tensor, second: Beside, *, want_dinitial: bool, meanwhile: Callable[[], object] | None = None,
) -> Gradients:  # fmt: skip
    """Those of everything before the output; da and db [B, T, H] are written in place. Not all is done before `second`
    has been waited for.

    meanwhile: launches that are in no hurry.
    """
    B, T, Hk, H, K, _V, _options, layout, *_ = problem
    new = made.k.new_empty
    adjoint = launch.new_adjoint(problem, made, want_dinitial)
    inverse = InverseGradient(torch.empty_like(made.P), torch.empty_like(solved.G))
    query = QueryGradient(new(B, T, H, K), torch.empty_like(made.P), torch.empty_like(solved.G))
    dq, dk = query.dq, torch.empty_like(query.dq)
    partial, of_heads = new(2, H, layout.num_chunks, dtype=torch.float32), new(2, H, dtype=torch.float32)
    begun = second.here()
    launch.adjoint_scan(problem, made, solved, do, dfinal, adjoint)
    with second.after(begun):
        launch.query_gradient(problem, made, solved, states, do, query)
    ready = second.there()
    launch.inverse_gradient(problem, made, solved, states, adjoint.dr, inverse, db)
    if meanwhile is not None:
        with second.after(begun):
            meanwhile()
    second.wait(ready)
    launch.key_gradient(problem, made, solved, states, query, inverse, adjoint, gates, dk, da, partial)
    with second.after(second.here()):
        torch.sum(second.keep(partial), -1, out=of_heads)
    if Hk != H:
        dq, dk = (x.unflatten(2, (Hk, H // Hk)).sum(3, dtype=torch.float32).to(x.dtype) for x in (dq, dk))
    return Gradients(dq, dk, adjoint.dr, of_heads[0], of_heads[1], adjoint.dinitial)
