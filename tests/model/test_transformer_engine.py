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
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.optimizer import OptimizerConfig, _get_param_groups, get_standard_config_overrides
from megatron.core.transformer import TransformerConfig

from megatron_hybrid.checkpoint import extra_state
from megatron_hybrid.config import HybridConfig
from megatron_hybrid.fp8 import Fp8Error
from megatron_hybrid.layer_specs.olmo_hybrid import FUSED_NORM_NAMES, build_stack_spec
from megatron_hybrid.model import build_model, count_parameters
from megatron_hybrid.presets import PRESETS
from megatron_hybrid.training import weight_decay
from tests.parallel import tiny
from tests.parallel.ranks import run_ranks

HAS_TE = importlib.util.find_spec("transformer_engine") is not None
needs_te = pytest.mark.skipif(not HAS_TE, reason="Transformer Engine is not installed here")


def unfused(name: str) -> str:
    """A parameter's name where its norm is a module of its own."""
    for fused, own in FUSED_NORM_NAMES.items():
        name = name.replace(fused, own)
    return name


def _build(implementation: str, tp: int = 1, options: HybridConfig | None = None, **overrides: Any) -> torch.nn.Module:
    """A model on CPU. Transformer Engine's modules ask for a GPU when they are made, and use none before they run."""
    torch.manual_seed(1)
    with patch("torch.cuda.is_available", return_value=True):
        return build_model(
            tiny.make_config(tiny.Layout(tp=tp, sp=tp > 1), **overrides),
            pattern=tiny.PATTERN,
            padded_vocab_size=tiny.PADDED_VOCAB,
            max_sequence_length=tiny.SEQUENCE,
            stack_spec=build_stack_spec(options, implementation),  # type: ignore[arg-type]
        )


def _keys(model: torch.nn.Module) -> dict[str, tuple[Any, ...]]:
    """{checkpoint key and this rank's offset: (global shape, local shape)} without extra states."""
    state = model.sharded_state_dict(metadata={"non_homogeneous_layers": True})
    apply_factories(state)
    tensors = [value for value in nested_values(state) if isinstance(value, ShardedTensor)]
    return {f"{t.key}{t.global_offset}": (t.global_shape, t.local_shape) for t in tensors}


def _shapes(model: torch.nn.Module) -> list[tuple[str, tuple[int, ...]]]:
    """Under the names of local modules, in the order in which Megatron's optimizer lays parameters out and stores
    their moments."""
    return [(unfused(name), tuple(param.shape)) for name, param in model.named_parameters()]


def _fused(model: torch.nn.Module) -> set[str]:
    """Which linears of which layers hold their norm."""
    end = ".layer_norm_weight"
    return {
        f"{layer}.{name.removesuffix(end)}"
        for layer, module in enumerate(model.decoder.layers)
        for name, _ in module.named_parameters()
        if name.endswith(end)
    }


FP8 = {"fp8": "e4m3", "fp8_recipe": "mxfp8", "bf16": True, "params_dtype": torch.bfloat16}


def _config_7b(tp: int, **more: Any) -> TransformerConfig:
    """Of modules that are made on the meta device, Megatron's own in `torch.cuda.current_device()`."""
    flags = PRESETS["olmo-hybrid-7b"]
    sizes = {name: flags[name.replace("_", "-")] for name in tiny.SIZES if name.replace("_", "-") in flags}
    layout = tiny.Layout(tp=tp, sp=tp > 1, pattern=str(flags["hybrid-layer-pattern"]))
    on_meta = {"use_cpu_initialization": False, "init_model_with_meta_device": True}
    return tiny.make_config(layout, **sizes, **on_meta, **more)


def _build_7b(implementation: str, config: TransformerConfig) -> torch.nn.Module:
    meta = torch.device("meta")
    with (
        meta,
        patch("torch.cuda.current_device", return_value=meta),
        patch("torch.cuda.is_available", return_value=True),
    ):
        return build_model(
            config,
            pattern=str(PRESETS["olmo-hybrid-7b"]["hybrid-layer-pattern"]),
            padded_vocab_size=100352,
            max_sequence_length=8192,
            stack_spec=build_stack_spec(implementation=implementation),  # type: ignore[arg-type]
        )


def _described_7b(rank: int) -> dict[int, dict[str, Any]]:
    found = {}
    for tp in (1, 4):
        parallel_state.destroy_model_parallel()
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp)
        tensor_parallel.model_parallel_cuda_manual_seed(1)
        models = {
            "local": _build_7b("local", _config_7b(tp)),
            "te": _build_7b("transformer_engine", _config_7b(tp)),
            "te fp8": _build_7b("transformer_engine", _config_7b(tp, **FP8)),
        }
        assert all(param.is_meta for model in models.values() for param in model.parameters())
        found[tp] = {name: (_keys(model), _shapes(model)) for name, model in models.items()}
        found[tp]["fused"] = _fused(models["te fp8"])
        found[tp]["count"] = count_parameters([models["te"]])
    with pytest.raises(Fp8Error, match=r"--tensor-model-parallel-size 6: .*multiple of 32; nearest legal: 5"):
        _build_7b("transformer_engine", _config_7b(6, **FP8))
    return found


@needs_te
def test_the_7b_has_the_names_shapes_and_checkpoint_keys_of_local_modules() -> None:
    """On four ranks its 30 heads are padded to 32."""
    for found in run_ranks(_described_7b, 4):
        for models in found.values():
            assert models["te"] == models["te fp8"] == models["local"]
            assert models["fused"] == {f"{layer}.mlp.linear_fc1" for layer in range(32) if layer % 4 != 3}
        assert found[1]["count"] == 7_430_870_688


def _summed(model: torch.nn.Module) -> set[str]:
    """Parameters whose gradients Megatron adds up over tensor-parallel ranks."""
    return {unfused(name) for name, param in model.named_parameters() if getattr(param, "sequence_parallel", False)}


def _decaying(model: torch.nn.Module) -> dict[str, set[str]]:
    """{--weight-decay-on: parameters}"""
    config, found = OptimizerConfig(optimizer="adam", lr=1.0), {}
    names = {id(param): unfused(name) for name, param in model.named_parameters()}
    for scope in ("all_but_embedding", "matrices"):
        overrides = weight_decay.overrides(get_standard_config_overrides(config), config, scope)  # type: ignore[arg-type]
        groups = _get_param_groups([model], config, overrides)
        found[scope] = {names[id(param)] for group in groups if group["wd_mult"] for param in group["params"]}
    return found


def _placements(rank: int) -> dict[str, Any]:
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    found = {}
    for placement in ("released", "pre", "post"):
        options = HybridConfig(norm_placement=placement)  # type: ignore[arg-type]
        te, local = (_build(name, 2, options) for name in ("transformer_engine", "local"))
        assert (_keys(te), _shapes(te), _summed(te)) == (_keys(local), _shapes(local), _summed(local)), placement
        assert len(_summed(te)) == 2 * len(tiny.PATTERN) + 1
        assert _decaying(te) == _decaying(local) and len(_decaying(te)["all_but_embedding"]) == len(_shapes(te)) - 1
        start = {unfused(parameter): value for parameter, value in te.named_parameters()}
        assert all(torch.equal(start[parameter], value) for parameter, value in local.named_parameters())
        found[placement] = _fused(te)
    again = {"recompute_granularity": "selective", "recompute_modules": ["layernorm", "mlp"]}
    for name, override in {"recomputed": again, "fp32 stream": {"fp32_residual_connection": True}}.items():
        found[name] = _fused(_build("transformer_engine", 2, **override))
    return found


@needs_te
def test_which_linears_hold_their_norm() -> None:
    found, other = run_ranks(_placements, 2)
    assert found == other
    mlps = [f"{layer}.mlp.linear_fc1" for layer in range(4)]
    assert found["released"] == {*mlps[:3]} and found["pre"] == {*mlps}
    assert found["post"] == found["recomputed"] == found["fp32 stream"] == set()


def _keeping_their_input(rank: int) -> dict[str, set[str]]:
    """Linears that keep their input as it was, whose memory is given back and filled again, instead of an FP8 copy."""
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    fitting = {"linear_key_head_dim": 16, "linear_value_head_dim": 32, "ffn_hidden_size": 96, "hidden_size": 96}
    fitting |= {"kv_channels": 16, "bf16": True, "params_dtype": torch.bfloat16}
    again = {"recompute_granularity": "selective", "recompute_modules": ["layernorm"]}
    found = {}
    for recipe in ({"fp8": "hybrid", "fp8_recipe": "tensorwise"}, {"fp8": "e4m3", "fp8_recipe": "blockwise"}):
        model = _build("transformer_engine", options=HybridConfig(norm_placement="pre"), **fitting, **recipe, **again)
        found[recipe["fp8_recipe"]] = {
            name.split(".", 2)[2] for name, part in model.named_modules() if getattr(part, "save_original_input", False)
        }
    return found


@needs_te
def test_recomputed_norms_in_fp8() -> None:
    linears = {f"{layer}.self_attention.in_proj" for layer in range(3)} | {"3.self_attention.linear_qkv"}
    linears |= {f"{layer}.mlp.linear_fc1" for layer in range(4)}
    linears |= {"3.self_attention.linear_proj"}  # always, by Megatron
    for recipe, found in run_ranks(_keeping_their_input, 1)[0].items():
        assert found == linears, recipe


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
    weights = [{unfused(n): w for n, w in model.named_parameters()} for model in (local, other, back)]
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
