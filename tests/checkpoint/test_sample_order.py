"""The record of the order of samples, against the datasets that Megatron builds: equal exactly where the orders are."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import numpy as np
import pytest

from megatron_hybrid.checkpoint import sample_order
from megatron_hybrid.tools.indexed_dataset import IndexedDatasetWriter
from tests.parallel.ranks import run_ranks

VOCAB, LENGTH = 500, 16
#: Of a run that is continued, as long as the shortest.
FIRST = 8


@pytest.fixture(scope="module")
def prefixes(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("order")
    for number, name in enumerate("ab"):
        generator = np.random.default_rng(number)
        with IndexedDatasetWriter(folder / name, VOCAB) as writer:
            for length in generator.integers(5, 60, size=30 + 10 * number):
                writer.add_document(generator.integers(0, VOCAB - 1, size=length))
            writer.commit()
    return [str(folder / name) for name in "ab"]


def _args(blend: list[str], samples: int, **more: Any) -> Namespace:
    given: dict[str, Any] = {
        "data_path": blend, "data_args_path": None, "per_split_data_args_path": None, "split": "90,10,0",
        "train_data_path": None, "valid_data_path": None, "test_data_path": None, "seed": 5, "seq_length": LENGTH,
        "train_samples": samples, "train_iters": None, "global_batch_size": 1, "mid_level_dataset_surplus": 0.005,
        "phase_transition_iterations": None, "document_masking": False, "mock_data": False,
    }  # fmt: skip
    return Namespace(**{**given, **more})


def _record(args: Namespace) -> dict[str, Any]:
    return sample_order.describe(args, sample_order.tokens_of_training(args, 0, 1))


def _first_samples(rank: int, cases: list[Namespace]) -> list[list[list[int]]]:
    """The tokens of the first samples, by Megatron."""
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.tokenizers import MegatronTokenizer
    from megatron.training.utils import get_blend_and_blend_per_split

    found = []
    for args in cases:
        blend, per_split = get_blend_and_blend_per_split(args)
        config = GPTDatasetConfig(
            random_seed=args.seed,
            sequence_length=args.seq_length,
            blend=blend,
            blend_per_split=per_split,
            split=None if per_split else args.split,
            tokenizer=MegatronTokenizer.from_pretrained(metadata_path={"library": "null-text"}, vocab_size=VOCAB - 1),
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
            mid_level_dataset_surplus=args.mid_level_dataset_surplus,
        )
        sizes = [args.train_samples, 0, 0]
        train = BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, config).build()[0]
        found.append([train[position]["tokens"].tolist() for position in range(FIRST)])
    return found


def test_records_are_equal_where_the_orders_are(prefixes: list[str]) -> None:
    a, b = prefixes
    blends = {
        "one": [a],
        "weighted": ["0.3", a, "0.7", b],
        "as long as they are": [a, b, a],
    }
    cases, names = [], []
    for name, blend in blends.items():
        for samples in (*range(FIRST, 160, 9), 400):
            if len(blend) != 3 or samples < 100:
                cases.append(_args(blend, samples))
                names.append(name)
    cases += [_args([a], FIRST, seed=6), _args([a], FIRST, split="80,20,0"), _args([a], FIRST, split="9,1,0")]
    cases += [_args(["3", a, "7", b], FIRST), _args(["0.4", a, "0.6", b], FIRST)]
    cases += [_args([], FIRST, data_path=None, split=None, train_data_path=["0.3", a, "0.7", b])]
    orders = run_ranks(_first_samples, 1, cases)[0]
    records = [_record(case) for case in cases]
    equal = 0
    for one in range(len(cases)):
        for other in range(one):
            found = sample_order.differences(records[one], records[other])
            same = orders[one] == orders[other]
            assert (found == []) == same, (cases[one], cases[other], found)
            equal += same
    assert 50 < equal < len(cases) * (len(cases) - 1) / 4  # both happen
    epochs = {tuple(map(tuple, record["epochs"])) for record in records}
    assert len(epochs) > 8 and any(apart for record in epochs for _, apart in record)
