"""FLOPs against numbers worked out by hand for the 7B, and against what PyTorch counts in a real model."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from torch.utils.flop_counter import FlopCounterMode

from megatron_hybrid import flops
from megatron_hybrid.flags import compose
from tests.parallel import tiny
from tests.parallel.ranks import run_ranks

SIZES_7B = flops.Sizes.from_flags(compose("olmo-hybrid-7b", []))
PATTERN_7B = "GGG*" * 8

#: By hand: 2 · 3840 · (2·2880 + 2·5760 + 2·30 + 5760), 2 · 4 · 11520, 30 · (6·96·192 + 256·288 + 2·64²), and so on.
PARTS_7B = {
    "gdn_proj": 177_408_000,
    "gdn_conv": 92_160,
    "gdn_rule": 5_775_360,
    "attn_proj": 117_964_800,
    "attn_core": 62_922_240,  # 4 · 3840 · 8193/2
    "mlp": 253_624_320,
    "output": 770_703_360,
    "loss": 401_408,
    "embedding": 0,
}


def test_parts_of_the_7b() -> None:
    found = {
        **flops.layer_parts(SIZES_7B, "G", 8192),
        **flops.layer_parts(SIZES_7B, "*", 8192),
        **flops.embedding_parts(SIZES_7B),
        **flops.output_parts(SIZES_7B),
    }
    assert found == PARTS_7B


@pytest.mark.parametrize(("tokens", "giga"), [(8192, 44.198), (65536, 54.768)])
def test_training_flops_of_the_7b(tokens: int, giga: float) -> None:
    """Three times 24 · 436.9 + 8 · (371.6 + core) + 771.1 MFLOP; only the core grows with the sequence."""
    assert flops.training_flops_per_token(SIZES_7B, PATTERN_7B, tokens) / 1e9 == pytest.approx(giga, abs=1e-3)


def test_delta_rule_per_chunk_and_head() -> None:
    per_chunk_head = flops.gdn_rule(SIZES_7B) * flops.CHUNK / SIZES_7B.gdn_value_heads
    assert per_chunk_head == 3 * 2 * 64 * 96 * 192 + 2 * 2 * 64 * 64 * (96 + 192) + 2 * 64**3  # 12.3 MFLOP


@pytest.mark.parametrize("window", [None, 1, 3, 7, 50])
def test_mean_keys_is_the_mean_over_queries(window: int | None) -> None:
    seen = [min(query + 1, window or 7) for query in range(7)]
    assert flops.mean_keys(7, window) == sum(seen) / 7


def test_windows_of_olmo3() -> None:
    sizes = flops.Sizes.from_flags(compose("olmo3-7b", []))
    assert sizes.window_keys == 4096
    assert [sizes.windowed(number) for number in range(1, 9)] == [True, True, True, False] * 2


def test_rows_follow_the_vocabulary_size() -> None:
    given = ["--vocab-size", "499", "--tensor-model-parallel-size", "2"]
    assert flops.Sizes.from_flags(compose("olmo-hybrid-7b", given)).vocabulary_rows == 512
    assert flops.Sizes.from_flags(compose("olmo-hybrid-7b", [*given, "--vocab-size", "512"])).vocabulary_rows == 768


@pytest.mark.parametrize(
    ("given", "without", "said"),
    [
        ([], ["hidden-size"], "--hidden-size: missing"),
        ([], ["linear-key-head-dim"], "--linear-key-head-dim: missing"),
        (["--window-size", "9,0", "--window-attn-skip-freq", "([1]*3)"], [], "plain list of 0 and 1"),
    ],
)
def test_sizes_that_cannot_be_read(given: list[str], without: list[str], said: str) -> None:
    with pytest.raises(flops.SizeError, match=said.replace("[", r"\[")):
        flops.Sizes.from_flags(compose("olmo-hybrid-7b", given, without))


def _counted(rank: int) -> dict[str, int]:
    """{name of a linear: FLOPs per token of a forward pass}, as PyTorch counts matrix products."""
    model = tiny.build(tiny.Layout())[0]
    batch = tiny.sample(0)
    counter = FlopCounterMode(model, display=False)
    with counter:
        model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
    tokens, found = batch["tokens"].numel(), {}
    for name, operations in counter.get_flop_counts().items():
        if name.endswith(("_proj", "linear_qkv", "linear_fc1", "linear_fc2", "output_layer")):
            found[name] = sum(operations.values()) // tokens
    return found


def _tiny_sizes() -> flops.Sizes:
    known: dict[str, Any] = tiny.SIZES
    flags = [word for name, size in known.items() for word in (f"--{name.replace('_', '-')}", str(size))]
    rows = ["--padded-vocab-size", str(tiny.PADDED_VOCAB)]
    return flops.Sizes.from_flags(["--hybrid-layer-pattern", tiny.PATTERN, "--swiglu", *flags, *rows])


def test_linears_as_pytorch_counts_them() -> None:
    counted = run_ranks(_counted, 1)[0]
    expected = flops.model_parts(_tiny_sizes(), tiny.PATTERN, tiny.SEQUENCE)

    def total(*endings: str) -> int:
        found = [value for name, value in counted.items() if name.endswith(endings)]
        assert found, endings
        return sum(found)

    assert total("in_proj", "ab_proj", "out_proj") == expected["gdn_proj"]
    assert total("linear_qkv", "linear_proj") == expected["attn_proj"]
    assert total("linear_fc1", "linear_fc2") == expected["mlp"]
    assert total("output_layer") == expected["output"]


def test_needs_no_torch() -> None:
    check = "import sys; from megatron_hybrid import flops; from megatron_hybrid.parallel import pipeline_layout; "
    subprocess.run([sys.executable, "-c", f"{check}assert not {{'torch', 'megatron'}} & set(sys.modules)"], check=True)
