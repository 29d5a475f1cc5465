"""The gathered corpus: the same bytes every time, every skipped file counted, never half a file."""

import io
import json
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest
import zstandard

from megatron_hybrid.tools import gather_corpus as tool
from megatron_hybrid.tools.cli import ToolError
from megatron_hybrid.tools.jsonl_reader import parse_text, read_lines


@pytest.fixture
def stdlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A small stand-in for the standard library, with every kind of file that is skipped."""
    root = tmp_path / "lib"
    contents = {
        "json/decoder.py": "import re\n\n'''Décodeur'''\n".encode(),
        "json/__init__.py": b"",
        "test/test_json.py": b"assert True\r\n",
        "test/latin1.py": b"# caf\xe9\n",
        "test/copy_of_test_json.py": b"assert True\r\n",
        "test/data.bin": b"not text",
        "LICENSE.txt": b"A licence.\n",
        "pydoc_data/topics.py": b"topics = {}\n",
        "site-packages/numpy/README.md": b"numpy\n",
        "__pycache__/x.py": b"compiled\n",
    }
    for name, content in contents.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    (root / "link.py").symlink_to(root / "test/test_json.py")
    monkeypatch.setattr(tool, "pydoc_topics", lambda: [tool.Candidate("pydoc/assert", 8, None, b"asserts\n")])
    yield root


def corpus(root: Path, site_packages: Path, seed: int = 1, max_bytes: float = float("inf")) -> tuple[bytes, tool.Tally]:
    """The corpus of `root`, decompressed, and its tally."""
    output = io.BytesIO()
    tally = tool.write_corpus(tool.find_candidates(root, site_packages, seed), output, max_bytes)
    return zstandard.ZstdDecompressor().decompressobj().decompress(output.getvalue()), tally


def documents(content: bytes) -> dict[str, str]:
    """{source: text} of a corpus."""
    return {item["source"]: item["text"] for item in map(json.loads, content.splitlines())}


@pytest.fixture
def enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the stand-in count as a whole standard library."""
    monkeypatch.setattr(tool, "ENOUGH_BYTES", 1)


@pytest.mark.usefixtures("enough")
def test_sources_documentation_and_topics_are_gathered_and_the_rest_is_counted(stdlib: Path, tmp_path: Path) -> None:
    content, tally = corpus(stdlib, stdlib / "site-packages")
    found = documents(content)
    assert found.pop("stdlib/json/decoder.py") == "import re\n\n'''Décodeur'''\n"
    assert found.pop("stdlib/LICENSE.txt") == "A licence.\n"
    assert found.pop("pydoc/assert") == "asserts\n"
    (test_file,) = found  # one of the two equal files
    assert test_file in {"stdlib/test/test_json.py", "stdlib/test/copy_of_test_json.py"}
    assert found[test_file] == "assert True\r\n"
    assert dict(tally.skipped) == {"duplicate": 1, "empty": 1, "not UTF-8": 1}
    assert (tally.documents, tally.text_bytes) == (4, 27 + 11 + 8 + 13)


@pytest.mark.usefixtures("enough")
def test_order_is_that_of_the_seed_alone(stdlib: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, _ = corpus(stdlib, stdlib)
    files_under = tool.files_under
    monkeypatch.setattr(tool, "files_under", lambda *args: files_under(*args)[::-1])  # another file system
    assert corpus(stdlib, stdlib)[0] == first
    assert any(corpus(stdlib, stdlib, seed)[0] != first for seed in range(2, 6))


def test_small_standard_library_is_topped_up_from_site_packages(stdlib: Path) -> None:
    content, _ = corpus(stdlib, stdlib / "site-packages")
    assert documents(content)["site-packages/numpy/README.md"] == "numpy\n"


@pytest.mark.usefixtures("enough")
def test_large_standard_library_is_not_topped_up(stdlib: Path) -> None:
    content, _ = corpus(stdlib, stdlib / "site-packages")
    assert not [name for name in documents(content) if name.startswith("site-packages")]


@pytest.mark.usefixtures("enough")
@pytest.mark.parametrize("max_bytes", [8, 30, 58, 59])
def test_limit_is_never_passed_and_what_it_leaves_out_is_counted(stdlib: Path, max_bytes: int) -> None:
    content, tally = corpus(stdlib, stdlib, max_bytes=max_bytes)
    size = sum(len(text.encode()) for text in documents(content).values())
    assert 0 < size == tally.text_bytes <= max_bytes
    assert tally.documents + tally.skipped["over --max-mb"] == 4
    assert (tally.skipped["over --max-mb"] == 0) == (max_bytes == 59)


def test_this_python_is_gathered_twice_alike_and_read_back(tmp_path: Path) -> None:
    for name in ("a.jsonl.zst", "b.jsonl.zst"):
        tally = tool.gather(tmp_path / name, max_mb=0.5, seed=7)
    assert (tmp_path / "a.jsonl.zst").read_bytes() == (tmp_path / "b.jsonl.zst").read_bytes()
    texts = [parse_text(line, "text") for _, line in read_lines(tmp_path / "a.jsonl.zst")]
    assert len(texts) == len(set(texts)) == tally.documents > 1
    assert sum(len(text.encode()) for text in texts) == tally.text_bytes <= 500_000


def test_help_topics_of_this_python_are_documents() -> None:
    topics = {topic.name: topic.read().decode() for topic in tool.pydoc_topics()}
    assert "assert_stmt" in topics["pydoc/assert"]


@pytest.mark.parametrize(
    ("output", "max_mb", "message"),
    [
        pytest.param("corpus.jsonl", None, r"--output \S*corpus\.jsonl: .* end the name in \.jsonl\.zst", id="suffix"),
        pytest.param("corpus.jsonl.zst", 0.0, r"--max-mb 0: must be above 0", id="zero-limit"),
        pytest.param("corpus.jsonl.zst", 1e-6, r"no documents: .*over --max-mb.*raise --max-mb", id="limit-too-small"),
    ],
)
def test_bad_flag_is_named_and_leaves_no_file(tmp_path: Path, output: str, max_mb: float | None, message: str) -> None:
    with pytest.raises(ToolError, match=message):
        tool.gather(tmp_path / output, max_mb, seed=1)
    assert list(tmp_path.iterdir()) == []


def test_interrupted_run_keeps_the_older_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "corpus.jsonl.zst"
    output.write_bytes(b"older")

    def interrupt(*_: object) -> tool.Tally:
        raise KeyboardInterrupt

    monkeypatch.setattr(tool, "write_corpus", interrupt)
    with pytest.raises(KeyboardInterrupt):
        tool.gather(output, max_mb=None, seed=1)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"older"]


def test_command_line_prints_one_summary_line(tmp_path: Path) -> None:
    output = ["--output", str(tmp_path / "corpus.jsonl.zst")]
    run = subprocess.run(
        [sys.executable, "-m", "megatron_hybrid.tools.gather_corpus", "--max-mb", "0.2", *output],
        capture_output=True,
        text=True,
        check=True,
    )
    (line,) = run.stdout.splitlines()
    assert "documents, 0.2 MB of text in" in line and "over --max-mb" in line
    assert (run.stderr, sysconfig.get_path("stdlib") in line) == ("", False)
