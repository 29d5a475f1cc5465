"""Duplicates and evaluation sets are taken out of a corpus by datatrove, and every line is accounted for."""

import gzip
import itertools
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import zstandard

pytest.importorskip("datatrove", reason="datatrove is in the extra `clean`, which is not part of the test environment")

WORDS = [
    "".join(letters) for letters in itertools.product("bdfgk", "aeiou", "lmnrst", "aeo")
]  # no digits: they all count as 0


def sentence(source: random.Random, words: int = 60) -> str:
    return " ".join(source.choices(WORDS, k=words))


def clean(folder: Path, *options: str) -> tuple[dict[str, Any], str]:
    command = [sys.executable, "-m", "megatron_hybrid.tools.clean", "--output-dir", str(folder), *options]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert result.returncode == 0, result.stderr
    return json.loads((folder / "clean.json").read_bytes()), result.stdout


def written(folder: Path, source: str) -> list[dict[str, Any]]:
    return [
        json.loads(line)
        for path in sorted((folder / source).glob("*.jsonl.zst"))
        for line in zstandard.open(path, "rt", encoding="utf-8")
    ]


def test_corpus_is_deduplicated_and_decontaminated(tmp_path: Path) -> None:
    source = random.Random(0)
    own = [sentence(source) for _ in range(40)]
    question, answer = sentence(source, 20), sentence(source, 20)
    near = own[3] + " and one more"
    leaked = f"{sentence(source)} {question} {answer} {sentence(source)}"
    web = [*own[:20], own[0], near, 'Grüße, "quoted" 漢字']
    code = [*own[20:], own[5], leaked, own[25]]
    (tmp_path / "web.jsonl").write_text(
        "\n".join(json.dumps({"text": text, "id": number}) for number, text in enumerate(web)) + "\nnot json\n\n"
    )
    lines = [json.dumps({"text": text, "id": 100 + number}) for number, text in enumerate(code)]
    for number in range(2):
        (tmp_path / f"code{number}.jsonl.gz").write_bytes(gzip.compress("\n".join(lines[number::2]).encode()))
    items = [{"text": answer, "query": question, "task": "quiz"}, {"text": "too short", "query": "?", "task": "quiz"}]
    (tmp_path / "quiz.jsonl").write_text("\n".join(map(json.dumps, items)))
    options = ["--input", f"web={tmp_path}/web.jsonl", f"code={tmp_path}/code*.gz", "--metadata-keys", "id"]
    options += ["--on-error", "skip", "--exact", "--minhash", "--decontaminate", str(tmp_path / "quiz.jsonl")]
    accounts, table = clean(tmp_path / "out", *options, "--workers", "2")
    removed = {name: total["removed"] for name, total in accounts["sources"].items()}
    total = {step: sum(own[step] for own in removed.values()) for step in ("exact", "minhash", "decontaminate")}
    assert total == {"exact": 3, "minhash": 1, "decontaminate": 1}
    assert removed["code"]["decontaminate"] == 1
    for name, lines_in, rejected in (("web", 25, {"malformed_json": 1, "blank_line": 1}), ("code", 23, {})):
        account = accounts["sources"][name]
        assert (account["lines"], account["rejected"]) == (lines_in, rejected)
        assert account["lines"] == account["kept"] + sum(rejected.values()) + sum(account["removed"].values())
    kept = written(tmp_path / "out", "web") + written(tmp_path / "out", "code")
    texts = [entry["text"] for entry in kept]
    assert len(texts) == len(set(texts)) == 41  # 40 of their own, of own[3] and its neighbour one, and the greeting
    assert set(own) - {own[3]} < set(texts) and len({own[3], near} & set(texts)) == 1 and web[-1] in texts
    assert all((web + [""] * 77 + code)[entry["id"]] == entry["text"] for entry in kept)
    quiz = accounts["contamination"]["quiz"]
    assert (quiz["items"], quiz["items_too_short"], quiz["documents"]) == (2, 1, {"code": 1})
    assert " ".join(leaked.split()[60:72]) in quiz["first_ngrams"]
    assert "web: 25 lines = " in table and "quiz: 2 items (1 too short" in table
    # The same command again does nothing and says the same; other flags are refused.
    assert clean(tmp_path / "out", *options, "--workers", "1") == (accounts, table)
    command = [
        sys.executable,
        "-m",
        "megatron_hybrid.tools.clean",
        "--output-dir",
        str(tmp_path / "out"),
        *options[:-3],
    ]
    other = subprocess.run(command, capture_output=True, text=True, check=False)
    assert other.returncode == 1 and "holds a run with other flags, or its inputs have changed" in other.stderr


def test_report_alone_writes_no_corpus(tmp_path: Path) -> None:
    text = sentence(random.Random(1), 30)
    (tmp_path / "in.jsonl").write_text(f"{json.dumps({'text': text})}\n{json.dumps({'text': 'another'})}\n")
    (tmp_path / "quiz.jsonl").write_text(json.dumps({"text": text}))
    words = ["--input", str(tmp_path / "in.jsonl"), "--decontaminate", str(tmp_path / "quiz.jsonl"), "--report-only"]
    accounts, _ = clean(tmp_path / "out", *words)
    assert accounts["contamination"]["quiz"]["documents"] == {"in": 1}
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["clean.json", "removed", "work"]


def test_bad_line_ends_the_run_by_default(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"text": "a"}\n{"text": 5}\n')
    command = [sys.executable, "-m", "megatron_hybrid.tools.clean", "--output-dir", str(tmp_path / "out"), "--exact"]
    result = subprocess.run(
        [*command, "--input", str(tmp_path / "in.jsonl")], capture_output=True, text=True, check=False
    )
    assert result.returncode == 1 and "in.jsonl:2: wrong_type" in result.stderr
