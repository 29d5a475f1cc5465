"""Which launch a pair of GPU and triton gets, and which pairs get none."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from megatron_hybrid.kernels import configs
from megatron_hybrid.tools.tune_kernels import search


@pytest.mark.parametrize(
    ("architecture", "version", "reason"),
    [
        ("sm_100", "3.6.0", "race"),
        ("sm_100", "3.7", "race"),
        ("sm_120", "3.6", "race"),
        ("sm_100", "3.8.0", None),
        ("sm_103", "3.6.0", "one accumulator.*race"),
        ("sm_103", "3.8.1+git1", "one accumulator"),
        ("sm_103", "3.9", None),
        ("sm_90", "3.6", None),
        ("interpreter", "3.6", None),
    ],
)
def test_known_bad_pairs(architecture: str, version: str, reason: str | None) -> None:
    found = configs.known_bad(architecture, version)
    assert found is None if reason is None else re.search(reason, found or "")


def test_no_entry_is_known_to_be_bad() -> None:
    assert [key for key in configs.TABLE if configs.known_bad(*key[:2])] == []


def test_a_bad_pair_has_no_launch_even_with_an_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "current_key", lambda: ("sm_100", "3.6"))
    monkeypatch.setitem(configs.TABLE, ("sm_100", "3.6", 96, 192), configs.DEFAULTS)
    with pytest.raises(RuntimeError, match=r"sm_100 with triton 3\.6: .*race.*tune_kernels.*reference backend"):
        configs.launch_for("scan", 96, 192)


def test_nothing_is_tuned_for_a_bad_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "current_key", lambda: ("sm_100", "3.6"))
    with pytest.raises(SystemExit, match=r"error: sm_100 with triton 3\.6: .*race.*--gdn-backend reference"):
        search.tune(4, 96, 192, 1000)


def test_table_is_read_without_torch_and_triton() -> None:
    code = "import sys; from megatron_hybrid.kernels import configs; print({'torch', 'triton'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "set()\n"


def test_no_candidate_is_tried_twice() -> None:
    for K in (96, 256):
        for kernel, others in search.candidates(K).items():
            tried = [configs.DEFAULTS[kernel], *others]
            assert len(set(tried)) == len(tried), kernel
