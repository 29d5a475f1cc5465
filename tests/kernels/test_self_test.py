"""What gates training: the kernels as training will run them."""

from typing import Any

import pytest
import torch

from megatron_hybrid.kernels import gated_delta, self_test

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "kept", [{"states_every": 4, "keep_intermediates": False}, {"keep_intermediates": True}], ids=str
)
def test_the_save_policy_of_the_run_is_tested(kept: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """From training's gate to the kernels, whose place the reference takes here, where no GPU is."""
    asked = []

    def rule(*tensors: Any, backend: str, **options: Any) -> Any:
        asked.append((backend, {name: options[name] for name in kept}))
        return original(*tensors, backend="reference", **options)

    original = gated_delta.gated_delta_rule
    monkeypatch.setattr(gated_delta, "gated_delta_rule", rule)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        self_test, "self_test", lambda *sizes, **kept: self_test.kernel_errors(*sizes, CPU, 64, 1, **kept)
    )
    self_test.before_training.cache_clear()
    errors = self_test.before_training(None, torch.bfloat16, 16, 16, **kept)
    self_test.before_training.cache_clear()
    assert errors.keys() == self_test.TOLERANCES.keys()
    assert asked == [("triton", kept)] * 2 + [("reference", kept)]
