"""What the log says of the mixers: against plain formulas on one rank, and the same under every split."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_hybrid.config import HybridConfig
from megatron_hybrid.kernels import reference
from megatron_hybrid.modules import gated_delta_net
from megatron_hybrid.modules.gated_delta_net import GatedDeltaNet
from megatron_hybrid.training.health import SATURATED, Health
from tests.parallel import tiny
from tests.parallel.compare import STAGES
from tests.parallel.ranks import run_ranks
from tests.parallel.tiny import Layout

LAYOUTS = [
    Layout(tp=4, sp=True),
    Layout(dp=2, distributed_optimizer=True),
    Layout(dp=2),
    Layout(cp=2, pp=2, pattern=STAGES, distributed_optimizer=True),
    Layout(cp=2),
]


def _stretched(chunks: list[torch.nn.Module]) -> None:
    """Gates far enough apart that some betas are saturated."""
    with torch.no_grad():
        for chunk in chunks:
            for module in chunk.modules():
                if isinstance(module, GatedDeltaNet):
                    module.ab_proj.weight.mul_(8)


def _health(rank: int, layout: Layout, folder: Path) -> Any:
    chunks = tiny.build(layout, HybridConfig(gdn_cp_comm_type="a2a" if layout == LAYOUTS[-1] else "auto"))
    tiny.load_weights(chunks, folder)
    _stretched(chunks)
    trainer = tiny.Trainer(layout, chunks)
    health = Health(len(layout.pattern.replace("|", "")))
    health.watch(trainer.model, trainer.optimizer)
    trainer.backward()
    _, norm, _ = trainer.optimizer.step()
    measured = health.collect()
    health.enabled = False
    trainer.backward()
    return (*measured, float(norm), health.collect()[0])


def _keep_states(states: list[float]) -> None:
    """From now on each call of a mixer's core leaves the mean norm of its final states, by the definition."""
    mixer_core = gated_delta_net.mixer_core

    def keeping(qkvz: Any, ab: Any, conv_weight: Any, A_log: Any, dt_bias: Any, norm_weight: Any, **more: Any) -> Any:
        Hk, H, K, V = (more[name] for name in ("num_key_heads", "num_value_heads", "key_dim", "value_dim"))
        sections = [Hk * K, Hk * K, H * V]
        with torch.no_grad():
            x = reference.causal_conv_silu(qkvz[..., : sum(sections)], conv_weight.flatten(1))
            q, k, v = (y.unflatten(2, (H, -1)) for y in x.split(sections, dim=-1))
            gates = reference.gates(*ab.chunk(2, dim=-1), A_log, dt_bias, allow_neg_eigval=True)
            _, final = reference.gated_delta_rule_recurrent(reference.l2norm(q), reference.l2norm(k), v, *gates)
        states.append(float(final.square().sum((-2, -1)).sqrt().mean()))
        return mixer_core(qkvz, ab, conv_weight, A_log, dt_bias, norm_weight, **more)

    gated_delta_net.mixer_core = keeping


def _plain(rank: int, folder: Path) -> dict[str, Any]:
    """One rank, from the gates' inputs by the reference, and from the parameters' gradients."""
    chunks = tiny.build(Layout())
    tiny.unsettle(chunks)
    tiny.save_weights(chunks, folder)
    _stretched(chunks)
    trainer = tiny.Trainer(Layout(), chunks)
    gates: dict[int, list[Any]] = {}
    for module in chunks[0].modules():
        if isinstance(module, GatedDeltaNet):

            def keep(linear: Any, inputs: Any, output: Any, mixer: GatedDeltaNet = module) -> None:
                a, b = (inputs[0] @ linear.weight.t()).chunk(2, dim=-1)
                g, beta = reference.gates(a, b, mixer.A_log, mixer.dt_bias, allow_neg_eigval=True)
                gates.setdefault(mixer.layer_number, []).append((g.detach(), beta.detach()))

            module.ab_proj.register_forward_hook(keep)
    states: list[float] = []
    _keep_states(states)
    trainer.backward()
    expected: dict[str, Any] = {}
    for index, (layer, found) in enumerate(gates.items()):
        of_layer = states[index :: len(gates)]
        expected[f"gdn state norm/layer {layer}"] = sum(of_layer) / len(of_layer)
        g, beta = (torch.cat([part.flatten() for part in column]) for column in zip(*found, strict=True))
        expected[f"gdn decay/layer {layer}"] = float(g.double().exp().mean())
        inside = (beta >= 2 * SATURATED) & (beta <= 2 - 2 * SATURATED)
        expected[f"gdn beta saturated/layer {layer}"] = float((~inside).double().mean())
    squares = {"gdn": 0.0, "attention": 0.0}
    for name, param in chunks[0].named_parameters():
        if ".self_attention." in name:
            kind = "gdn" if tiny.PATTERN[int(name.split("layers.")[1].split(".")[0])] == "G" else "attention"
            squares[kind] += float(param.main_grad.double().square().sum())
    return expected | {f"grad norm {kind}": square**0.5 for kind, square in squares.items()}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("health") / "weights"
    return folder, run_ranks(_plain, 1, folder)[0]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_same_as_plain_formulas(layout: Layout, plain: tuple[Path, dict[str, Any]]) -> None:
    folder, expected = plain
    for line, layers, norm, disabled in run_ranks(_health, layout.ranks, layout, folder):
        assert {key: value for key, value in line.items() if "grad norm" in key} | layers == pytest.approx(
            expected, rel=1e-4
        )
        means = [expected[f"gdn decay/layer {layer}"] for layer in (1, 2, 3)]
        assert line["gdn state norm"] > 0
        assert line["gdn decay"] == pytest.approx(sum(means) / 3, rel=1e-5)
        assert 0 < line["gdn beta saturated"] < 1
        assert line["grad norm gdn"] ** 2 + line["grad norm attention"] ** 2 < norm**2
        assert not any("gdn decay" in key for key in disabled)
