"""Whether a split model trains as one process does: bounds, verdicts and the table.

What is exact is one process in fp32, with plain PyTorch on the CPU. No recipe gives its gradients: each is a distance
away, which is what its rounding costs. Splitting a model changes the order of sums and, in FP8, which numbers share a
scale: other rounding of the same size. So a split model

- may be no further from fp32 than one process with the same recipe is, times 1.2 (`ERROR_RATIO`, the rule of
  `tests/parallel/test_bf16.py`), all gradients as one vector;
- and so for each parameter, as far as n numbers can tell: the length of n independent errors varies by 1/sqrt(2n) of
  itself, the ratio of two such lengths by 1/sqrt(n), and three of those are allowed. A parameter on which one process
  was lucky counts as one of average luck. A_log and dt_bias of a layer count as one number: sums over all tokens that
  nearly cancel, whose relative error with one and the same kernel is 0.0004 to 0.03 from input to input
  (`docs/kernels.md`). What is missing on one of two ranks is 0.5 to 1 of a gradient; FP8's rounding is about 0.2 of it;
- and loss and norm at the start are the same to 1 %, as there.

Optimizer steps on the same batch, which the model learns by heart, carry wrong updates into the loss. In bf16 a split
model's losses may be as far from one process's as those are from fp32's, at their furthest. In FP8 they may be as far
away as the furthest that bf16 got in any layout where all was right, times how much coarser the recipe is (the
distances of its gradients and of bf16's from fp32, of one process) and times 2, since both are the largest of a few
numbers.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from tests.parallel import tiny
from tests.parallel.split.cells import IN_FP8, LAYOUTS, ONE, RECIPES, Cell, Outcome

ERROR_RATIO = 1.2
SIGMAS = 3.0
#: Of the loss and of the gradient norm before any step, relative.
TOLERANCE = 1e-2
#: Of the largest difference of losses that bf16 shows, as coarse as the recipe is.
STEP_RATIO = 2.0


@dataclass
class Row:
    """One cell of the table. Distances are relative to the fp32 gradients; `tensors`: {parameter: [this, one process's
    distance, cosine with fp32]}."""

    layout: str
    recipe: str
    error: str = ""
    loss: float = float("nan")
    losses: list[float] = field(default_factory=list)
    loss_difference: float = float("nan")
    norm_difference: float = float("nan")
    distance: float = float("nan")
    distance_of_one: float = float("nan")
    worst: float = float("nan")
    worst_tensor: str = ""
    least_cosine: float = float("nan")
    least_cosine_tensor: str = ""
    step_difference: float = float("nan")
    step_bound: float = float("nan")
    seconds: float = float("nan")
    wrong: list[str] = field(default_factory=list)
    tensors: dict[str, list[float]] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        return self.error.splitlines()[-1][:200] if self.error else "; ".join(self.wrong) or "same"


class Judge:
    """Takes outcomes in any order; `rows` when there are no more."""

    def __init__(self) -> None:
        self.exact: dict[str, torch.Tensor] = {}
        self.exact_losses: list[float] = []
        self.alone: dict[str, tuple[dict[str, torch.Tensor], dict[str, Any]]] = {}
        self.waiting: list[tuple[Cell, Outcome]] = []
        self.done: list[Row] = []
        self.errors: list[Row] = []

    def take(self, cell: Cell, outcome: Outcome) -> None:
        if outcome.error:
            self.errors.append(Row(cell.layout, cell.recipe, outcome.error.strip() or "failed"))
            return
        if cell.layout != ONE.name:
            self.waiting.append((cell, outcome))
        else:
            try:
                grads = tiny.assemble([found["grads"] for found in outcome.found])
            except AssertionError as error:
                self.errors.append(Row(cell.layout, cell.recipe, f"gradients: {error}"))
                return
            if found := _not_in_fp8(cell.recipe, outcome):
                self.errors.append(Row(cell.layout, cell.recipe, "; ".join(found)))
                return
            self.alone[cell.recipe] = (grads, outcome.found[0])
            if cell.recipe == "fp32":
                self.exact, self.exact_losses = grads, outcome.found[0]["losses"]
        self._measure()

    def _measure(self) -> None:
        """Rows of which everything is there; their gradients are let go."""
        later = []
        for cell, outcome in self.waiting:
            if self.exact and cell.recipe in self.alone:
                try:
                    self.done.append(self._row(cell, outcome))
                except Exception as error:  # this row's, and no other's
                    self.errors.append(Row(cell.layout, cell.recipe, f"{type(error).__name__}: {error}"))
            else:
                later.append((cell, outcome))
        self.waiting = later

    def _row(self, cell: Cell, outcome: Outcome) -> Row:
        alone, one = self.alone[cell.recipe]
        grads = tiny.assemble([found["grads"] for found in outcome.found])
        assert grads.keys() == self.exact.keys() == alone.keys(), sorted(grads.keys() ^ self.exact.keys())
        first = outcome.found[0]
        row = Row(cell.layout, cell.recipe, loss=first["loss"], losses=first["losses"], seconds=first["seconds"])
        row.loss_difference = first["loss"] - one["loss"]
        row.norm_difference = max((f["norm"] / one["norm"] - 1 for f in outcome.found), key=abs)
        row.distance, row.distance_of_one = (self._distance(g) for g in (grads, alone))
        row.step_difference = _furthest(first["losses"], one["losses"])
        row.worst, row.least_cosine = 0.0, 1.0
        for name, exact in self.exact.items():
            size = exact.norm().item()
            mine, its = ((g[name] - exact).norm().item() / size for g in (grads, alone))
            cosine = torch.nn.functional.cosine_similarity(grads[name].flatten(), exact.flatten(), 0).item()
            row.tensors[name] = [float(f"{value:.5g}") for value in (mine, its, cosine)]
            numbers = 1 if name.endswith(("A_log", "dt_bias")) else exact.numel()
            allowed = ERROR_RATIO * (1 + SIGMAS / numbers**0.5) * max(its, row.distance_of_one)
            if (share := _ratio(mine, allowed)) > row.worst:
                row.worst, row.worst_tensor = share, name
            if cosine < row.least_cosine:
                row.least_cosine, row.least_cosine_tensor = cosine, name
        row.wrong = self._wrong(row, outcome, one["loss"])
        return row

    def _distance(self, grads: dict[str, torch.Tensor]) -> float:
        error = sum(float((grads[name] - exact).square().sum()) for name, exact in self.exact.items())
        return float((error / sum(float(exact.square().sum()) for exact in self.exact.values())) ** 0.5)

    def _wrong(self, row: Row, outcome: Outcome, loss_of_one: float) -> list[str]:
        found = []
        if not abs(row.loss_difference) <= TOLERANCE * abs(loss_of_one):
            found.append("loss")
        if not abs(row.norm_difference) <= TOLERANCE:
            found.append("gradient norm")
        if not row.distance <= ERROR_RATIO * row.distance_of_one:
            found.append(f"gradients {_ratio(row.distance, row.distance_of_one):.2f} times as far from fp32")
        if not row.worst <= 1:
            found.append(f"gradient of {row.worst_tensor}")
        found += _not_in_fp8(row.recipe, outcome)
        return found

    def rows(self) -> list[Row]:
        """All of them, judged together: what is allowed of FP8's steps depends on bf16's."""
        for cell, _ in self.waiting:
            what = "one process in fp32" if not self.exact else "one process"
            self.errors.append(Row(cell.layout, cell.recipe, f"nothing to compare with: {what} failed"))
        self.waiting = []
        self.done.sort(key=lambda row: row.recipe != "bf16")
        right_in_bf16: list[float] = []
        for row in self.done:
            row.step_bound = self._step_bound(row, max(right_in_bf16, default=float("nan")))
            if not row.step_difference <= row.step_bound:
                row.wrong.append("losses of the steps")
            if row.recipe == "bf16" and not row.wrong:
                right_in_bf16.append(row.step_difference)
        places = {layout.name: place for place, layout in enumerate((ONE, *LAYOUTS))}
        recipes = list(RECIPES)
        return sorted(
            [*self.done, *self.errors],
            key=lambda row: (places.get(row.layout, len(places)), row.layout, recipes.index(row.recipe)),
        )

    def _step_bound(self, row: Row, bf16: float) -> float:
        one = self.alone[row.recipe][1]["losses"]
        if row.recipe not in IN_FP8 and row.recipe != "rounded":
            return _furthest(one, self.exact_losses)
        return STEP_RATIO * bf16 * row.distance_of_one / self._distance(self.alone["bf16"][0])


def _not_in_fp8(recipe: str, outcome: Outcome) -> list[str]:
    """What should have been in FP8 and was not, on any rank. Of one process too: all would be compared with bf16."""
    found = []
    for counts in (rank["fp8"] for rank in outcome.found):
        for what, wanted in (("in FP8", recipe in IN_FP8), ("FP8 weights", recipe == "FP8 parameters")):
            if counts[what] != counts["linears"] * wanted:
                found.append(f"{what}: {counts[what]} of {counts['linears']} linears")
    return list(dict.fromkeys(found))


def _furthest(losses: list[float], others: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(losses, others, strict=True))


def _ratio(mine: float, allowed: float) -> float:
    return mine / allowed if allowed else float("inf") if mine else 0.0


def table(rows: list[Row]) -> list[str]:
    """Markdown."""
    lines = [
        "| layout | recipe | loss | norm | gradients from fp32, one process's | their ratio | worst parameter, of what "
        "is allowed | least cosine with fp32 | steps: losses differ by, allowed | s | |",
        "|---" * 11 + "|",
    ]
    for row in rows:
        if row.error:
            lines.append(f"| {row.layout} | {row.recipe} |" + " |" * 8 + f" {row.verdict} |")
            continue
        cells = [
            row.layout,
            row.recipe,
            f"{row.loss_difference:+.1e}",
            f"{row.norm_difference:+.1e}",
            f"{row.distance:.4f}, {row.distance_of_one:.4f}",
            f"{_ratio(row.distance, row.distance_of_one):.3f}",
            f"{row.worst:.2f} {row.worst_tensor}",
            f"{row.least_cosine:.5f} {row.least_cosine_tensor}",
            f"{row.step_difference:.1e}, {row.step_bound:.1e}",
            f"{row.seconds:.1f}",
            row.verdict,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def as_data(rows: list[Row]) -> list[dict[str, Any]]:
    return [asdict(row) | {"verdict": row.verdict} for row in rows]
