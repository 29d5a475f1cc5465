"""verify: all rows hold for what belongs together, and each kind of damage is named by the tensor it is in."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_hybrid.tools.convert.hf_config import hf_config
from megatron_hybrid.tools.convert.output_folder import read_json, write_json
from megatron_hybrid.tools.convert.to_huggingface import ExportOptions, export
from megatron_hybrid.tools.convert.to_megatron import ImportOptions, import_model
from megatron_hybrid.tools.convert.verify import VerifyOptions, verify
from megatron_hybrid.tools.convert.verify_models import LENGTHS
from megatron_hybrid.tools.convert.verify_rows import Row
from tests.tools.tiny_model import ROOT, TINY, random_hf_tensors, train_sentencepiece

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `megatron` and `hf` of one model, and a `tokenizer.model`."""
    folder = tmp_path_factory.mktemp("pair")
    (folder / "source").mkdir()
    write_json(folder / "source" / "config.json", hf_config(TINY, "float32"))
    tensors = {name: tensor * 0.1 for name, tensor in random_hf_tensors(TINY).items()}
    save_file(tensors, folder / "source" / "model.safetensors")
    train_sentencepiece(folder / "tokenizer.model")
    import_model(ImportOptions(folder / "source", folder / "megatron", true_vocab_size=TINY.true_vocab_size))
    export(ExportOptions(folder / "megatron", folder / "hf", tokenizer_model=folder / "tokenizer.model"))
    return folder


def rows_of(pair: Path, model: Path) -> dict[str, Row]:
    return {row.name: row for row in verify(VerifyOptions(pair / "megatron", model, weights_only=True))}


def failed(rows: dict[str, Row]) -> str:
    """What the failing rows say."""
    return "; ".join(f"{row.name}: {row.what}" for row in rows.values() if row.holds is False)


def test_all_rows_hold_and_the_models_agree(pair: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("class Stack:\n    def push(self, item):\n        self.items += [item]\n" * 3)
    command = ["verify", "--checkpoint", pair / "megatron", "--model", pair / "hf", "--text", tmp_path / "text"]
    done = subprocess.run(
        [sys.executable, "-m", "megatron_hybrid.tools.convert", *map(str, command)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert [line.split("  ")[0] for line in lines] == [
        *("config", "names", "shapes", "dtypes", "weights", "SHA-256"),
        *(f"logits, T={length}" for length in LENGTHS),
        *("logits, packed", "32 greedy tokens", "perplexity"),
    ]
    assert all("  holds  " in line for line in lines), done.stdout
    assert LENGTHS == (64, 65, 200)


def _swap(tensors: Tensors) -> None:
    one, other = "model.layers.1.linear_attn.q_proj.weight", "model.layers.1.linear_attn.k_proj.weight"
    tensors[one], tensors[other] = tensors[other], tensors[one]


def _transpose(tensors: Tensors) -> None:
    name = "model.layers.3.self_attn.q_proj.weight"
    assert tensors[name].shape[0] == tensors[name].shape[1]
    tensors[name] = tensors[name].T.contiguous()


def _zero_a_head(tensors: Tensors) -> None:
    tensors["model.layers.3.self_attn.v_proj.weight"][20:40] = 0


def _one_bit(tensors: Tensors) -> None:
    flat = tensors["model.layers.7.mlp.down_proj.weight"].reshape(-1).view(torch.int32)
    flat[1000] ^= 1


def _rename(old: str, new: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[new] = tensors.pop(old)

    return change


MUTATIONS: dict[str, tuple[Callable[[Tensors], object], list[str]]] = {
    "two_of_one_shape_swapped": (
        _swap,
        [
            "weights: model.layers.1.linear_attn.q_proj.weight differs in",
            "model.layers.1.linear_attn.k_proj.weight differs",
        ],
    ),
    "dropped": (
        lambda tensors: tensors.pop("model.layers.4.linear_attn.dt_bias"),
        ["names: model.layers.4.linear_attn.dt_bias is missing"],
    ),
    "renamed": (
        _rename("model.layers.0.linear_attn.o_norm.weight", "model.layers.0.linear_attn.norm.weight"),
        ["model.layers.0.linear_attn.o_norm.weight is missing", "model.layers.0.linear_attn.norm.weight is extra"],
    ),
    "square_one_transposed": (_transpose, ["weights: model.layers.3.self_attn.q_proj.weight differs in"]),
    "one_head_zeroed": (
        _zero_a_head,
        ["weights: model.layers.3.self_attn.v_proj.weight differs in 2,400 of 14,400 elements, rows 20 to 39"],
    ),
    "one_bit": (
        _one_bit,
        ["model.layers.7.mlp.down_proj.weight differs in 1 of 10,560", "SHA-256: model.layers.7"],
    ),
    "shape": (
        lambda tensors: tensors.update({"model.norm.weight": torch.ones(60)}),
        ["shapes: model.norm.weight is [60] instead of [120]"],
    ),
    "dtype": (
        lambda tensors: tensors.update({"model.norm.weight": torch.ones(120).bfloat16()}),
        ["dtypes: model.norm.weight is bfloat16"],
    ),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_mutation_is_named(mutation: str, pair: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(pair / "hf", tmp_path / "hf"))
    assert not failed(rows_of(pair, model))
    change, expected = MUTATIONS[mutation]
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    found = failed(rows_of(pair, model))
    for words in expected:
        assert words in found


def test_a_wrong_configuration_is_named_and_no_model_is_run(pair: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(pair / "hf", tmp_path / "hf"))
    values = read_json(model / "config.json", "")
    write_json(model / "config.json", values | {"rope_parameters": {"rope_theta": None}, "rms_norm_eps": 1e-5})
    rows = {row.name: row for row in verify(VerifyOptions(pair / "megatron", model))}
    assert "rms_norm_eps: 1e-06 in the checkpoint, 1e-05 in config.json" in failed(rows)
    assert "rope_theta: 500000.0 in the checkpoint, None in config.json" in failed(rows)
    assert rows["logits"].holds is False and "not run" in rows["logits"].what


def test_a_table_with_a_failing_row_ends_with_status_1(pair: Path, tmp_path: Path) -> None:
    from megatron_hybrid.tools.cli import ToolError
    from megatron_hybrid.tools.convert.__main__ import print_verified

    model = Path(shutil.copytree(pair / "hf", tmp_path / "hf"))
    tensors = load_file(model / "model.safetensors")
    _one_bit(tensors)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ToolError, match=r"2 of 10 rows do not hold: weights, SHA-256"):
        print_verified(VerifyOptions(pair / "megatron", model, weights_only=True))
