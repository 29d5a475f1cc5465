"""SkipStep inside Megatron's optimizers, against a plain reimplementation of the rule, on real ranks."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing

from megatron_hybrid.training import skip_step as module
from megatron_hybrid.training.loss import forward_step
from megatron_hybrid.training.skip_step import SkipStep, Window
from tests.parallel import tiny
from tests.parallel.ranks import run_ranks
from tests.parallel.tiny import Layout


def _plain_rule(losses: list[float], norms: list[float]) -> bool:
    """Of the latest of each; what came before it is the history, finite values only."""
    latest, history = (losses[-1], norms[-1]), list(zip(losses[:-1], norms[:-1], strict=True))
    finite = torch.tensor(history).reshape(-1, 2).isfinite().all(1).tolist()
    history = [pair for pair, good in zip(history, finite, strict=True) if good][-module.WINDOW_STEPS :]
    if not torch.tensor(latest).isfinite().all():
        return True
    if len(history) + 1 < module.FEWEST_STEPS:
        return False
    columns = zip(latest, zip(*history, strict=True), strict=True)
    return any(x - statistics.mean(past) > module.SIGMAS * statistics.stdev(past) for x, past in columns)


def test_the_rule_is_the_plain_one() -> None:
    """Spikes up and down, NaN, infinity, values just inside and outside six deviations, more steps than the window."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(400, 2, generator=generator, dtype=torch.float64) * 0.1 + 3
    for step, row in {
        63: (3, 50),
        64: (50, 3),
        65: (-50, 3),
        202: (3, 5),
        250: (6, 3),
        251: (3, 7),
        300: (3, 3.5),
    }.items():
        values[step] = torch.tensor(row, dtype=torch.float64)
    values[200, 0], values[201, 1], values[5, 0] = float("nan"), float("inf"), float("nan")
    # Just outside and just inside: the population's standard deviation would skip both.
    for step, sigmas in {380: 6.001, 381: 5.999}.items():
        past = values[step - 128 : step, 1].tolist()
        values[step, 1] = statistics.mean(past) + sigmas * statistics.stdev(past)
    window, found, expected = Window(torch.device("cpu")), [], []
    for step, row in enumerate(values):
        found.append(bool(window.judge(row)))
        expected.append(_plain_rule(values[: step + 1, 0].tolist(), values[: step + 1, 1].tolist()))
    assert found == expected
    # The value at 5 is not known, so that at 63 only 63 are, the latest included.
    assert [step for step, skip in enumerate(expected) if skip] == [5, 64, 200, 201, 202, 250, 251, 380]


#: What is done to the gradients of a step, before the optimizer looks at them.
SPIKES: dict[int, Callable[[torch.Tensor], Any]] = {
    4: lambda grad: grad.mul_(1e3),
    6: lambda grad: grad.fill_(float("nan")),
    8: lambda grad: grad.mul_(1e9),  # the window knows the 1e3
}
STEPS = 10


def _shorten() -> None:
    """A window that ten steps fill."""
    module.WINDOW_STEPS, module.FEWEST_STEPS, module.SLICE_ELEMENTS = 6, 4, 5000


def _state(trainer: tiny.Trainer) -> dict[str, torch.Tensor]:
    """Weights, and moments and counters of the inner optimizer, of this rank."""
    found = {
        f"{i} {name}": p.detach() for i, chunk in enumerate(trainer.chunks) for name, p in chunk.named_parameters()
    }
    for leaf in trainer.optimizer.chained_optimizers:
        for i, state in enumerate(leaf.optimizer.state.values()):
            found |= {f"state {i} {key}": value for key, value in state.items()}
    return {key: value.clone() for key, value in found.items()}


def _train(rank: int, layout: Layout, spikes: list[int], guarded: bool, broken: str = "") -> dict[str, Any]:
    _shorten()
    if broken == "factor instead of select":
        module.torch = _Factor(torch)  # type: ignore[attr-defined]
    elif broken == "each rank's own loss":
        module.dist = _Alone()  # type: ignore[attr-defined]
    chunks = tiny.build(layout)
    tiny.unsettle(chunks)
    guard = SkipStep()
    tiny.forward_step = partial(forward_step, observe=guard.observe) if guarded else forward_step
    trainer = tiny.Trainer(layout, chunks, lr=1e-3)
    if guarded:
        guard.attach(trainer.optimizer)
    losses, norms, skipped, states = [], [], [], []
    for step in range(STEPS):
        total = trainer.backward()
        if step in spikes:
            for chunk in trainer.model:
                for buffer in chunk.buffers:
                    SPIKES[step](buffer.grad_data)
        before = _state(trainer)
        if guarded or step not in spikes:  # the plain run leaves the step out itself
            _, norm, _ = trainer.optimizer.step()
            losses.append(float(total[0] / total[1]) if total[1] else -1.0)
            norms.append(float(norm))
        after = _state(trainer)
        same = all(torch.equal(before[key], after[key]) for key in before)
        skipped.append(float(guard.skipped))
        states.append(same)
    decisions = torch.tensor(skipped)
    everywhere = [torch.empty_like(decisions) for _ in range(dist.get_world_size())]
    dist.all_gather(everywhere, decisions)
    return {
        "losses": losses,
        "norms": norms,
        "skipped": skipped,
        "unchanged": states,
        "agree": all(torch.equal(one, decisions) for one in everywhere),
        "in a row": float(guard.in_a_row),
        "final": _state(trainer),
    }


class _Factor:
    """torch, with a product by 0 or 1 in the place of `where`."""

    def __init__(self, real: Any) -> None:
        self.real = real

    def __getattr__(self, name: str) -> Any:
        if name == "where":
            return self._where
        return getattr(self.real, name)

    def _where(self, skip: torch.Tensor, old: torch.Tensor, new: torch.Tensor, out: Any = None) -> torch.Tensor:
        return self.real.where(skip, old, new) if out is None else out.copy_(old * skip + new * ~skip)


class _Alone:
    """torch.distributed, without messages."""

    def __getattr__(self, name: str) -> Any:
        return (lambda tensor: None) if name == "all_reduce" else getattr(dist, name)


#: A layer of each kind will do.
SHORT = "G*"

LAYOUTS = [
    Layout(dp=2, pattern=SHORT),
    Layout(dp=2, distributed_optimizer=True, bf16=True, pattern=SHORT),
    Layout(bf16=True, pattern=SHORT),
    Layout(tp=2, sp=True, cp=2, pp=2, pattern="G*|G*", distributed_optimizer=True),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_training_goes_on_as_if_the_step_had_not_been(layout: Layout) -> None:
    """Bit for bit: a guarded run with spikes is the plain run that leaves those steps out, on every rank."""
    spikes = list(SPIKES)
    guarded = run_ranks(_train, layout.ranks, layout, spikes, True)
    plain = run_ranks(_train, layout.ranks, layout, spikes, False)
    for mine, theirs in zip(guarded, plain, strict=True):
        assert [step for step, skipped in enumerate(mine["skipped"]) if skipped] == spikes
        assert mine["agree"]
        assert [step for step, same in enumerate(mine["unchanged"]) if same] == spikes
        assert mine["final"].keys() == theirs["final"].keys()
        for key, value in theirs["final"].items():
            assert torch.equal(mine["final"][key], value), key
    last = guarded[-1]
    for step in range(STEPS):
        history = (last["losses"][: step + 1], last["norms"][: step + 1])
        assert _plain_rule_of(*history) == bool(last["skipped"][step])


def _plain_rule_of(losses: list[float], norms: list[float]) -> bool:
    before = module.WINDOW_STEPS, module.FEWEST_STEPS
    module.WINDOW_STEPS, module.FEWEST_STEPS = 6, 4
    try:
        return _plain_rule(losses, norms)
    finally:
        module.WINDOW_STEPS, module.FEWEST_STEPS = before


def test_without_a_select_nan_reaches_the_weights() -> None:
    final = run_ranks(_train, 2, Layout(dp=2, pattern=SHORT), list(SPIKES), True, "factor instead of select")[0][
        "final"
    ]
    assert any(value.isnan().any() for value in final.values())


def test_without_the_sum_over_ranks_they_disagree() -> None:
    with pytest.raises(AssertionError, match="disagree"):
        results = run_ranks(_train, 2, Layout(pp=2, pattern="G|*"), list(SPIKES), True, "each rank's own loss")
        assert all(result["agree"] for result in results), "disagree"


#: Megatron's --dist-ckpt-optim-fully-reshardable, and its default.
FORMATS = ("fully_reshardable", "dp_reshardable")


def _saved_and_loaded(rank: int, root: Path) -> list[list[Any]]:
    """For each format: window before saving, and after loading into a new optimizer, and what it then decides."""
    _shorten()
    return [_window_through(rank, root / sharding, sharding) for sharding in FORMATS]


def _window_through(rank: int, folder: Path, sharding: str) -> list[Any]:
    windows, skips = [], []
    for resumed in (False, True):
        layout = Layout(dp=2, distributed_optimizer=True, pattern=SHORT)
        chunks = tiny.build(layout)
        guard = SkipStep()
        tiny.forward_step = partial(forward_step, observe=guard.observe)
        trainer = tiny.Trainer(layout, chunks, lr=1e-3)
        guard.attach(trainer.optimizer)
        metadata = {"distrib_optim_sharding_type": sharding, "non_homogeneous_layers": True}

        def state(loading: bool = False, chunks: Any = chunks, trainer: Any = trainer, metadata: Any = metadata) -> Any:
            model = chunks[0].sharded_state_dict(metadata=dict(metadata))
            optimizer = trainer.optimizer.sharded_state_dict(model, is_loading=loading, metadata=dict(metadata))
            return {"model": model, "optimizer": optimizer}

        if resumed:
            loaded = dist_checkpointing.load(state(loading=True), str(folder))
            chunks[0].load_state_dict(loaded["model"])
            trainer.optimizer.load_state_dict(loaded["optimizer"])
            windows.append(guard.window.state_dict() if guard.window else None)
            trainer.backward()
            trainer.model[0].buffers[0].grad_data.mul_(1e3)
            trainer.optimizer.step()
            skips.append(float(guard.skipped))
        else:
            for _ in range(5):
                trainer.step()
            windows.append(guard.window.state_dict() if guard.window else None)
            if rank == 0:
                folder.mkdir()
            dist.barrier()
            dist_checkpointing.save(state(), str(folder))
    return [*windows, skips]


def test_the_window_is_in_the_checkpoint(tmp_path: Path) -> None:
    for formats in run_ranks(_saved_and_loaded, 2, tmp_path):
        for sharding, (before, after, skips) in zip(FORMATS, formats, strict=True):
            assert int(before["steps"]) == 5 and torch.equal(before["values"], after["values"]), sharding
            assert torch.equal(before["steps"], after["steps"]) and skips == [1.0], sharding
