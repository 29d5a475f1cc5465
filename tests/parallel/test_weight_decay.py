"""What decays in a step without gradients, by the released run's choice and by Megatron's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_standard_config_overrides

from megatron_hybrid.config import HybridConfig
from megatron_hybrid.training import hooks, weight_decay
from tests.parallel import tiny
from tests.parallel.ranks import run_ranks
from tests.parallel.tiny import Layout

LR, DECAY = 0.5, 0.1


def _decayed(rank: int, layout: Layout, scope: Any) -> dict[str, bool]:
    """{parameter: whether a step without gradients shrank it by LR · DECAY; the rest did not move}"""
    from megatron.training import training

    hooks.install(HybridConfig(weight_decay_on=scope))
    chunks = tiny.build(layout)
    tiny.unsettle(chunks)
    ddp = DistributedDataParallelConfig(use_distributed_optimizer=layout.distributed_optimizer)
    model = [DistributedDataParallel(chunks[0].config, ddp, chunk) for chunk in chunks]
    settings = {"use_distributed_optimizer": layout.distributed_optimizer, "params_dtype": torch.float32}
    config = OptimizerConfig(optimizer="adam", lr=LR, weight_decay=DECAY, **settings)
    optimizer = training.get_megatron_optimizer(
        config, model, config_overrides=get_standard_config_overrides(config), use_gloo_process_groups=True
    )
    for group in optimizer.param_groups:  # as the scheduler does
        group["weight_decay"] = DECAY * group["wd_mult"]
    before = {name: param.detach().clone() for name, param in chunks[0].named_parameters()}
    for chunk in model:
        chunk.zero_grad_buffer()
    optimizer.step()
    found = {}
    for name, param in chunks[0].named_parameters():
        found[name] = bool(not torch.equal(before[name], param))
        torch.testing.assert_close(param.detach(), before[name] * (1 - LR * DECAY if found[name] else 1))
    return found


@pytest.mark.parametrize(
    "layout", [Layout(dp=2, distributed_optimizer=True, pattern="G*"), Layout(tp=2, pp=2, pattern="G|*")], ids=str
)
def test_everything_decays_but_the_input_embedding(layout: Layout) -> None:
    results = run_ranks(_decayed, layout.ranks, layout, "all_but_embedding")
    names = {name for result in results for name in result}
    assert {"A_log", "dt_bias", "out_norm", "q_weight", "conv1d", "final_norm", "output_layer"} <= {
        part for name in names for part in name.split(".")
    }
    for result in results:
        assert {name for name, decays in result.items() if not decays} <= {"embedding.word_embeddings.weight"}
    assert any("embedding.word_embeddings.weight" in result for result in results)


def test_matrices_is_megatrons_choice() -> None:
    found = run_ranks(_decayed, 1, Layout(pattern="G*"), "matrices")[0]
    assert found["embedding.word_embeddings.weight"] and found["output_layer.weight"]
    assert not any(decays for name, decays in found.items() if name.endswith(("A_log", "dt_bias", "norm.weight")))


def test_another_megatron_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    config = OptimizerConfig(optimizer="adam", lr=1.0)
    given = get_standard_config_overrides(config)
    monkeypatch.setattr(weight_decay, "get_standard_config_overrides", lambda config: {})
    with pytest.raises(RuntimeError, match=r"--weight-decay-on all_but_embedding: Megatron exempts other parameters"):
        weight_decay.overrides(given, config, "all_but_embedding")


def test_a_changed_trainer_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.training import training

    monkeypatch.setattr(training, "training_log", lambda line: None)
    with pytest.raises(RuntimeError, match=r"training_log has no .*iteration.*: another Megatron than 0\.19\.2"):
        hooks.install(HybridConfig())
