"""Imported models in Megatron itself: loaded by its own functions under any layout, saved, exported, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_hybrid import compat, pretrain
from megatron_hybrid.checkpoint import sidecar
from megatron_hybrid.config import HybridConfig
from megatron_hybrid.flags import compose
from megatron_hybrid.presets import PRESETS
from megatron_hybrid.tools.cli import ToolError
from megatron_hybrid.tools.convert import ExportOptions, export
from megatron_hybrid.tools.convert.hf_config import hf_config, read_hf_config
from megatron_hybrid.tools.convert.model_flags import training_flags
from megatron_hybrid.tools.convert.output_folder import write_json
from megatron_hybrid.tools.convert.to_megatron import ImportOptions, import_model
from megatron_hybrid.tools.convert.to_olmo_core import OlmoCoreOptions, export_olmo_core
from megatron_hybrid.tools.dcp_reader import TorchDistCheckpoint
from megatron_hybrid.tools.hf_mapping import ModelConfig, config_from_sidecar, hf_tensor_shapes
from megatron_hybrid.tools.indexed_dataset import IndexedDatasetWriter
from megatron_hybrid.tools.plot_run import read_series
from tests.model.test_transformer_engine import needs_te
from tests.parallel.ranks import run_ranks
from tests.test_pretrain import VOCAB, _train
from tests.test_pretrain import _arguments as _arguments_of_a_run
from tests.tools.tiny_model import TINY, random_hf_tensors

HYBRID = replace(TINY, hybrid_layer_pattern="GGG*", rope_theta=None, max_position_embeddings=64)
BASELINE = replace(
    TINY, hybrid_layer_pattern="****", window_size=(15, 0), window_attn_skip_freq=4, max_position_embeddings=64
)
ISLANDS = ("A_log", "dt_bias")


def write_hf(config: ModelConfig, folder: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """A Hugging Face folder of random weights; returns them."""
    tensors = {name: (tensor * 0.1).to(dtype) for name, tensor in random_hf_tensors(config).items()}
    folder.mkdir()
    write_json(folder / "config.json", hf_config(config, str(dtype).removeprefix("torch.")))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return tensors


def _load_and_save(
    rank: int,
    arguments: list[str],
    take_out: Callable[[], None],
    provide: Callable[..., Any] = pretrain.provide_model,
) -> int:
    """What the trainer does with a checkpoint, by the trainer's functions; the iteration it starts at."""
    take_out()
    args = pretrain.prepare(arguments)

    from megatron.training import training
    from megatron.training.checkpointing import load_checkpoint, save_checkpoint

    training.initialize_megatron()
    model = training.get_model(provide, wrap_with_ddp=False)
    iteration, _ = load_checkpoint(model, None, None)
    args.no_save_optim = args.no_save_rng = True
    save_checkpoint(1, model, None, None, 0)
    return iteration


def _as_it_is() -> None: ...


def _arguments(config: ModelConfig, load: Path, save: Path, bf16: bool, *more: str) -> list[str]:
    """The flags that the import prints, and those it leaves to the user."""
    flags = [
        *training_flags(config),
        *("--tokenizer-type", "NullTokenizer", "--vocab-size", str(config.true_vocab_size - 1)),
        *("--seq-length", "64", "--micro-batch-size", "1", "--global-batch-size", "4"),
        *("--load", str(load), "--save", str(save), "--exit-on-missing-checkpoint", "--mock-data"),
    ]
    return [*flags, *more] if bf16 else [*flags, "--without", "bf16", *more]


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[ModelConfig, bool], Any]:
    """(Weights, the Megatron folder made of them) of a model in fp32 or bf16, made when first asked for."""
    known: dict[tuple[ModelConfig, bool], Any] = {}

    def of(config: ModelConfig, bf16: bool) -> Any:
        if (config, bf16) not in known:
            folder = tmp_path_factory.mktemp("imported")
            tensors = write_hf(config, folder / "hf", torch.bfloat16 if bf16 else torch.float32)
            import_model(ImportOptions(folder / "hf", folder / "megatron", true_vocab_size=config.true_vocab_size))
            known[config, bf16] = tensors, folder / "megatron"
        return known[config, bf16]

    return of


TP4 = ["--tensor-model-parallel-size", "4", "--sequence-parallel"]  # 6 heads padded to 8, 384 rows to 512
PP2_VPP = ["--pipeline-model-parallel-size", "2", "--hybrid-layer-pattern", "G|G|G|*"]
LAYOUTS: dict[str, tuple[int, ModelConfig, bool, list[str]]] = {
    "tp1-fp32": (1, HYBRID, False, []),
    "tp2-bf16": (2, HYBRID, True, ["--tensor-model-parallel-size", "2"]),
    "tp4_padded-fp32": (4, HYBRID, False, TP4),
    "tp4_padded-bf16": (4, HYBRID, True, TP4),
    "pp2-fp32": (2, HYBRID, False, ["--pipeline-model-parallel-size", "2", "--hybrid-layer-pattern", "GG|G*"]),
    "pp4-bf16": (4, HYBRID, True, ["--pipeline-model-parallel-size", "4", "--hybrid-layer-pattern", "G|G|G|*"]),
    "pp2_vpp2-fp32": (2, HYBRID, False, PP2_VPP),
    "tp2_pp2_vpp2-bf16": (4, HYBRID, True, [*PP2_VPP, "--tensor-model-parallel-size", "2"]),
    "olmo3-tp4_padded-bf16": (4, BASELINE, True, TP4),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_round_trip_through_megatron_is_bit_equal(layout: str, imported: Any, tmp_path: Path) -> None:
    ranks, config, bf16, more = LAYOUTS[layout]
    tensors, folder = imported(config, bf16)
    arguments = _arguments(config, folder, tmp_path / "saved", bf16, *more)
    assert run_ranks(_load_and_save, ranks, arguments, _as_it_is) == [0] * ranks
    export(ExportOptions(tmp_path / "saved", tmp_path / "hf"))
    _assert_equal(load_file(tmp_path / "hf" / "model.safetensors"), tensors, islands=torch.float32)
    if bf16:
        export(ExportOptions(tmp_path / "saved", tmp_path / "release", match_release=True))
        _assert_equal(load_file(tmp_path / "release" / "model.safetensors"), tensors, islands=torch.bfloat16)


def _provide_te_model(*stage: Any, **options: Any) -> Any:
    """Transformer Engine's modules ask for a GPU when they are made; to be loaded and saved they need none."""
    with patch("torch.cuda.is_available", return_value=True):
        model = pretrain.provide_model(*stage, **options)
    assert "mlp.linear_fc1.layer_norm_weight" in dict(model.decoder.layers[0].named_parameters())
    return model


@needs_te
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_import_to_transformer_engine_to_local_modules_and_back_is_bit_equal(
    bf16: bool, imported: Any, tmp_path: Path
) -> None:
    """Each loads what the one before has saved; heads are padded, split and whole."""
    tensors, folder = imported(HYBRID, bf16)
    te = ["--transformer-impl", "transformer_engine"]
    for name, ranks, provide, more in (
        ("te-padded", 4, _provide_te_model, [*te, *TP4]),
        ("local", 1, pretrain.provide_model, []),
        ("te", 1, _provide_te_model, te),
    ):
        arguments = _arguments(HYBRID, folder, tmp_path / name, bf16, *more)
        run_ranks(_load_and_save, ranks, arguments, _as_it_is, provide)
        folder = tmp_path / name
        export(ExportOptions(folder, tmp_path / f"{name}-hf"))
        _assert_equal(load_file(tmp_path / f"{name}-hf" / "model.safetensors"), tensors, islands=torch.float32)


def _assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], islands: torch.dtype) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == (islands if name.endswith(ISLANDS) else tensor.dtype), name
        assert torch.equal(found[name].float(), tensor.float()), name


def test_a_run_moves_to_olmo_core_and_back_and_goes_on(tmp_path: Path) -> None:
    """Three steps, Adam's state through OLMo-core's format, three more: the losses of six steps, bit for bit."""
    prefix, flags = tmp_path / "text", ["--use-distributed-optimizer", "--save-interval", "100"]
    generator = np.random.default_rng(0)
    with IndexedDatasetWriter(prefix, VOCAB) as writer:
        for _ in range(40):
            writer.add_document(generator.integers(0, VOCAB - 1, size=200))
        writer.commit()
    straight, first, moved = (tmp_path / name for name in ("straight", "first", "moved"))
    run_ranks(_train, 1, _arguments_of_a_run(prefix, straight, *flags))
    run_ranks(_train, 1, _arguments_of_a_run(prefix, first, *flags, "--exit-interval", "3"))
    _assert_round_trip_of_weights(first / "checkpoints", tmp_path)
    export_olmo_core(OlmoCoreOptions(first / "checkpoints", tmp_path / "core", optimizer=True))
    options = ImportOptions(tmp_path / "core", moved / "checkpoints", config=tmp_path / "core" / "huggingface")
    options = replace(options, optimizer=True, global_batch_size=4, lr=3e-3, min_lr=3e-4, true_vocab_size=VOCAB - 1)
    import_model(options)
    one, other = (TorchDistCheckpoint(path / "checkpoints" / "iter_0000003") for path in (first, moved))
    assert one.tensors.keys() == other.tensors.keys() and any("exp_avg_sq" in name for name in one.tensors)
    for name in one.tensors:
        assert torch.equal(one.read(name), other.read(name)), name
    run_ranks(_train, 1, _arguments_of_a_run(prefix, moved, *flags, "--override-opt-param-scheduler"))
    expected, found = (read_series(run / "tensorboard") for run in (straight, moved))
    for tag in ("lm loss", "grad-norm", "learning-rate"):
        assert list(found[tag].steps) == [4, 5, 6]
        np.testing.assert_array_equal(found[tag].values, expected[tag].values[3:], err_msg=tag)


def _assert_round_trip_of_weights(trained: Path, folder: Path) -> None:
    """What training has saved, to Hugging Face and back: the same tensors, bit for bit."""
    export(ExportOptions(trained, folder / "hf"))
    import_model(ImportOptions(folder / "hf", folder / "again"))
    one, other = (TorchDistCheckpoint(path) for path in (trained / "iter_0000003", folder / "again" / "release"))
    for name in other.tensors:
        assert torch.equal(one.read(name)[: other.stored(name).shape[0]], other.read(name)), name
    assert len(other.tensors) > 60


LADDER = [name for name in PRESETS if name.startswith("ladder-")]


def _described(rank: int, flags: dict[str, list[str]]) -> dict[str, dict[str, Any]]:
    """What the trainer says of the model that flags make, parsed by Megatron."""
    from megatron.training import global_vars

    common = ["--mock-data", "--tokenizer-type", "NullTokenizer", "--vocab-size", "100277", "--eval-iters", "0"]
    found = {}
    for name, words in flags.items():
        own, rest = pretrain.own_arguments([*words, *common])
        args = pretrain.parse([*compose(own.preset, rest, own.without), *compat.backend_flags([])])
        args.padded_vocab_size = 100352
        found[name] = sidecar.describe(args, HybridConfig.from_args(args), 100278, 100277)
        global_vars.unset_global_variables()  # Megatron parses once a process
    return found


def test_every_ladder_preset_has_a_hugging_face_form(tmp_path: Path) -> None:
    """Preset to config.json and back to flags: the same model, of the tensors that transformers gives it."""
    assert len(LADDER) == 42
    described = run_ranks(_described, 1, {name: ["--preset", name] for name in LADDER})[0]
    flags = {}
    for name, values in described.items():
        if name.endswith("-gdn"):
            with pytest.raises(ToolError, match=r"needs at least one \*; transformers refuses the model otherwise"):
                config_from_sidecar(values, name)
            continue
        config = config_from_sidecar(values, name)
        write_json(tmp_path / "config.json", hf_config(config, "bfloat16"))
        read = read_hf_config(tmp_path, config.true_vocab_size)
        flags[name] = training_flags(read)
        if "-60m-" in name:
            assert _shapes_of_transformers(tmp_path) == hf_tensor_shapes(config), name
    chosen = {name: words for name, words in flags.items() if "-60m-" in name or "-1b-" in name}
    again = run_ranks(_described, 1, chosen)[0]
    for name in again:
        assert config_from_sidecar(again[name], name) == config_from_sidecar(described[name], name), name


def _shapes_of_transformers(folder: Path) -> dict[str, Any]:
    """Names and shapes of the tensors of transformers' own model, its fused convolutions cut as on disk."""
    config = AutoConfig.from_pretrained(str(folder))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    found = {}
    for name, parameter in model.named_parameters():
        if name.endswith("linear_attn.conv1d.weight"):
            keys = config.linear_num_key_heads * config.linear_key_head_dim
            rows = (keys, keys, parameter.shape[0] - 2 * keys)
            for part, count in zip("qkv", rows, strict=True):
                found[name.replace("conv1d", f"{part}_conv1d")] = (count, *parameter.shape[1:])
        else:
            found[name] = tuple(parameter.shape)
    return found
