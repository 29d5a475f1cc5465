"""Import from Hugging Face: any dialect gives the same checkpoint, and nothing wrong gets in or leaves a folder."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_hybrid.checkpoint import commit
from megatron_hybrid.tools.cli import ToolError
from megatron_hybrid.tools.convert import ExportOptions, export
from megatron_hybrid.tools.convert.dcp_writer import DcpWriter
from megatron_hybrid.tools.convert.hf_config import hf_config, read_hf_config
from megatron_hybrid.tools.convert.info import InfoOptions, info
from megatron_hybrid.tools.convert.output_folder import write_json
from megatron_hybrid.tools.convert.safetensors_folder import SafetensorsWriter, read_folder, read_tensor
from megatron_hybrid.tools.convert.source import FP32_ISLANDS
from megatron_hybrid.tools.convert.to_megatron import ImportOptions, import_model
from megatron_hybrid.tools.dcp_reader import TorchDistCheckpoint
from megatron_hybrid.tools.hf_logits import load_model
from megatron_hybrid.tools.hf_mapping import ModelConfig, config_from_sidecar
from tests.tools.tiny_model import GROUPED, ROOT, TINY, directly_filled_model, random_hf_tensors

BASELINE = replace(TINY, hybrid_layer_pattern="****" * 2, window_size=(15, 0), window_attn_skip_freq=4)


def write_hf(folder: Path, tensors: dict[str, torch.Tensor], config: ModelConfig = TINY, shards: int = 1) -> Path:
    """A Hugging Face folder, with an index if there are several shards."""
    folder.mkdir(parents=True)
    write_json(folder / "config.json", hf_config(config, "float32"))
    names = list(tensors)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[number::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    return folder


def converted(model: Path, folder: Path, **options: object) -> dict[str, torch.Tensor]:
    """What comes back as Hugging Face tensors."""
    import_model(ImportOptions(model, folder / "megatron", **options))  # type: ignore[arg-type]
    export(ExportOptions(folder / "megatron", folder / "back"))
    return {name: read_tensor(place) for name, place in read_folder(folder / "back").items()}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        wanted = tensor.float() if name.endswith(FP32_ISLANDS) else tensor
        assert found[name].dtype == wanted.dtype and torch.equal(found[name], wanted), name


@pytest.mark.parametrize("config", [TINY, GROUPED, BASELINE, replace(TINY, rope_theta=None)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_round_trip_is_bit_equal(config: ModelConfig, dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in random_hf_tensors(config).items()}
    model = write_hf(tmp_path / "hf", tensors, config, shards=3)
    assert_same(converted(model, tmp_path, true_vocab_size=config.true_vocab_size), tensors)
    described = json.loads((tmp_path / "megatron" / "megatron_hybrid.json").read_text())
    for read in (config_from_sidecar(described, "here"), read_hf_config(tmp_path / "back", config.true_vocab_size)):
        if not config.is_hybrid:  # config.json has no such keys
            unused = {name: value for name, value in asdict(config).items() if name.startswith("linear_")}
            read = replace(read, **unused)
        assert read == config


@pytest.mark.parametrize("model_type", ["olmo_hybrid", "olmo3"])
@pytest.mark.parametrize("layers", [2, 3, 32])
def test_defaults_are_those_of_transformers(model_type: str, layers: int, tmp_path: Path) -> None:
    from transformers import Olmo3Config, OlmoHybridConfig

    theirs = {"olmo_hybrid": OlmoHybridConfig, "olmo3": Olmo3Config}[model_type](num_hidden_layers=layers)
    said = {"model_type": model_type, "num_hidden_layers": layers, "rope_theta": 5e5}
    write_json(tmp_path / "config.json", said)
    found = asdict(read_hf_config(tmp_path, None))
    assert found.pop("rope_scaling") is None  # there another name of rope_parameters
    for name, value in found.items():
        if hasattr(theirs, name) and not (model_type == "olmo3" and name.startswith("linear_")):
            assert value == getattr(theirs, name), name
    assert read_hf_config(tmp_path, None).layer_types == theirs.layer_types
    if model_type == "olmo3":
        assert found["window_size"] == (theirs.sliding_window - 1, 0)


def renamed(tensors: dict[str, torch.Tensor], changes: Callable[[str], str]) -> dict[str, torch.Tensor]:
    return {changes(name): tensor for name, tensor in tensors.items()}


def is_gdn(name: str) -> bool:
    return name.startswith("model.layers.") and TINY.layer_types[int(name.split(".")[2])] == "linear_attention"


def early(name: str) -> str:
    """hf-internal-testing's first names."""
    if not is_gdn(name):
        return name
    name = name.replace("input_layernorm", "attention_layer_norm")
    return name.replace("post_attention_layernorm", "feedforward_layer_norm")


def olmo_core_export(name: str) -> str:
    """What OLMo-core's exporter writes since June 2026."""
    return name.replace("linear_attn.o_proj", "linear_attn.out_proj").replace("linear_attn.o_norm", "linear_attn.norm")


@pytest.mark.parametrize("dialect", [early, olmo_core_export])
def test_other_names_are_read(dialect: Callable[[str], str], tmp_path: Path) -> None:
    tensors = random_hf_tensors(TINY)
    model = write_hf(tmp_path / "hf", renamed(tensors, dialect))
    assert_same(converted(model, tmp_path), tensors)


@pytest.mark.parametrize("loaded", [False, True], ids=["built", "from_pretrained"])
def test_what_save_pretrained_writes_is_read(loaded: bool, tmp_path: Path) -> None:
    """transformers 5.23 cuts its fused convolution into equal thirds, whatever the sizes, and may rename norms."""
    tensors = random_hf_tensors(TINY)
    model = load_model(write_hf(tmp_path / "hf", tensors)) if loaded else directly_filled_model(TINY, tensors)
    model.save_pretrained(tmp_path / "saved")
    written = load_file(tmp_path / "saved" / "model.safetensors")
    assert written["model.layers.0.linear_attn.q_conv1d.weight"].shape != (144, 1, 4)
    assert ("model.layers.3.feedforward_layer_norm.weight" in written) != loaded
    assert_same(converted(tmp_path / "saved", tmp_path), tensors)


def _flip(folder: Path) -> None:
    """One bit of a tensor's bytes."""
    path = folder / "model-00002-of-00003.safetensors"
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)


def _truncate(folder: Path) -> None:
    path = folder / "model-00002-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def _edit(number: int, change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    """Changes the tensors of a file, and the index with it."""

    def damage(folder: Path) -> None:
        path = folder / f"model-{number:05d}-of-00003.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, metadata={"format": "pt"})
        described = json.loads((folder / "model.safetensors.index.json").read_text())
        kept = {name: file for name, file in described["weight_map"].items() if file != path.name}
        described["weight_map"] = kept | dict.fromkeys(tensors, path.name)
        write_json(folder / "model.safetensors.index.json", described)

    return damage


def _index(change: Callable[[dict[str, str]], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        described = json.loads((folder / "model.safetensors.index.json").read_text())
        change(described["weight_map"])
        write_json(folder / "model.safetensors.index.json", described)

    return damage


def _link(folder: Path) -> None:
    path = folder / "model-00001-of-00003.safetensors"
    path.rename(folder.parent / "elsewhere")
    path.symlink_to(folder.parent / "elsewhere")


def _config(**changes: object) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        values = json.loads((folder / "config.json").read_text())
        write_json(folder / "config.json", values | changes)

    return damage


NORM, HEAD = "model.norm.weight", "lm_head.weight"
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "bit_flipped": (_flip, r"00002-of-00003.safetensors: \S+ is not what conversion.json has recorded \(SHA-256\)"),
    "truncated": (_truncate, r"00002-of-00003.safetensors: unreadable .* truncated or damaged"),
    "no_shard": (lambda f: (f / "model-00002-of-00003.safetensors").unlink(), r"00002-of-00003.safetensors: no such"),
    "symlink": (_link, r"00001-of-00003.safetensors: it is a symbolic link to .*--follow-symlinks"),
    "symlinked_config": (
        lambda f: ((f / "config.json").rename(f / "c"), (f / "config.json").symlink_to(f / "c")),
        r"config.json: it is a symbolic link",
    ),
    "index_leads_out": (
        _index(lambda w: w.update({HEAD: "../../etc/passwd"})),
        r"lm_head.weight is said to lie in '../../etc/passwd', which leads out of the folder",
    ),
    "index_names_another_file": (
        _index(lambda w: w.update({HEAD: "model-00003-of-00003.safetensors"})),
        r"it holds lm_head.weight, but model.safetensors.index.json says it lies in model-00003",
    ),
    "index_without_a_tensor": (_index(lambda w: w.pop(HEAD)), r"holds lm_head.weight, but .* does not name it"),
    "index_with_a_tensor_too_many": (
        _index(lambda w: w.update({"more": "model-00001-of-00003.safetensors"})),
        r"00001-of-00003.safetensors: more is missing in it",
    ),
    "missing_tensor": (_edit(2, lambda t: t.pop(HEAD)), r"lm_head.weight is missing"),
    "renamed_tensor": (
        _edit(1, lambda t: t.update({"model.norm.scale": t.pop(NORM)})),
        r"model.norm.weight is missing, but model.norm.scale is there",
    ),
    "extra_tensor": (
        _edit(1, lambda t: t.update({"model.layers.8.input_layernorm.weight": torch.zeros(120)})),
        r"00001-of-00003.safetensors: model.layers.8.input_layernorm.weight has no place",
    ),
    "wrong_shape": (
        _edit(1, lambda t: t.update({NORM: torch.zeros(119)})),
        r"model.norm.weight has shape \[119\], but config.json makes it \[120\]",
    ),
    "wrong_dtype": (
        _edit(1, lambda t: t.update({NORM: torch.zeros(120, dtype=torch.float64)})),
        r"model.norm.weight is F64, legal: float32, bfloat16, float16",
    ),
    "quantized": (_config(quantization_config={"bits": 4}), r"config.json: quantization_config is set"),
    "other_model": (_config(model_type="llama"), r"config.json: model_type 'llama', legal: olmo_hybrid, olmo3"),
    "tied": (_config(tie_word_embeddings=True), r"tie_word_embeddings True is not supported, legal: False"),
    "bias": (_config(attention_bias=True), r"attention_bias True is not supported"),
    "yarn": (
        _config(rope_parameters={"rope_theta": 5e5, "rope_type": "yarn", "factor": 8.0}),
        r"rope_type 'yarn'",
    ),
    "rope_unsaid": (_config(rope_parameters=None), r"does not say rope_theta, .* 10000"),
    "config_is_no_json": (lambda f: (f / "config.json").write_text("{"), r"config.json: not JSON"),
    "unfinished": (
        lambda f: (f / "conversion.json").write_text('{"status": "incomplete"}'),
        r"conversion.json: the conversion that wrote this folder did not finish",
    ),
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of three shards with recorded hashes."""
    folder = tmp_path_factory.mktemp("exported")
    tensors = random_hf_tensors(TINY)
    import_model(ImportOptions(write_hf(folder / "hf", tensors), folder / "megatron"))
    size = sum(tensor.nbytes for tensor in tensors.values())
    export(ExportOptions(folder / "megatron", folder / "back", max_shard_bytes=size // 2))
    assert len(list((folder / "back").glob("*.safetensors"))) == 3
    return folder / "back"


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named_and_leaves_nothing(damage: str, exported: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(exported, tmp_path / "model"))
    break_it, message = DAMAGE[damage]
    _swap_last_two_names(model)
    break_it(model)
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(ToolError, match=message) as caught:
        import_model(ImportOptions(model, tmp_path / "megatron"))
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def _swap_last_two_names(model: Path) -> None:
    """lm_head and the final norm into files 2 and 1, where the cases above look for them."""
    tensors = {name: read_tensor(place) for name, place in read_folder(model).items()}
    record = json.loads((model / "conversion.json").read_text())
    for path in model.glob("*.safetensors*"):
        path.unlink()
    names = [name for name in tensors if name not in (HEAD, NORM)]
    files = {1: [*names[::3], NORM], 2: [*names[1::3], HEAD], 3: names[2::3]}
    weight_map = {}
    for number, held in files.items():
        file = f"model-{number:05d}-of-00003.safetensors"
        save_file({name: tensors[name] for name in held}, model / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(held, file)
    write_json(model / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    write_json(model / "conversion.json", record)


def test_links_are_followed_when_asked_for(exported: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    for path in exported.iterdir():
        (tmp_path / "cache" / path.name).symlink_to(path)
    import_model(ImportOptions(tmp_path / "cache", tmp_path / "megatron", follow_symlinks=True))
    assert (tmp_path / "megatron" / "latest_checkpointed_iteration.txt").read_text() == "release"


LIMITED = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
sys.argv = sys.argv[1:]
import runpy
runpy.run_module("megatron_hybrid.tools.convert", run_name="__main__")
"""


@pytest.mark.parametrize("command", ["import", "export"])
def test_a_write_that_fails_leaves_nothing(command: str, exported: Path, tmp_path: Path) -> None:
    """The kernel itself refuses to let a file grow beyond a limit, in the middle of the weights."""
    megatron = exported.parent / "megatron"
    source = ["--model", exported] if command == "import" else ["--checkpoint", megatron]
    arguments = [sys.executable, "-c", LIMITED, "300000", command, *source, "--output", tmp_path / "out"]
    done = subprocess.run(
        [str(argument) for argument in arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (1, ""), done.stderr
    assert "File too large" in done.stderr and done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_an_import_that_was_trained_on_is_not_replaced(exported: Path, tmp_path: Path) -> None:
    options = ImportOptions(exported, tmp_path / "megatron", force=True)
    import_model(options)
    import_model(options)
    (tmp_path / "megatron" / "iter_0000100").mkdir()
    with pytest.raises(ToolError, match=r"a training run has saved iter_0000100 in it since"):
        import_model(options)
    assert (tmp_path / "megatron" / "iter_0000100").is_dir()


def test_an_output_that_is_a_link_is_refused(exported: Path, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(ToolError, match=r"--output .*link: it is a symbolic link"):
        import_model(ImportOptions(exported, tmp_path / "link"))


def test_a_vocabulary_that_was_cut_keeps_its_rows(tmp_path: Path) -> None:
    """OLMo-core's exporter cuts padding rows off; zeros in their place would join the softmax."""
    config = replace(TINY, vocab_size=371)
    tensors = random_hf_tensors(config)
    assert_same(converted(write_hf(tmp_path / "hf", tensors, config), tmp_path), tensors)
    assert "--make-vocab-size-divisible-by 371" in info(InfoOptions(tmp_path / "megatron"))


def test_info_tells_what_a_folder_is(exported: Path, tmp_path: Path) -> None:
    rows = dict(line.split("  ", 1) for line in info(InfoOptions(exported)).splitlines())
    assert rows["kind"].strip() == "Hugging Face"
    assert rows["parameters"].strip() == f"{sum(t.numel() for t in random_hf_tensors(TINY).values()):,} in 133 tensors"
    rows = dict(line.split("  ", 1) for line in info(InfoOptions(exported.parent / "megatron")).splitlines())
    assert rows["kind"].strip() == "Megatron torch_dist"
    assert rows["layers"].strip() == "8: GGG* x 2"
    with pytest.raises(ToolError, match=r"none of .* is in it"):
        info(InfoOptions(tmp_path))


@pytest.mark.parametrize("mixed", [False, True])
def test_safetensors_files_are_those_of_the_package(mixed: bool, tmp_path: Path) -> None:
    tensors = {name: torch.randn(3, count) for count, name in enumerate(("b", "a.x", "é"), start=1)}
    if mixed:
        tensors["a.x"] = tensors["a.x"].bfloat16()
    planned = {name: (str(t.dtype).removeprefix("torch."), tuple(t.shape)) for name, t in tensors.items()}
    writer = SafetensorsWriter(tmp_path / "ours", planned)
    for name, tensor in tensors.items():
        writer.write(name, tensor)
    writer.close()
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_large_tensors_are_stored_in_blocks_over_several_files(tmp_path: Path) -> None:
    tensors = {
        "many": torch.randn(1000, 7),
        "view": torch.randn(9, 4)[2:5],
        "one": torch.randn(1, 300),
        "none": torch.tensor(3.0),
    }
    writer = DcpWriter(tmp_path, chunk_bytes=7000, file_bytes=4000)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.finish()
    write_json(tmp_path / "metadata.json", {"sharded_backend": "torch_dist", "sharded_backend_version": 1})
    reader = TorchDistCheckpoint(tmp_path)
    assert len(reader.stored("many").chunks) == 4
    assert writer.hashes == {path.name: commit.hash_file(path) for path in tmp_path.glob("*.distcp")}
    assert len(writer.hashes) > 2
    assert sum(entry["bytes"] for entry in writer.hashes.values()) < 2 * tensors["many"].nbytes  # a block is a block
    for name, tensor in tensors.items():
        assert torch.equal(reader.read(name), tensor), name
    found = {name: torch.empty_like(tensor) for name, tensor in tensors.items()}
    torch.distributed.checkpoint.load(found, checkpoint_id=tmp_path, no_dist=True)  # torch's own reader
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
