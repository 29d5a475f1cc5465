"""verify: all rows hold for what belongs together, and each kind of damage is named by the tensor it is in."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_hybrid.checkpoint import commit
from megatron_hybrid.kernels import reference
from megatron_hybrid.tools import hf_logits
from megatron_hybrid.tools.cli import ToolError
from megatron_hybrid.tools.convert import verify_models
from megatron_hybrid.tools.convert.hf_config import hf_config
from megatron_hybrid.tools.convert.output_folder import read_json, write_json
from megatron_hybrid.tools.convert.to_huggingface import ExportOptions, export
from megatron_hybrid.tools.convert.to_megatron import ImportOptions, import_model
from megatron_hybrid.tools.convert.verify import VerifyOptions, verify
from megatron_hybrid.tools.convert.verify_models import LENGTHS
from megatron_hybrid.tools.convert.verify_rows import Row
from megatron_hybrid.tools.dcp_reader import find_iteration
from megatron_hybrid.tools.hf_mapping import ModelConfig
from tests.parallel.ranks import run_ranks
from tests.tools.tiny_model import ROOT, TINY, random_hf_tensors, train_sentencepiece

Tensors = dict[str, torch.Tensor]
TEXT = "class Stack:\n    def push(self, item):\n        self.items += [item]\n" * 12
BASELINE = replace(TINY, hybrid_layer_pattern="****", window_size=(15, 0), window_attn_skip_freq=4)


def make_pair(folder: Path, config: ModelConfig) -> Path:
    """A folder with `megatron` and `hf` of one model, and a `tokenizer.model`."""
    (folder / "source").mkdir()
    write_json(folder / "source" / "config.json", hf_config(config, "float32"))
    tensors = {name: tensor * 0.1 for name, tensor in random_hf_tensors(config).items()}
    tensors["lm_head.weight"] *= 10  # so that perplexity depends on the layers
    save_file(tensors, folder / "source" / "model.safetensors")
    train_sentencepiece(folder / "tokenizer.model")
    import_model(ImportOptions(folder / "source", folder / "megatron", true_vocab_size=config.true_vocab_size))
    export(ExportOptions(folder / "megatron", folder / "hf", tokenizer_model=folder / "tokenizer.model"))
    return folder


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pair(tmp_path_factory.mktemp("pair"), TINY)


def rows_of(pair: Path, model: Path) -> dict[str, Row]:
    return {row.name: row for row in verify(VerifyOptions(pair / "megatron", model, weights_only=True))}


def failed(rows: dict[str, Row]) -> str:
    """What the failing rows say."""
    return "; ".join(f"{row.name}: {row.what}" for row in rows.values() if row.holds is False)


def test_all_rows_hold_and_the_models_agree(pair: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text(TEXT)
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


def test_a_cut_file_that_holds_no_weight_is_named(pair: Path, tmp_path: Path) -> None:
    """As the optimizer's, which no row reads: known by the save's manifest."""
    checkpoint = Path(shutil.copytree(pair / "megatron", tmp_path / "megatron"))
    folder = find_iteration(checkpoint)
    commit.retract(folder)
    (folder / commit.MANIFEST).unlink()
    (folder / "__99_0.distcp").write_bytes(bytes(1000))
    commit.adopt(folder)
    options = VerifyOptions(checkpoint, pair / "hf", weights_only=True)
    assert not any(row.holds is False for row in verify(options))
    os.truncate(folder / "__99_0.distcp", 999)
    with pytest.raises(ToolError, match=r"__99_0\.distcp has 999 bytes, saved were 1000; use another iteration"):
        verify(options)


def test_a_table_with_a_failing_row_ends_with_status_1(pair: Path, tmp_path: Path) -> None:
    from megatron_hybrid.tools.convert.__main__ import print_verified

    model = Path(shutil.copytree(pair / "hf", tmp_path / "hf"))
    tensors = load_file(model / "model.safetensors")
    _one_bit(tensors)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ToolError, match=r"2 of 10 rows do not hold: weights, SHA-256"):
        print_verified(VerifyOptions(pair / "megatron", model, weights_only=True))


def _megatron(rank: int, arguments: list[str], broken: str) -> None:
    """`python -m megatron_hybrid.logits`, in this forked rank, with a fault in it."""
    from megatron_hybrid import logits
    from megatron_hybrid.parallel import packed

    if broken == "state forgotten every 64 tokens":
        scan = reference._scan_states

        def forgetting(terms: Any, states: torch.Tensor, layout: Any) -> Any:
            return torch.zeros_like(scan(terms, states, layout)[0]), terms.u, states

        reference._scan_states = forgetting
    elif broken == "packed documents see each other":
        pack = packed.pack
        packed.pack = lambda lengths, *more, **named: pack([sum(lengths)], *more, **named)
    elif broken == "window one token wider":
        arguments[arguments.index("15,0")] = "16,0"
    else:
        assert not broken
    logits.main(arguments)


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[Path, str], dict[str, bool | None]]:
    """Which rows hold with a fault in Megatron's half, each half run as its command line runs it."""

    def of(pair: Path, broken: str) -> dict[str, bool | None]:
        def run(name: str, command: list[str]) -> None:
            if name == "hf_logits":
                monkeypatch.setattr(sys, "argv", command[1:])
                hf_logits.main()
            else:
                run_ranks(_megatron, 1, command[2:], broken)

        monkeypatch.setattr(verify_models, "_run", run)
        (tmp_path / "text").write_text(TEXT)
        found = verify(VerifyOptions(pair / "megatron", pair / "hf", text=tmp_path / "text"))
        assert all(row.holds for row in found[:6])
        return {row.name: row.holds for row in found[6:]}

    return of


def test_both_models_run_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    asks = "import os, sys; sys.exit(os.environ['CUDA_VISIBLE_DEVICES'] != '')"
    verify_models._run("as a model", ["-c", asks])
    with pytest.raises(ToolError, match="as a model failed with status 1"):
        verify_models._run("as a model", ["-c", asks.replace("!=", "==")])


FAULTS: dict[str, list[str]] = {
    "state forgotten every 64 tokens": ["logits, T=65", "logits, T=200", "logits, packed", "perplexity"],
    "packed documents see each other": ["logits, packed"],
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_the_model_shows(fault: str, pair: Path, rows: Any) -> None:
    """Each in the rows that can know of it: what forgets every 64 tokens is right for 64, and for 48 greedy ones."""
    assert [name for name, holds in rows(pair, fault).items() if not holds] == FAULTS[fault]


def test_the_transformer_baseline_is_transformers_olmo3(tmp_path: Path, rows: Any) -> None:
    (tmp_path / "pair").mkdir()
    pair = make_pair(tmp_path / "pair", BASELINE)
    assert all(rows(pair, "").values())
    assert not any(rows(pair, "window one token wider").values())
