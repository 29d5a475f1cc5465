"""Mixes: exact accounts, refusals that say by how much, and files that Megatron reads as they were meant."""

import json
import math
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megatron_hybrid.tools import mix
from megatron_hybrid.tools.cli import ToolError
from megatron_hybrid.tools.corpus.mixture import (
    Dataset,
    Part,
    SourcePlan,
    Stage,
    apportion,
    instance_blocks,
    plan_mix,
    warnings_of,
)
from megatron_hybrid.tools.indexed_dataset import IndexedDatasetWriter

LENGTH = 100
Command = Callable[..., str]


def dataset(name: str, tokens: int, documents: int = 10, **more: Any) -> Dataset:
    return Dataset(f"/data/{name}", name, tokens, documents, documents, "int32", **more)


def source(name: str, available: int, **more: Any) -> SourcePlan:
    return SourcePlan(name, [Part(name, [dataset(name, available)])], **more)


@pytest.mark.parametrize("seed", range(5))
def test_apportionment_adds_up_and_is_within_one_of_the_share(seed: int) -> None:
    random = np.random.default_rng(seed)
    weights = random.pareto(1, size=20) + 1e-9
    total = int(random.integers(1, 10**9))
    parts = apportion(total, weights.tolist())
    assert sum(parts) == total
    assert all(abs(part - total * weight / weights.sum()) < 1 for part, weight in zip(parts, weights, strict=True))


def test_ratios_share_what_named_tokens_leave() -> None:
    sources = [
        source("web", 10**6, ratio=0.75),
        source("code", 10**6, ratio=0.25),
        source("math", 20_000, tokens=20_000),
    ]
    rows = plan_mix([Stage("main", 420_000, sources)], LENGTH)
    assert [row.tokens for row in rows] == [300_000, 100_000, 20_000]
    assert [row.epochs for row in rows] == [0.3, 0.1, 1.0]
    assert [row.left_over for row in rows] == [700_000, 900_000, 0]


def test_epochs_count_from_the_first_stage_on() -> None:
    stages = [Stage(name, 60_000, [source("web", 100_000, ratio=1.0, max_epochs=1.5)]) for name in "ab"]
    assert [row.epochs_so_far for row in plan_mix(stages, LENGTH)] == [0.6, 1.2]
    stages.append(stages[0])
    with pytest.raises(ToolError, match=r"180,000 tokens asked for, 1\.800 epochs .* allows 150,000: 30,000 too many"):
        plan_mix(stages, LENGTH)


def test_quality_buckets_are_read_by_their_factor() -> None:
    parts = [
        Part(name, [dataset(name, 100_000)], factor) for name, factor in (("high", 4.0), ("mid", 2.0), ("low", 1.0))
    ]
    web = SourcePlan("web", parts, ratio=1.0, max_epochs=4)
    rows = plan_mix([Stage("main", 350_000, [web])], LENGTH)
    assert [row.epochs for row in rows] == [2.0, 1.0, 0.5]
    assert sum(row.tokens for row in rows) == 350_000
    with pytest.raises(ToolError, match=r"source high: 800,000 tokens asked for, 8\.000 epochs"):
        plan_mix([Stage("main", 1_400_000, [web])], LENGTH)


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        (Stage("a", 100, [source("web", 100, ratio=0.5)]), "the ratios add up to 0.500000, not 1"),
        (Stage("a", None, [source("web", 100, ratio=1.0)]), "need a total"),
        (Stage("a", 100, [source("web", 100)]), "either tokens or ratio"),
        (Stage("a", 500, [source("web", 1000, tokens=400)]), "they differ by 100"),
        (Stage("a", 300, [source("w", 900, tokens=400), source("c", 9, ratio=1.0)]), "take 100 more than its 300"),
        (Stage("a", None, [source("web", 0, tokens=100)]), "holds no tokens"),
    ],
)
def test_mix_that_contradicts_itself_is_refused(stage: Stage, message: str) -> None:
    with pytest.raises(ToolError, match=message):
        plan_mix([stage], LENGTH)


@pytest.mark.parametrize(("epochs", "warned"), [(0.99, False), (0.999, True), (1.5, False), (1.997, True)])
def test_second_epoch_by_megatrons_surplus_is_announced(epochs: float, warned: bool) -> None:
    web = source("web", 10**7, tokens=int(10**7 * epochs), max_epochs=2)
    rows = plan_mix([Stage("a", None, [web])], LENGTH)
    found = warnings_of(rows, {"/data/web": web.parts[0].datasets[0]}, LENGTH)
    assert bool(found) == warned
    if warned:
        assert f"index of {math.ceil(epochs) + 1} epochs" in found[0]


def test_limits_of_megatron_are_announced() -> None:
    many = {f"/data/{number}": dataset(str(number), 10**5) for number in range(301)}
    part = Part("web", list(many.values()))
    rows = plan_mix([Stage("a", None, [SourcePlan("web", [part], tokens=10**6)])], LENGTH)
    assert any("301 prefixes" in warning for warning in warnings_of(rows, many, LENGTH))
    big = {"/data/big": dataset("big", 10**5, documents=2**31), "/data/v": dataset("v", 10**5, vocab_size=65_530)}
    text = "\n".join(warnings_of([], big, LENGTH))
    assert "2,147,483,648 documents" in text and "vocabulary of 65,530" in text


# ---- the order of samples ----


@pytest.mark.parametrize("block", [1000, 1 << 22])
def test_every_prefix_of_training_has_the_proportions_of_the_mix(block: int) -> None:
    """10**6 samples: at any point every dataset is within a few samples of its share, and every sample comes once."""
    counts = [600_000, 250_000, 100_000, 49_000, 900, 99, 1, 0]
    numbers, samples = (np.concatenate(parts) for parts in zip(*instance_blocks(counts, block), strict=True))
    assert np.bincount(numbers, minlength=8).tolist() == counts
    position = np.arange(1, numbers.size + 1)
    for number, count in enumerate(counts):
        own = numbers == number
        assert (samples[own] == np.arange(count)).all()
        assert np.abs(np.cumsum(own) - position * (count / numbers.size)).max() <= len(counts) / 2


def test_order_of_samples_is_the_same_in_any_blocks() -> None:
    counts = [5000, 3000, 17, 1]
    whole = [np.concatenate(parts).tolist() for parts in zip(*instance_blocks(counts), strict=True)]
    small = [np.concatenate(parts).tolist() for parts in zip(*instance_blocks(counts, 64), strict=True)]
    assert whole == small


# ---- files ----


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    def run(*words: object) -> str:
        monkeypatch.setattr("sys.argv", ["mix", *map(str, words)])
        mix.main()
        return capsys.readouterr().out

    return run


def build(prefix: Path, documents: int, first_id: int) -> Path:
    """Documents of 50 ids, which tell the dataset."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    with IndexedDatasetWriter(prefix, 100_000) as writer:
        writer.add_documents(np.full(50 * documents, first_id), np.full(documents, 50))
        writer.commit()
    return prefix


@pytest.fixture
def sources(tmp_path: Path) -> dict[str, Path]:
    return {
        name: build(tmp_path / name, size, 10 + at) for at, (name, size) in enumerate((("web", 4000), ("code", 800)))
    }


def write_mix(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content))
    return path


def test_megatron_reads_the_files_and_draws_the_proportions(
    tmp_path: Path, sources: dict[str, Path], command: Command
) -> None:
    import torch
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.training.utils import get_blend_and_blend_per_split

    stage = {"name": "main", "tokens": 200_000, "sources": {"web": {"ratio": 0.9}, "code": {"ratio": 0.1}}}
    path = write_mix(tmp_path / "mix.json", {"stages": [stage]})
    words = ["--mix", path, "--data", *sources.values(), "--sequence-length", LENGTH]
    text = command(*words, "--output-dir", tmp_path / "m")
    assert "90.00%" in text and (tmp_path / "m" / "mix.png").stat().st_size > 1000
    names = ("data_path", "data_args_path", "train_data_path", "valid_data_path", "test_data_path")
    args = SimpleNamespace(**dict.fromkeys(names), per_split_data_args_path=str(tmp_path / "m" / "main.data_args.json"))
    _, per_split = get_blend_and_blend_per_split(args)
    assert per_split[0] == ([str(sources["web"]), str(sources["code"])], [1800.0, 200.0])
    tokenizer = SimpleNamespace(vocab_size=100_000, eod=0, pad=-1, unique_identifiers={"class": "test"})
    config = GPTDatasetConfig(
        random_seed=1, sequence_length=LENGTH, blend_per_split=per_split, tokenizer=tokenizer,
        path_to_cache=str(tmp_path), reset_position_ids=False,
        reset_attention_mask=False, eod_mask_loss=False, create_attention_mask=False,
        sequences_per_dataset=json.loads((tmp_path / "m" / "main.sequences.json").read_text()), mmap_bin_files=True,
    )  # fmt: skip
    train, _, _ = BlendedMegatronDatasetBuilder(GPTDataset, [2000, 0, 0], lambda: True, config).build()
    drawn = [int(torch.as_tensor(train[index]["tokens"])[0]) for index in range(1000)]
    for end in (100, 500, 1000):
        assert abs(drawn[:end].count(10) - 0.9 * end) <= 1
    instances = np.load(tmp_path / "m" / "main.instances.npy")
    assert Counter(instances["dataset"].tolist()) == {0: 1800, 1: 200}


def test_manifests_of_preprocess_are_read(tmp_path: Path, tokenizer_json: Path, command: Command) -> None:
    from megatron_hybrid.tools import preprocess

    for name, count in (("web", 300), ("code", 100)):
        lines = [json.dumps({"text": f"{name} document {number} of words"}) for number in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    words = [
        "--input",
        str(tmp_path / "web.jsonl"),
        str(tmp_path / "code.jsonl"),
        "--output-dir",
        str(tmp_path / "out"),
    ]
    made = preprocess.run(preprocess.parser().parse_args([*words, "--tokenizer-model", str(tokenizer_json)]))
    tokens = {entry["source"]: entry["tokens"] for entry in made["datasets"]}
    stage = {"name": "a", "sources": {name: {"tokens": count, "max_epochs": 2} for name, count in tokens.items()}}
    path = write_mix(tmp_path / "mix.yaml", {"stages": [stage]})
    text = command("--mix", path, "--data", tmp_path / "out", "--sequence-length", 1)
    for count in tokens.values():
        assert f"{count:>22,}" in text
    assert "Megatron builds an index of 2 epochs" in text


def test_ai2_label_and_path_list_is_read_once_each(tmp_path: Path, command: Command) -> None:
    build(tmp_path / "dclm" / "part-00", 10, 1)
    build(tmp_path / "dclm" / "part-01", 20, 1)
    build(tmp_path / "code" / "part-00", 30, 1)
    path = tmp_path / "mix.txt"
    path.write_text("# a comment\ndclm,dclm/part-00.npy\ndclm,dclm/part-01.npy\n\ncode,code/part-00.npy\n")
    text = command("--mix", path, "--root", tmp_path, "--sequence-length", 10, "--output-dir", tmp_path / "m")
    rows = {line.split()[1]: line.split() for line in text.splitlines() if line.startswith("train ")}
    assert rows["dclm"][2:6] == ["1,500", "50.00%", "1,500", "1.000"]
    words = json.loads((tmp_path / "m" / "train.data_args.json").read_text())["train"]
    assert words[::2] == ["50", "100", "150"]
    assert words[1::2] == [str(tmp_path / name) for name in ("dclm/part-00", "dclm/part-01", "code/part-00")]
    path.write_text("dclm dclm/part-00.npy\n")
    with pytest.raises(ToolError, match=r"line 1 is 'dclm dclm/part-00\.npy', not label,path"):
        command("--mix", path, "--root", tmp_path, "--sequence-length", 10)


def test_ai2_ratio_file_is_read(tmp_path: Path, sources: dict[str, Path], command: Command) -> None:
    entries = [
        {"source_name": "web", "target_ratio": 0.5, "paths": [f"{sources['web']}.npy"]},
        {"source_name": "code", "target_ratio": 0.5, "paths": [str(sources["code"])], "max_repetition_ratio": 2.0},
    ]
    path = write_mix(tmp_path / "mix.yaml", {"sources": entries})
    text = command("--mix", path, "--tokens", 120_000, "--sequence-length", LENGTH)
    assert [line.split()[5] for line in text.splitlines() if line.startswith("train ")] == ["0.300", "1.500"]
    with pytest.raises(ToolError, match=r"source code: 100,000 tokens asked for, 2\.500 epochs"):
        command("--mix", path, "--tokens", 200_000, "--sequence-length", LENGTH)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "needs a list `stages`"),
        ({"stages": [{}]}, "stage 0 needs `sources`"),
        ({"stages": [{"sources": {"nope": {"tokens": 5}}}]}, "no data of the name 'nope'; --data holds code, web"),
        ({"stages": [{"sources": {"web": {"token": 5}}}]}, "must be an object with the keys buckets, max_epochs"),
        ({"stages": [{"sources": {"web": {"tokens": "many"}}}]}, "'many' must be a number from 0 on"),
    ],
)
def test_fault_in_the_mix_file_is_named(
    tmp_path: Path, sources: dict[str, Path], command: Command, content: Any, message: str
) -> None:
    path = write_mix(tmp_path / "mix.json", content)
    with pytest.raises(ToolError, match=message):
        command("--mix", path, "--data", *sources.values(), "--sequence-length", LENGTH)


def test_rows_and_blocks_are_in_step() -> None:
    blocks = [numbers.size for numbers, _ in instance_blocks([10_000, 500], 1000)]
    assert sum(blocks) == 10_500 and all(abs(one - other) <= 1000 for one, other in pairwise(blocks))
