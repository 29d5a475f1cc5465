"""Export to Hugging Face: every tensor bit-equal after transformers has loaded it, and no half-made folder, ever."""

import json
import os
import resource
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from megatron_hybrid.tools.cli import ToolError
from megatron_hybrid.tools.compare_logits import compare_logits
from megatron_hybrid.tools.convert import ExportOptions, export, output_folder, to_huggingface
from megatron_hybrid.tools.convert.hf_config import hf_config
from megatron_hybrid.tools.convert.output_folder import parse_size
from megatron_hybrid.tools.convert.to_megatron import ImportOptions, import_model
from megatron_hybrid.tools.direct_io import DirectWriter
from megatron_hybrid.tools.generate import Sampling, generate, load_tokenizer
from megatron_hybrid.tools.hf_logits import hf_logits, load_model
from tests.tools.tiny_model import (
    ROOT,
    TINY,
    Job,
    directly_filled_model,
    megatron_tensors,
    random_hf_tensors,
    sidecar,
    train_sentencepiece,
    write_checkpoints,
)

FP32_ISLANDS = ("A_log", "dt_bias")
TOKENS = torch.randint(0, 371, (2, 70), generator=torch.Generator().manual_seed(1))  # longer than one chunk of 64


def model_tensors(mixed: bool) -> dict[str, torch.Tensor]:
    """Hugging Face tensors of the tiny model; `mixed`: bf16 but for A_log and dt_bias, as a bf16 run stores them."""
    tensors = {name: tensor * 0.1 for name, tensor in random_hf_tensors(TINY).items()}
    if mixed:
        tensors = {n: t if n.endswith(FP32_ISLANDS) else t.bfloat16() for n, t in tensors.items()}
    return tensors


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Save folders by number of tensor-parallel ranks that wrote them: 1 in fp32, 2 in mixed precision."""
    folder = tmp_path_factory.mktemp("checkpoints")
    jobs = []
    for ranks in (1, 2):
        tensors = megatron_tensors(TINY, model_tensors(mixed=ranks == 2))
        tensors["optimizer.state.exp_avg.output_layer.weight"] = torch.zeros(4)
        jobs.append(Job(tensors, ranks, folder / str(ranks) / "iter_0000007"))
    write_checkpoints(jobs, folder)
    for ranks in (1, 2):
        (folder / str(ranks) / "latest_checkpointed_iteration.txt").write_text("7")
        (folder / str(ranks) / "megatron_hybrid.json").write_text(json.dumps(sidecar()))
    return {ranks: folder / str(ranks) for ranks in (1, 2)}


@pytest.fixture
def save_folder(checkpoints: dict[int, Path], tmp_path: Path) -> Path:
    """A copy of the fp32 save folder that a test may change."""
    return Path(shutil.copytree(checkpoints[1], tmp_path / "save"))


def describe(folder: Path, **changes: Any) -> None:
    """Writes the sidecar again with changes."""
    (folder / "megatron_hybrid.json").write_text(json.dumps(sidecar(**changes)))


def read_all(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of an exported folder."""
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("ranks", [1, 2], ids=["fp32_from_1_rank", "bf16_with_fp32_islands_from_2_ranks"])
def test_exported_model_is_the_stored_one(checkpoints: dict[int, Path], tmp_path: Path, ranks: int) -> None:
    summary = export(ExportOptions(checkpoints[ranks], tmp_path / "hf"))
    expected = model_tensors(mixed=ranks == 2)
    assert f"{len(expected)} tensors, {sum(t.numel() for t in expected.values()):,} parameters" in summary
    written = read_all(tmp_path / "hf")
    assert set(written) == set(expected)
    for name, tensor in expected.items():
        assert written[name].dtype == tensor.dtype, name
        assert torch.equal(written[name], tensor), name
    loaded = load_model(tmp_path / "hf")  # refuses missing, unexpected and mismatched keys
    reference = directly_filled_model(TINY, expected)
    mine, theirs = dict(loaded.named_parameters()), dict(reference.named_parameters())
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    difference = compare_logits(hf_logits(reference, TOKENS), hf_logits(loaded, TOKENS))
    assert difference.max_abs == 0.0
    assert difference.argmax_agreement == 1.0


def test_conversion_record_has_the_source_and_every_hash(checkpoints: dict[int, Path], tmp_path: Path) -> None:
    import hashlib

    export(ExportOptions(checkpoints[2], tmp_path / "hf"))
    record = json.loads((tmp_path / "hf" / "conversion.json").read_text())
    assert record["status"] == "complete"
    assert (record["iteration"], record["source"]) == (7, str(checkpoints[2] / "iter_0000007"))
    assert record["versions"]["torch"] == torch.__version__.split("+")[0]
    written = read_all(tmp_path / "hf")
    assert record["tensors"].keys() == written.keys()
    for name, tensor in written.items():
        content = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        assert record["tensors"][name]["sha256"] == hashlib.sha256(content).hexdigest(), name


def test_shards_are_indexed_from_what_is_on_disk(checkpoints: dict[int, Path], tmp_path: Path) -> None:
    export(ExportOptions(checkpoints[1], tmp_path / "hf", max_shard_bytes=parse_size("300KB")))
    files = sorted((tmp_path / "hf").glob("model-*.safetensors"))
    assert len(files) > 2
    assert [path.name for path in files] == [
        f"model-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)
    ]
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    on_disk: dict[str, str] = {}
    for path in files:
        with safe_open(path, framework="pt") as handle:
            names = list(handle.keys())
        on_disk |= dict.fromkeys(names, path.name)
        assert len(names) == 1 or sum(t.nbytes for t in load_file(path).values()) <= 300_000
    assert index["weight_map"] == on_disk
    expected = model_tensors(mixed=False)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in expected.values())
    load_model(tmp_path / "hf")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in read_all(tmp_path / "hf").items())


@pytest.mark.parametrize("as_released", [False, True], ids=["dtype", "match_release"])
def test_a_cast_spares_the_decay_unless_the_release_is_matched(
    checkpoints: dict[int, Path], tmp_path: Path, as_released: bool
) -> None:
    flags = {"match_release": True} if as_released else {"dtype": "bfloat16"}
    export(ExportOptions(checkpoints[1], tmp_path / "hf", **flags))
    expected = model_tensors(mixed=False)
    for name, tensor in read_all(tmp_path / "hf").items():
        if as_released or not name.endswith(FP32_ISLANDS):
            expected[name] = expected[name].bfloat16()
        assert torch.equal(tensor, expected[name]) and tensor.dtype == expected[name].dtype, name
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("rope_theta", [None, 500000.0], ids=["nope", "rope_500000"])
def test_position_embedding_reaches_transformers(save_folder: Path, tmp_path: Path, rope_theta: float | None) -> None:
    describe(save_folder, rope_theta=rope_theta)
    export(ExportOptions(save_folder, tmp_path / "hf"))
    loaded = load_model(tmp_path / "hf")
    if rope_theta is None:
        assert json.loads((tmp_path / "hf" / "config.json").read_text())["rope_parameters"] == {"rope_theta": None}
        assert loaded.model.rotary_emb is None
        assert loaded.config.rope_parameters["rope_theta"] is None
    else:
        expected = 1 / rope_theta ** (torch.arange(0, TINY.head_dim, 2) / TINY.head_dim)
        torch.testing.assert_close(loaded.model.rotary_emb.inv_freq, expected, rtol=1e-6, atol=0)
    swapped = replace(TINY, rope_theta=500000.0 if rope_theta is None else None)
    other = directly_filled_model(swapped, model_tensors(mixed=False))
    assert compare_logits(hf_logits(other, TOKENS), hf_logits(loaded, TOKENS)).max_abs > 1e-3


def test_config_carries_every_dimension(checkpoints: dict[int, Path], tmp_path: Path) -> None:
    from transformers import AutoConfig

    export(ExportOptions(checkpoints[1], tmp_path / "hf"))
    config = AutoConfig.from_pretrained(str(tmp_path / "hf"))
    names = set(sidecar()) & set(config.to_dict())
    assert {"hidden_size", "linear_key_head_dim", "linear_allow_neg_eigval", "rms_norm_eps", "vocab_size"} <= names
    assert {name: getattr(config, name) for name in names} == {name: sidecar()[name] for name in names}
    assert config.layer_types == TINY.layer_types
    assert config.tie_word_embeddings is False


def test_a_head_dim_of_its_own_reaches_transformers() -> None:
    assert "head_dim" not in hf_config(TINY, "float32")
    assert hf_config(replace(TINY, head_dim=32), "float32")["head_dim"] == 32


def test_released_configuration_of_transformers_is_ours() -> None:
    from transformers import OlmoHybridConfig

    from megatron_hybrid.tools.hf_mapping import OLMO_HYBRID_7B

    released = OlmoHybridConfig(rope_parameters={"rope_theta": None}).to_dict()
    ours = OlmoHybridConfig(**hf_config(OLMO_HYBRID_7B, "bfloat16")).to_dict()
    differing = {name for name in released | ours if released.get(name) != ours.get(name)}
    assert differing <= {"architectures", "dtype", "transformers_version"}


def test_exporting_again_is_refused_without_force_and_gives_the_same_bytes(
    checkpoints: dict[int, Path], tmp_path: Path
) -> None:
    options = ExportOptions(checkpoints[1], tmp_path / "hf")
    export(options)
    before = {path.name: path.read_bytes() for path in (tmp_path / "hf").iterdir()}
    with pytest.raises(ToolError, match=r"--output .*hf: it is not empty; give another folder, or --force"):
        export(options)
    (tmp_path / "hf" / "stale.safetensors").write_bytes(b"of an earlier export")
    export(replace(options, force=True))
    assert {path.name: path.read_bytes() for path in (tmp_path / "hf").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    assert len({path.stat().st_mode for path in (tmp_path / "hf").iterdir()}) == 1  # safetensors alone would make 0600


def test_force_does_not_remove_what_is_no_export(checkpoints: dict[int, Path], tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years of work")
    for output in ("home", "hf"):
        (tmp_path / "hf.tmp").mkdir(exist_ok=True)
        (tmp_path / "hf.tmp" / "mine").write_text("")
        with pytest.raises(ToolError, match=r"remove it yourself|is in the way"):
            export(ExportOptions(checkpoints[1], tmp_path / output, force=True))
    assert (tmp_path / "home" / "thesis.tex").read_text() == "years of work"
    assert (tmp_path / "hf.tmp" / "mine").exists()


def test_a_source_is_never_replaced_or_written_into(checkpoints: dict[int, Path], tmp_path: Path) -> None:
    """An export of an import holds conversion.json, which lets --force replace it: not while it is what is read."""
    shutil.copytree(checkpoints[1], tmp_path / "ck")
    (tmp_path / "ck" / "conversion.json").write_text("{}")
    hf = tmp_path / "hf"
    export(ExportOptions(tmp_path / "ck", hf))
    (tmp_path / "link").symlink_to(hf)
    files = sorted(tmp_path.rglob("*"))
    for convert, source, output in (
        (lambda a, b: export(ExportOptions(a, b, force=True)), tmp_path / "ck", tmp_path / "ck"),
        (lambda a, b: export(ExportOptions(a, b, force=True)), tmp_path / "ck", tmp_path / "ck" / "hf"),
        (lambda a, b: import_model(ImportOptions(a, b, force=True)), hf, hf),
        (lambda a, b: import_model(ImportOptions(a, b, force=True, follow_symlinks=True)), tmp_path / "link", hf),
    ):
        with pytest.raises(ToolError, match=r"--output .*(a source is in it|it lies in a source)"):
            convert(source, output)
    assert sorted(tmp_path.rglob("*")) == files


def test_what_a_killed_export_left_is_replaced(checkpoints: dict[int, Path], tmp_path: Path) -> None:
    for suffix in (".tmp", ".replaced"):
        (tmp_path / f"hf{suffix}").mkdir()
        (tmp_path / f"hf{suffix}" / "conversion.json").write_text('{"status": "incomplete"}')
    export(ExportOptions(checkpoints[1], tmp_path / "hf"))
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    load_model(tmp_path / "hf")


@pytest.mark.parametrize("fails_at", ["finish", "check_written", "hf_config", "conversion_record"])
def test_a_failure_leaves_nothing_and_keeps_the_earlier_export(
    checkpoints: dict[int, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_at: str
) -> None:
    def fail(*arguments: object) -> None:
        raise OSError("No space left on device")

    earlier = tmp_path / "earlier"
    export(ExportOptions(checkpoints[1], earlier))
    # `finish` fails in a thread, on the way to the disk.
    monkeypatch.setattr(DirectWriter if fails_at == "finish" else to_huggingface, fails_at, fail)
    for output in (tmp_path / "hf", earlier):
        with pytest.raises(OSError, match="No space left"):
            export(ExportOptions(checkpoints[1], output, force=True))
    assert [path.name for path in tmp_path.iterdir()] == ["earlier"]
    monkeypatch.undo()
    load_model(earlier)


def test_an_earlier_export_stays_when_the_new_one_cannot_be_named(
    checkpoints: dict[int, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.rename

    def fail_for_the_new_one(path: Path, target: Path) -> Path:
        if path.name == "hf.tmp":
            raise OSError("Stale file handle")
        return rename(path, target)

    options = ExportOptions(checkpoints[1], tmp_path / "hf", force=True)
    export(options)
    before = os.stat(tmp_path / "hf").st_ino
    monkeypatch.setattr(Path, "rename", fail_for_the_new_one)
    with pytest.raises(OSError, match="Stale file handle"):
        export(options)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    assert os.stat(tmp_path / "hf").st_ino == before


def test_a_full_disk_is_found_before_anything_is_written(
    checkpoints: dict[int, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(ToolError, match=r"--output .*GB are needed"):
        export(ExportOptions(checkpoints[1], tmp_path / "hf"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("output", "said"), [("/dev/null/x", "/dev/null is a file"), ("/proc/hf/x", "No such file .* at /proc/hf")]
)
def test_an_output_that_cannot_be_made_is_named(checkpoints: dict[int, Path], output: str, said: str) -> None:
    with pytest.raises(ToolError, match=f"^--output {output}: {said}.*; give a folder"):
        export(ExportOptions(checkpoints[1], Path(output)))


@pytest.mark.parametrize("most_bytes", [10, 5000])
def test_a_disk_that_fills_up_is_named(checkpoints: dict[int, Path], tmp_path: Path, most_bytes: int) -> None:
    """As far as a limit on a file's size is one: in the small files, and in the weights."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, limits[1]))
    try:
        with pytest.raises(ToolError, match=r"hf.*File too large"):
            export(ExportOptions(checkpoints[1], tmp_path / "hf"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


def test_faults_of_the_checkpoint_are_found_before_anything_is_written(
    save_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    iteration, output = save_folder / "iter_0000007", tmp_path / "hf"
    monkeypatch.delattr(output_folder, "make_working_folder")

    def refused(message: str) -> None:
        with pytest.raises(ToolError, match=message) as caught:
            export(ExportOptions(save_folder, output))
        assert "\n" not in str(caught.value)
        assert not output.exists()

    describe(save_folder, hybrid_layer_pattern="GGG*GGG*G")
    refused(r"\.metadata: no tensor decoder\.layers\.8\.input_layernorm\.weight")
    describe(save_folder, hybrid_layer_pattern="GGG*GGG")
    refused(r"model tensors have no place in the Hugging Face model, the first is decoder\.layers\.7\.")
    describe(save_folder, intermediate_size=89)
    refused(r"mlp\.linear_fc1\.weight: stored shape \[176, 120\], but the configuration makes it \[178, 120\]")
    describe(save_folder, vocab_size=640)
    refused(r"embedding\.word_embeddings\.weight: 512 stored rows are fewer than vocab_size 640")
    describe(save_folder, norm_placement="pre")
    refused(r"megatron_hybrid\.json: norm_placement 'pre' cannot be expressed")
    (save_folder / "megatron_hybrid.json").write_text("{")
    refused(r"megatron_hybrid\.json: not JSON")
    (save_folder / "megatron_hybrid.json").unlink()
    refused(r"no megatron_hybrid\.json in it or in the folder above")
    describe(iteration)  # inside the iteration's folder is as good
    path = iteration / "__0_0.distcp"
    path.write_bytes(path.read_bytes()[:-300])
    refused(r"__0_0\.distcp: tensor \S+, chunk at .*truncated")


def test_damage_is_found_in_rows_that_are_not_exported(save_folder: Path, tmp_path: Path) -> None:
    """Padding rows of the vocabulary are zeros after the last true row; they are a part of what the checksum covers."""
    path = save_folder / "iter_0000007" / "__0_0.distcp"
    content = bytearray(path.read_bytes())
    last_row = model_tensors(mixed=False)["lm_head.weight"][-1].numpy().tobytes()
    content[content.index(last_row) + len(last_row) + 5000] ^= 1
    path.write_bytes(content)
    with pytest.raises(ToolError, match=r"tensor output_layer.weight, .*: checksum of archive/data/0 does not match"):
        export(ExportOptions(save_folder, tmp_path / "hf"))
    assert [folder.name for folder in tmp_path.iterdir()] == ["save"]


def test_an_iteration_folder_can_be_given_itself(checkpoints: dict[int, Path], tmp_path: Path) -> None:
    export(ExportOptions(checkpoints[1] / "iter_0000007", tmp_path / "hf"))
    load_model(tmp_path / "hf")


def test_a_wrong_tensor_name_is_refused_on_loading(checkpoints: dict[int, Path], tmp_path: Path) -> None:
    export(ExportOptions(checkpoints[1], tmp_path / "hf"))
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    name = "model.layers.0.linear_attn.o_norm.weight"
    tensors[name.replace("o_norm", "norm")] = tensors.pop(name)
    save_file(tensors, tmp_path / "hf" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ToolError, match=r"--model .*hf: 1 tensors under (missing|unexpected)_keys"):
        load_model(tmp_path / "hf")


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose pieces are the tiny model's vocabulary."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_sentencepiece(path)
    return path


def test_a_tokenizer_is_written_with_the_model_or_stops_the_export(
    checkpoints: dict[int, Path],
    sentencepiece_model: Path,
    save_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    summary = export(ExportOptions(checkpoints[1], tmp_path / "hf", tokenizer_model=sentencepiece_model))
    assert "AutoTokenizer gives the ids of SentencePiece" in summary
    assert (tmp_path / "hf" / "tokenizer.json").is_file()
    monkeypatch.delattr(to_huggingface, "write_shards")  # what is wrong shows before the first weight is read
    with pytest.raises(ToolError, match=r"--tokenizer-model .*absent"):
        export(ExportOptions(save_folder, tmp_path / "other", tokenizer_model=tmp_path / "absent"))
    describe(save_folder, true_vocab_size=372)
    with pytest.raises(ToolError, match=r"--tokenizer-model .* has 371 pieces, but .* true_vocab_size 372"):
        export(ExportOptions(save_folder, tmp_path / "other", tokenizer_model=sentencepiece_model))
    assert not (tmp_path / "other").exists()


def test_generation_continues_the_prompt_and_repeats_with_its_seed(
    checkpoints: dict[int, Path], sentencepiece_model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "hf"
    export(ExportOptions(checkpoints[1], folder, tokenizer_model=sentencepiece_model))
    sampling = Sampling(max_new_tokens=6, temperature=1.0, top_k=50, seed=3)
    first, second = generate(folder, ["def push(", "class"], sampling)
    assert generate(folder, ["class", "def push("], sampling) == [second, first]
    assert generate(folder, ["class"], replace(sampling, seed=4)) != [second]
    tokenizer, model = load_tokenizer(folder), load_model(folder)
    prompt = tokenizer.encode("class")
    tokens = list(prompt)
    for _ in range(6):  # greedy by full forward passes, without transformers' generate() and its cache
        tokens.append(int(hf_logits(model, torch.tensor([tokens]))[0, -1].argmax()))
    expected = tokenizer.decode(tokens[len(prompt) :], skip_special_tokens=True)
    assert generate(folder, ["class"], Sampling(max_new_tokens=6)) == [expected]
    with pytest.raises(ToolError, match="--top-k 5: has no effect at --temperature 0"):
        Sampling(top_k=5)


def test_logit_differences_are_counted() -> None:
    reference = torch.tensor([[[0.0, 1.0, 2.0], [3.0, 1.0, 0.0]]])
    candidate = reference.clone()
    candidate[0, 1] = torch.tensor([3.0, 3.5, 0.0])
    difference = compare_logits(reference, candidate)
    assert (difference.max_abs, difference.argmax_agreement, difference.positions) == (2.5, 0.5, 2)
    assert difference.mean_abs == pytest.approx(2.5 / 6)
    assert difference.within(2.5)
    assert not difference.within(2.4)
    padded = torch.cat([reference, torch.full((1, 2, 2), 99.0)], dim=-1)
    assert compare_logits(padded, reference, vocab_size=3).max_abs == 0
    with pytest.raises(ToolError, match=r"shapes differ: .*--vocab-size"):
        compare_logits(padded, reference)
    candidate[0, 0, 0] = float("nan")
    assert not compare_logits(reference, candidate).within(1e9)


def run_tool(folder: Path, name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Runs a tool as its user does; importing Megatron fails in it."""
    blocked = folder / "blocked" / "megatron"
    blocked.mkdir(parents=True, exist_ok=True)
    (blocked / "__init__.py").write_text("raise AssertionError('a tool imports Megatron')")
    path = f"{blocked.parent}{os.pathsep}{ROOT}"
    return subprocess.run(
        [sys.executable, "-m", f"megatron_hybrid.tools.{name}", *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": path, "TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_command_lines_work_together(checkpoints: dict[int, Path], tmp_path: Path) -> None:
    flags: tuple[object, ...] = ("--checkpoint", checkpoints[2], "--output", tmp_path / "hf", "--max-shard-size", "1MB")
    done = run_tool(tmp_path, "convert", "export", *flags)
    assert done.returncode == 0, done.stderr
    assert "peak host memory" in done.stdout
    done = run_tool(tmp_path, "convert", "export", *flags)
    assert done.returncode == 1
    assert done.stderr.startswith("error: --output")
    assert done.stderr.count("\n") == 1
    save_file({"tokens": TOKENS}, tmp_path / "tokens.safetensors")
    flags = ("--model", tmp_path / "hf", "--tokens", tmp_path / "tokens.safetensors")
    done = run_tool(tmp_path, "hf_logits", *flags, "--output", tmp_path / "logits.safetensors")
    assert done.returncode == 0, done.stderr
    logits = load_file(tmp_path / "logits.safetensors")["logits"]
    assert (logits.dtype, tuple(logits.shape)) == (torch.float32, (2, 70, 384))
    reference = hf_logits(directly_filled_model(TINY, model_tensors(mixed=True)), TOKENS)
    save_file({"logits": reference}, tmp_path / "reference.safetensors")
    flags = ("--reference", tmp_path / "reference.safetensors", "--candidate", tmp_path / "logits.safetensors")
    done = run_tool(tmp_path, "compare_logits", *flags, "--tolerance", "1e-5")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "argmax agreement          100.00%" in done.stdout
    wrong = reference.clone()
    wrong[1, 3, 5] += 1
    save_file({"logits": wrong}, tmp_path / "reference.safetensors")
    done = run_tool(tmp_path, "compare_logits", *flags, "--tolerance", "1e-5")
    assert done.returncode == 1
    assert "is above --tolerance 1e-05" in done.stderr


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("2 MiB", 2**21), ("1000", 1000), ("3kb", 3000)])
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_size(text) == size
    for wrong in ("0GB", "GB", "-1", "1.5GB", "1TBB"):
        with pytest.raises(Exception, match="is no size"):
            parse_size(wrong)
