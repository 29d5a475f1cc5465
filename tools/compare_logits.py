"""Compares two logit tensors, for example Megatron's with those of an exported Hugging Face model.

    python -m megatron_hybrid.tools.compare_logits --reference A.safetensors --candidate B.safetensors --tolerance 1e-3

Exit status: 0 when the largest absolute difference is within the tolerance, 1 when it is not or on an error.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_hybrid.tools.cli import Parser, ToolError, run_cli

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class LogitDifference:
    """Differences over all elements; NaN anywhere makes `max_abs` and `mean_abs` NaN, which is above any tolerance."""

    positions: int
    vocab_size: int
    max_abs: float
    mean_abs: float
    argmax_agreement: float
    reference_abs_max: float

    def within(self, tolerance: float) -> bool:
        """Whether the largest absolute difference is finite and at most `tolerance`."""
        return math.isfinite(self.max_abs) and self.max_abs <= tolerance

    def table(self) -> str:
        """The numbers, one per line."""
        rows = (
            ("positions", f"{self.positions:,}"),
            ("vocabulary", f"{self.vocab_size:,}"),
            ("largest |reference|", f"{self.reference_abs_max:.4g}"),
            ("max abs difference", f"{self.max_abs:.3e}"),
            ("mean abs difference", f"{self.mean_abs:.3e}"),
            ("argmax agreement", f"{self.argmax_agreement:.2%}"),
        )
        return "\n".join(f"{name:<20} {value:>12}" for name, value in rows)


def compare_logits(reference: Tensor, candidate: Tensor, vocab_size: int | None = None) -> LogitDifference:
    """Compares logits [..., V] of any float dtype, in fp64, position by position.

    Args:
        reference: the logits that are taken as right.
        candidate: the logits to judge, of the same shape.
        vocab_size: columns of both to compare; None for all. Megatron's logits may have padding columns.

    Raises:
        ToolError: the shapes differ, or there are no elements.
    """
    if vocab_size is not None:
        width = min(reference.shape[-1], candidate.shape[-1])
        if not 0 < vocab_size <= width:
            raise ToolError(f"--vocab-size {vocab_size}: legal: 1 to {width}, the columns that both files have")
        reference, candidate = reference[..., :vocab_size], candidate[..., :vocab_size]
    if reference.shape != candidate.shape:
        raise ToolError(
            f"shapes differ: reference {list(reference.shape)}, candidate {list(candidate.shape)}; "
            "give logits of the same tokens, and --vocab-size N if one has padding columns"
        )
    if reference.numel() == 0:
        raise ToolError(f"nothing to compare: both have shape {list(reference.shape)}")
    reference_rows = reference.reshape(-1, reference.shape[-1])
    candidate_rows = candidate.reshape(-1, candidate.shape[-1])
    sums, maxima, agreeing = [], [], 0
    for row, other in zip(reference_rows, candidate_rows, strict=True):  # one at a time: V can be 100,352
        difference = (row.double() - other.double()).abs()
        sums.append(difference.sum().item())
        maxima.append(difference.max().item())  # NaN if any is NaN
        agreeing += int(row.argmax() == other.argmax())
    return LogitDifference(
        positions=len(reference_rows),
        vocab_size=reference.shape[-1],
        max_abs=math.nan if any(math.isnan(value) for value in maxima) else max(maxima),
        mean_abs=math.fsum(sums) / reference.numel(),
        argmax_agreement=agreeing / len(reference_rows),
        reference_abs_max=reference.abs().max().item(),
    )


def read_tensor(path: Path, name: str) -> Tensor:
    """Tensor `name` of a safetensors file; ToolError if the file or the tensor is not there."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise ToolError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as handle:
            names = list(handle.keys())
            if name not in names:
                raise ToolError(f"{path}: no tensor {name!r}; it holds: {', '.join(names) or 'nothing'}")
            return handle.get_tensor(name)
    except SafetensorError as error:
        raise ToolError(f"{path}: not a safetensors file ({error})") from None


def main() -> None:
    """Entry point; see the module's docstring."""
    parser = Parser(prog="python -m megatron_hybrid.tools.compare_logits", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--reference", type=Path, required=True, help="safetensors file with the right logits")
    parser.add_argument("--candidate", type=Path, required=True, help="safetensors file with the logits to judge")
    parser.add_argument("--tolerance", type=float, required=True, help="largest absolute difference that passes")
    parser.add_argument("--name", default="logits", help="name of the tensor in both files; default: %(default)s")
    parser.add_argument("--vocab-size", type=int, help="compare only this many columns; default: all")
    arguments = parser.parse_args()
    difference = compare_logits(
        read_tensor(arguments.reference, arguments.name),
        read_tensor(arguments.candidate, arguments.name),
        arguments.vocab_size,
    )
    print(difference.table())
    if not difference.within(arguments.tolerance):
        raise ToolError(f"max abs difference {difference.max_abs:.3e} is above --tolerance {arguments.tolerance:g}")


if __name__ == "__main__":
    run_cli(main)
