"""The tiny hybrid learns: a stated loss in stated steps, along a stored curve.

The text is the source of the pinned megatron-core, byte by byte, so that it is the same on every machine.
"""

from __future__ import annotations

import importlib.util
import json
from collections import Counter
from math import log
from pathlib import Path

import numpy as np
import pytest

from megatron_hybrid.tools.indexed_dataset import IndexedDatasetWriter
from megatron_hybrid.tools.plot_run import read_series
from tests.parallel.ranks import run_ranks
from tests.test_pretrain import _train

#: Losses of the first steps. AVX-512, AVX2 and neither were within 5e-7 of each other.
CURVE = json.loads(Path(__file__).with_name("learning_curve.json").read_text())["lm loss"]
STEPS = 30
END_OF_DOCUMENT = 256


def _text() -> list[bytes]:
    spec = importlib.util.find_spec("megatron.core")
    assert spec is not None and spec.submodule_search_locations
    root = Path(spec.submodule_search_locations[0])
    return [path.read_bytes() for path in sorted((root / "transformer").glob("*.py"))]


def _flags(data: Path, run: Path) -> list[str]:
    return [
        *("--preset", "olmo-hybrid-tiny", "--tokenizer-type", "NullTokenizer", "--vocab-size", str(END_OF_DOCUMENT)),
        *("--data-path", str(data), "--split", "100,0,0", "--data-cache-path", str(run / "cache")),
        *("--seq-length", "128", "--max-position-embeddings", "128", "--num-workers", "0", "--eval-iters", "0"),
        *("--train-iters", str(STEPS), "--lr-warmup-iters", "5", "--micro-batch-size", "8", "--global-batch-size", "8"),
        *("--tensorboard-dir", str(run / "tensorboard"), "--tensorboard-log-interval", "1"),
    ]


def test_it_learns_along_the_stored_curve(tmp_path: Path) -> None:
    """Later steps are not compared: what instruction sets round differently grows tenfold with each."""
    text = _text()
    with IndexedDatasetWriter(tmp_path / "text", END_OF_DOCUMENT + 1) as writer:
        for document in text:
            writer.add_document(np.array([*document, END_OF_DOCUMENT]))
        writer.commit()
    run_ranks(_train, 1, _flags(tmp_path / "text", tmp_path), timeout_s=600)
    losses = read_series(tmp_path / "tensorboard")["lm loss"].values
    assert list(losses[: len(CURVE)]) == pytest.approx(CURVE, abs=1e-5)
    counts = Counter(b"".join(text))
    total = sum(counts.values())
    assert np.mean(losses[-10:]) < -sum(n / total * log(n / total) for n in counts.values()) - 0.15  # 3.10 - 0.15
