"""Models of Transformer Engine's modules, built on CPU where it can be imported; nothing of it runs without a GPU."""

from __future__ import annotations

import importlib.util
import io
import pickle
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel

from megatron_hybrid.checkpoint import extra_state
from megatron_hybrid.layer_specs.olmo_hybrid import build_stack_spec
from megatron_hybrid.model import build_model
from tests.parallel import tiny
from tests.parallel.ranks import run_ranks

HAS_TE = importlib.util.find_spec("transformer_engine") is not None
needs_te = pytest.mark.skipif(not HAS_TE, reason="Transformer Engine is not installed here")


def _build(implementation: str, tp: int = 1, **overrides: Any) -> torch.nn.Module:
    """A model on CPU. Transformer Engine's modules ask for a GPU when they are made, and use none before they run."""
    with patch("torch.cuda.is_available", return_value=True):
        return build_model(
            tiny.make_config(tiny.Layout(tp=tp), **overrides),
            pattern=tiny.PATTERN,
            padded_vocab_size=tiny.PADDED_VOCAB,
            max_sequence_length=tiny.SEQUENCE,
            stack_spec=build_stack_spec(implementation=implementation),  # type: ignore[arg-type]
        )


def _keys(model: torch.nn.Module) -> dict[str, tuple[Any, ...]]:
    """{checkpoint key: (global shape, this rank's offset)} without extra states."""
    state = model.sharded_state_dict(metadata={"non_homogeneous_layers": True})
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    apply_factories(state)
    tensors = [value for value in nested_values(state) if isinstance(value, ShardedTensor)]
    return {f"{t.key}{t.global_offset}": (t.global_shape, t.local_shape) for t in tensors}


def _same_keys(rank: int) -> dict[str, Any]:
    found = {}
    for tp in (1, 2):
        parallel_state.destroy_model_parallel()
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp)
        tensor_parallel.model_parallel_cuda_manual_seed(1)
        models = {name: _build(name, tp) for name in ("local", "transformer_engine")}
        found[tp] = {name: (_keys(model), _shapes(model)) for name, model in models.items()}
    return found


def _shapes(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(param.shape) for name, param in model.named_parameters()}


@needs_te
def test_names_shapes_and_checkpoint_keys_are_those_of_local_modules() -> None:
    for found in run_ranks(_same_keys, 2):
        for models in found.values():
            assert models["transformer_engine"] == models["local"]


def _load(model: torch.nn.Module, folder: Path) -> list[str]:
    said: list[str] = []
    state = model.sharded_state_dict(metadata={"non_homogeneous_layers": True})
    loaded = extra_state.load(dist_checkpointing.load, said.append, state, str(folder))
    model.load_state_dict(loaded, strict=True)
    return said


def _there_and_back(rank: int, folder: str) -> dict[str, Any]:
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    local, other, back = _build("local"), _build("transformer_engine"), _build("local")
    tiny.unsettle([local])
    for name, model in (("local", local), ("te", other)):
        if model is other:
            said = _load(other, Path(folder) / "local")
        (Path(folder) / name).mkdir()
        dist_checkpointing.save(model.sharded_state_dict(metadata={"non_homogeneous_layers": True}), f"{folder}/{name}")
    said_back = _load(back, Path(folder) / "te")
    weights = [dict(model.named_parameters()) for model in (local, other, back)]
    equal = all(torch.equal(weights[0][n], w[n].cpu()) for w in weights[1:] for n in weights[0])
    return {"equal": equal, "said": said, "said_back": said_back}


@needs_te
def test_checkpoints_go_from_local_modules_to_transformer_engine_and_back(tmp_path: Path) -> None:
    found = run_ranks(_there_and_back, 1, str(tmp_path))[0]
    assert found["equal"]
    assert "no _extra_state of" in found["said"][0] and not found["said_back"]


class _Malicious:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("unpickled",)


def _delayed_state(extra: dict[str, Any]) -> torch.Tensor:
    """As Transformer Engine's modules write it under delayed scaling."""
    from megatron.core.extensions.transformer_engine import TEDelayedScaling
    from transformer_engine.common.recipe import Format

    config = tiny.make_config(tiny.Layout())
    state: dict[str, Any] = {"recipe": TEDelayedScaling(config=config, fp8_format=Format.HYBRID)}
    for name in ("scale_fwd", "amax_history_fwd", "scale_bwd", "amax_history_bwd"):
        state[name] = torch.ones(4, 3)
    state |= {"extra_fp8_variables": {"fp8_checkpoint": True, "num_gemms": 1}, **extra}
    return torch.frombuffer(bytearray(pickle.dumps(state)), dtype=torch.uint8)


@needs_te
def test_scales_are_trusted_only_after_every_pickle_was_read_by_the_restricted_unpickler(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from transformer_engine.pytorch._extra_state import UNSAFE_PICKLE_EXTRA_STATE_ENV, should_load_extra_state_pickle

    monkeypatch.setenv(extra_state.TRUSTED, "0")  # so that it is put back afterwards
    assert extra_state.TRUSTED == UNSAFE_PICKLE_EXTRA_STATE_ENV
    good, bad = _delayed_state({}), _delayed_state({"more": _Malicious()})
    with pytest.raises(RuntimeError, match=UNSAFE_PICKLE_EXTRA_STATE_ENV):
        should_load_extra_state_pickle(good.numpy().tobytes(), "a linear")
    state = {"model": {"a._extra_state": good, "b._extra_state": torch.empty(0, dtype=torch.uint8)}}
    with pytest.raises(extra_state.ForeignPickle, match=r"c\._extra_state"):
        extra_state.trust_after_check({"model": {**state["model"], "c._extra_state": bad}})
    with pytest.raises(extra_state.ForeignPickle, match=r"1\.x"):
        extra_state.trust_after_check({"d._extra_state": io.BytesIO(b"")})
    with pytest.raises(RuntimeError):
        should_load_extra_state_pickle(good.numpy().tobytes(), "a linear")
    assert extra_state.trust_after_check(state) == 1
    assert should_load_extra_state_pickle(good.numpy().tobytes(), "a linear")
    assert "unpickled" not in capfd.readouterr().out


def _bf16_layers(rank: int) -> list[int]:
    """Layers that a forward of a model of local modules asks no FP8 context for."""
    from megatron.core import fp8_utils
    from megatron.core.models.hybrid import hybrid_block

    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    model, found = _build("local"), []
    settings = {"fp8": "hybrid", "fp8_recipe": "tensorwise", "first_last_layers_bf16": True}
    settings |= {"num_layers_at_start_in_bf16": 1, "num_layers_at_end_in_bf16": 2}
    for name, value in settings.items():
        setattr(model.config, name, value)

    def context(config: Any, layer: int = -1, **_: Any) -> Any:
        found.extend([layer] * fp8_utils.is_first_last_bf16_layer(config, layer))
        return nullcontext()

    tokens = torch.zeros(1, tiny.SEQUENCE, dtype=torch.long)
    with patch.object(hybrid_block, "get_fp8_context", context):
        model(input_ids=tokens, position_ids=torch.arange(tiny.SEQUENCE)[None], attention_mask=None)
    return found


def test_first_and_last_layers_are_those_of_the_pattern() -> None:
    last = len(tiny.PATTERN) - 1
    assert run_ranks(_bf16_layers, 1) == [[0, last - 1, last]]
