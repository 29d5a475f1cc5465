"""Which tokens a sample is: the order rule, cutting, packing, the repetition filter, mixtures, and refusals."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_hybrid.data import mixture
from megatron_hybrid.data.instance_dataset import InstanceDataset, Plan, open_plan
from megatron_hybrid.data.instances import Cutter, ListedInstances
from megatron_hybrid.data.order import SampleOrder
from megatron_hybrid.data.packing import build_index, pack_best_fit
from megatron_hybrid.data.repetition import repeats_itself
from megatron_hybrid.data.sources import INDEX_DTYPE, Places, check_samples
from megatron_hybrid.data.token_files import DataError, open_raw
from megatron_hybrid.tools import mix
from megatron_hybrid.tools.cli import ToolError
from megatron_hybrid.tools.indexed_dataset import IndexedDatasetWriter

VOCAB, EOD, PAD, LENGTH = 70_000, 69_999, 69_998, 16


def plan(data: Path | str, **more: Any) -> Plan:
    places = Places(Path(more.pop("root", "")), "tok", more.pop("dtype", "uint32"), more.pop("mask", ""))
    settings: dict[str, Any] = {
        "data": str(data),
        "places": places,
        "sequence_length": LENGTH,
        "batch": 1,
        "vocab_size": VOCAB,
        "eod": EOD,
        "pad": PAD,
        "seed": 34521,
        "epochs": 1,
        "shuffle": False,
        "packing": "fixed",
        "group_files": 1,
        "file_seed": -1,
        "mixture_tokens": 0,
        "cache": None,
    }
    return Plan(**{**settings, **more})


def documents(seed: int, count: int = 30, longest: int = 40) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    lengths = generator.integers(1, longest, size=count)
    return [np.append(generator.integers(0, 69_000, size=n), EOD) for n in lengths]


def raw(path: Path, ids: Any, dtype: str = "<u4") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.concatenate(ids).astype(dtype).tofile(path)
    return path


def dataset(prefix: Path, docs: list[np.ndarray]) -> Path:
    with IndexedDatasetWriter(prefix, VOCAB) as writer:
        for one in docs:
            writer.add_document(one)
        writer.commit()
    return prefix


def test_order_is_olmo_cores_bit_for_bit() -> None:
    """arange of uint32 shuffled by PCG64(seed + epoch), epochs from 1, the tail that fills no batch dropped."""
    order = SampleOrder(instances=103, batch=8, seed=34521, epochs=2)
    assert (order.per_epoch, len(order)) == (96, 192)
    for epoch in (1, 2):
        expected = np.arange(103, dtype=np.uint32)
        np.random.Generator(np.random.PCG64(seed=34521 + epoch)).shuffle(expected)
        assert order.ids((epoch - 1) * 96, 96).tolist() == expected[:96].tolist()
    assert order.ids_of_batch(12).tolist() == order.ids(96, 8).tolist()
    # Of numpy 2.3.5, written down: a later numpy that shuffles otherwise must not go unnoticed.
    assert SampleOrder(10, 1, 34521).ids(0, 10).tolist() == [5, 9, 8, 4, 0, 6, 1, 2, 7, 3]
    with pytest.raises(DataError, match="allow more --instance-epochs"):
        order.ids(190, 3)


def test_order_from_a_cache_is_the_same_and_is_checked(tmp_path: Path) -> None:
    plain, cached = SampleOrder(1000, 10, 3, 2), SampleOrder(1000, 10, 3, 2, cache=tmp_path)
    assert cached.ids(0, 2000).tolist() == plain.ids(0, 2000).tolist()
    (tmp_path / "order-1000-seed4-epoch1.u4").write_bytes(b"1234")
    with pytest.raises(DataError, match=r"4 bytes where 1000 instances take 4000; remove it"):
        SampleOrder(1000, 10, 4, cache=tmp_path).ids(0, 1)


def test_files_are_cut_one_by_one_and_raw_and_indexed_are_the_same(tmp_path: Path) -> None:
    both = [documents(1), documents(2)]
    for name, docs in zip("ab", both, strict=True):
        raw(tmp_path / f"raw/{name}.npy", docs)
        dataset(tmp_path / f"indexed/{name}", docs)
    (tmp_path / "list.txt").write_text("# two\nx,{TOKENIZER}/a.npy\n\ny,{TOKENIZER}/b.npy\n")
    (tmp_path / "raw/tok").symlink_to(tmp_path / "raw")
    (tmp_path / "indexed/tok").symlink_to(tmp_path / "indexed")
    expected = [
        row
        for docs in both
        for row in np.concatenate(docs)[: sum(map(len, docs)) // LENGTH * LENGTH].reshape(-1, LENGTH)
    ]
    for root in ("raw", "indexed"):
        instances, _ = open_plan(plan(tmp_path / "list.txt", root=tmp_path / root))
        assert len(instances) == len(expected)
        for number, row in enumerate(expected):
            found = instances.read(number, documents=True)
            assert found.tokens.tolist() == row.tolist()
            ends = np.flatnonzero(row == EOD) + 1
            bounds = np.unique([0, *ends, LENGTH])
            assert found.lengths is not None and found.lengths.tolist() == np.diff(bounds).tolist()
        assert str(tmp_path) in instances.where(0)


def test_targets_masks_and_positions_of_a_row(tmp_path: Path) -> None:
    ids = np.arange(LENGTH)
    ids[4] = EOD
    raw(tmp_path / "token_ids.npy", [ids])
    labels = np.ones(LENGTH, dtype=np.bool_)
    labels[7] = False
    labels.tofile(tmp_path / "labels_mask.npy")
    instances, order = open_plan(plan(tmp_path / "token_ids.npy", mask="token_ids:labels_mask"))
    row = InstanceDataset(instances, order, repetition_filter=True, document_masking=True)[0]
    assert row["labels"][:-1].tolist() == ids[1:].tolist()
    assert row["loss_mask"].tolist() == [1] * 6 + [0] + [1] * 8 + [0]
    assert row["counted_mask"].tolist() == row["loss_mask"].tolist()
    assert row["position_ids"].tolist() == [*range(5), *range(LENGTH - 5)]


def test_rejected_rows_have_no_loss_and_all_of_the_count(tmp_path: Path) -> None:
    raw(tmp_path / "a.npy", [np.full(64, 5), np.arange(64)])
    instances, order = open_plan(plan(tmp_path / "a.npy", sequence_length=64))
    dataset_ = InstanceDataset(instances, order, repetition_filter=True, document_masking=False)
    assert (dataset_[0]["loss_mask"].sum(), dataset_[0]["counted_mask"].sum()) == (0, 64)
    assert (dataset_[1]["loss_mask"].sum(), dataset_[1]["counted_mask"].sum()) == (63, 63)


@pytest.mark.parametrize("period", [1, 2, 5, 13, 14])
@pytest.mark.parametrize("times", [31, 32])
def test_repetition_is_found_where_a_plain_count_finds_it(period: int, times: int) -> None:
    generator = np.random.default_rng(period)
    ids = generator.permutation(2000)
    pattern = 5000 + np.arange(period)
    ids[77 : 77 + period * times] = np.tile(pattern, times)
    assert repeats_itself(ids) == (_repeats(ids.tolist()) >= 32) == (times == 32 and period <= 13)


def _repeats(ids: list[int]) -> int:
    best = 1
    for p in range(1, 14):
        for start in range(len(ids)):
            count = 1
            while ids[start + count * p : start + count * p + p] == ids[start : start + p] and ids[start : start + p]:
                if len(ids[start + count * p : start + count * p + p]) < p:
                    break
                count += 1
            best = max(best, count)
    return best


def test_packing_is_best_fit_decreasing() -> None:
    """Against the plain form: try every open instance for each document."""
    lengths = np.random.default_rng(0).integers(1, 33, size=500)
    order, bounds = pack_best_fit(lengths, 32)
    spaces: list[int] = []
    opened: list[list[int]] = []
    queue: list[int] = []  # instances in the order their present space came about
    for document in sorted(range(500), key=lambda i: -lengths[i]):
        fitting = [i for i in queue if spaces[i] >= lengths[document]]
        if fitting:
            best = min(fitting, key=lambda i: spaces[i])  # min keeps the first of equals
            queue.remove(best)
        else:
            best = len(opened)
            opened.append([])
            spaces.append(32)
        opened[best].append(document)
        spaces[best] -= int(lengths[document])
        if spaces[best]:
            queue.append(best)
    assert [order[a:b].tolist() for a, b in itertools.pairwise(bounds)] == opened


@pytest.mark.parametrize("cached", [False, True])
def test_packed_instances_hold_every_document_once(cached: bool, tmp_path: Path) -> None:
    docs = [documents(seed) for seed in range(3)]
    for number, own in enumerate(docs):
        raw(tmp_path / f"d/{number}.npy", own)
        np.concatenate([np.arange(one.size) > 0 for one in own]).tofile(tmp_path / f"d/{number}.mask")
    cache = tmp_path / "cache" if cached else None
    settings = {"packing": "best_fit", "group_files": 2, "mask": "npy:mask", "cache": cache}
    for _ in range(2):
        open_plan.cache_clear()
        instances, _ = open_plan(plan(tmp_path / "d/*.npy", **settings))
    found = []
    for number in range(len(instances)):
        one = instances.read(number, documents=True)
        assert one.lengths is not None and one.label_mask is not None and one.lengths.sum() == LENGTH
        pieces = np.split(one.tokens, np.cumsum(one.lengths)[:-1])
        masks = np.split(one.label_mask, np.cumsum(one.lengths)[:-1])
        for piece, mask in zip(pieces, masks, strict=True):
            if (piece == PAD).all():
                assert not mask.any()
            else:
                found.append(tuple(piece))
                assert mask.tolist() == [False] + [True] * (len(piece) - 1)
    assert sorted(found) == sorted(tuple(one[:LENGTH]) for own in docs for one in own)


def test_long_documents_packed_in_groups_do_not_mix(tmp_path: Path) -> None:
    instances, _ = open_plan(plan(raw(tmp_path / "a.npy", documents(1, 5)), packing="best_fit"))
    index = build_index([*instances.files, *instances.files], LENGTH, EOD)
    rows = [set(index.files[a:b].tolist()) for a, b in zip(index.bounds[:-1], index.bounds[1:], strict=True)]
    assert rows == [{0}] * (len(rows) // 2) + [{1}] * (len(rows) // 2)


def test_mixture_arithmetic_on_a_case_worked_by_hand() -> None:
    """100 tokens, instances of 10, batches of 4: 12 instances. a: 25 of 200 tokens, an eighth of each of its files
    (13 and 13 of 100); b: 75 of 60, once whole and a quarter."""
    sources = [mixture.Source("a", 0.25, ("x",)), mixture.Source("b", 0.75, ("y",), max_repetition_ratio=2.0)]
    taken = mixture.plan(sources, [[100, 100], [60]], 100, 10, 4)
    # Floors 1, 1, 6, 1 leave 3; open: both of a and the repeat of b (remainders .3, .3, .5), one each.
    assert taken == [(0, 0, 2), (0, 1, 2), (1, 0, 6), (1, 0, 2)]
    with pytest.raises(DataError, match=r"source b: 75 tokens are asked for, 60 may be taken .* 15 short"):
        mixture.plan([sources[0], mixture.Source("b", 0.75, ("y",))], [[100, 100], [60]], 100, 10, 4)


def test_mixture_file_takes_prefixes_and_repeats(tmp_path: Path) -> None:
    raw(tmp_path / "a/1.npy", [np.arange(LENGTH * 10)])
    raw(tmp_path / "b/1.npy", [np.arange(1000, 1000 + LENGTH * 4)])
    text = """sources:
  - {source_name: a, target_ratio: 0.5, paths: ["a/*.npy"]}
  - {source_name: b, target_ratio: 0.5, paths: [b/1.npy], max_repetition_ratio: 1.5}
"""
    (tmp_path / "mix.yaml").write_text(text)
    instances, _ = open_plan(plan(tmp_path / "mix.yaml", root=tmp_path, mixture_tokens=LENGTH * 12, batch=2))
    firsts = [int(instances.read(number, False).tokens[0]) for number in range(len(instances))]
    assert firsts == [*range(0, 96, 16), *(1000 + 16 * i for i in range(4)), 1000, 1016]


def test_index_of_mix_is_read_in_its_order_and_only_for_what_it_was_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    docs = {name: documents(seed) for seed, name in enumerate(["a", "b"])}
    for name, own in docs.items():
        dataset(tmp_path / name, own)
    (tmp_path / "mix.json").write_text(
        json.dumps({"stages": [{"name": "s", "tokens": 640, "sources": {
            "d": {"ratio": 1.0, "max_epochs": 1, "buckets": {"a": 1, "b": 1}}}}]})
    )  # fmt: skip
    data = []
    for name in docs:
        folder = tmp_path / f"from_{name}"
        folder.mkdir()
        for suffix in (".bin", ".idx"):
            (folder / f"{name}{suffix}").symlink_to(tmp_path / f"{name}{suffix}")
        content = {"tokenizer": {"vocab_size": VOCAB}, "datasets": [_entry(name, docs[name])]}
        (folder / "manifest.json").write_text(json.dumps(content))
        data.append(str(folder))
    arguments = ["--mix", str(tmp_path / "mix.json"), "--sequence-length", str(LENGTH), "--output-dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["mix", *arguments, "--data", *data])
    mix.main()
    path = tmp_path / "s.instances.npy"
    instances, _ = open_plan(plan(path))
    assert len(instances) == 40
    listed = np.load(path)
    for number, (which, sample) in enumerate(listed):
        own = np.concatenate(docs["ab"[which]])
        count = own.size // LENGTH
        expected = own[sample % count * LENGTH :][:LENGTH]
        assert instances.read(number, False).tokens.tolist() == expected.tolist()
    with pytest.raises(DataError, match=r"made for a sequence length of 16, --seq-length is 32; run tools\.mix again"):
        open_plan(plan(path, sequence_length=32))
    changed = documents(0)
    changed[3][0] += 1
    dataset(tmp_path / "a", changed)
    with pytest.raises(DataError, match=r"a\.bin: other data than .*s\.instances\.npy was made of"):
        open_plan(plan(path, batch=2))


def test_a_second_epoch_of_a_listed_dataset_reads_it_again(tmp_path: Path) -> None:
    file = open_raw(raw(tmp_path / "a.npy", [np.arange(3 * LENGTH + 5)]), "uint32")
    index = np.array([(0, 2), (0, 4)], dtype=INDEX_DTYPE)
    instances = ListedInstances([file], Cutter(LENGTH, VOCAB, EOD), index)
    assert [int(instances.read(number, False).tokens[0]) for number in range(2)] == [2 * LENGTH, LENGTH]


def _entry(name: str, docs: list[np.ndarray]) -> dict[str, Any]:
    tokens = sum(map(len, docs))
    return {"prefix": name, "source": name, "tokens": tokens, "documents": len(docs), "dtype": "int32"}


@pytest.mark.parametrize(
    ("write", "more", "said"),
    [
        (lambda p: None, {}, r"a\.npy: No such file or directory; correct --instance-data"),
        (lambda p: p.write_bytes(b"1234567"), {}, r"7 bytes, no whole number of 4-byte ids"),
        (lambda p: np.save(p, np.arange(64)), {}, r"has numpy's header"),
        (lambda p: raw(p, [np.arange(15)]), {}, r"--global-batch-size 1: the data has 0 instances"),
        (lambda p: raw(p, [np.arange(64)]), {"mask": "b:c"}, r"'b' is not in the name of"),
        (lambda p: raw(p, [np.arange(64)]), {"mask": "a:c"}, r"c\.npy: no such file; it should hold the label mask"),
        (lambda p: raw(p, [np.arange(64)]), {"packing": "best_fit"}, r"no document that ends with .* id 69999"),
        (lambda p: raw(p, [np.full(64, VOCAB)]), {}, r"id 70000 read as uint32, the vocabulary has 70,000"),
        (lambda p: raw(p, [np.arange(64)], "<u2"), {}, r"id 4128830 read as uint32"),
    ],
)
def test_what_cannot_be_read_is_one_line(write: Any, more: dict[str, Any], said: str, tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    write(path)
    with pytest.raises(ToolError, match=said) as caught:
        instances, _ = open_plan(plan(path, **more))
        check_samples(instances.files, VOCAB)
    assert "\n" not in str(caught.value)


def test_an_id_outside_the_vocabulary_is_placed(tmp_path: Path) -> None:
    ids = np.arange(64)
    ids[37] = VOCAB
    instances, _ = open_plan(plan(raw(tmp_path / "a.npy", [ids])))
    with pytest.raises(DataError, match=r"token 37 has id 70000"):
        instances.read(2, False)
