"""Takes duplicates, near-duplicates and what overlaps with evaluation sets out of a corpus, before `preprocess`.

    python -m megatron_hybrid.tools.clean --input web=/data/web/ code=/data/code/ --output-dir clean \\
        --exact --minhash --decontaminate mmlu.jsonl gsm8k.jsonl --workers 8

datatrove does the work (extra `clean`); this tool reads for it, so that no line is lost, and accounts for what it
took out. The output is JSONL for `preprocess --input web=clean/web/`, one folder per source. With --report-only
nothing is written but the accounts. A line of an evaluation set is {"text": answer, "query": question, "task": name};
query and task are optional.
"""

import argparse
import hashlib
import json
import os
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from megatron_hybrid.tools.atomic_file import atomic_open
from megatron_hybrid.tools.cli import Parser, ToolError, run_cli

MAX_TASKS = 256  # each makes a file of signatures per bucket
STEPS = ("exact", "minhash", "decontaminate")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = Parser(
        prog="python -m megatron_hybrid.tools.clean",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = result.add_argument
    add("--input", nargs="+", required=True, metavar="[NAME=]PATH", help="as in preprocess")
    add("--output-dir", type=Path, required=True, metavar="D", help="folder of the cleaned JSONL and the accounts")
    add("--exact", action="store_true", help="of documents with the same text, keep one")
    add("--minhash", action="store_true", help="of documents that are nearly the same, keep one (MinHash)")
    add("--minhash-buckets", type=int, default=14, metavar="B", help="buckets (default: 14)")
    add("--minhash-hashes", type=int, default=8, metavar="H", help="hashes per bucket (default: 8)")
    add("--decontaminate", nargs="+", type=Path, default=[], metavar="FILE", help="evaluation sets to keep out")
    add("--ngram", type=int, default=12, metavar="N", help="words in a row that count as contamination (default: 12)")
    add("--language", default="eng", metavar="CODE", help="how datatrove finds words (default: eng)")
    add("--text-key", default="text", metavar="KEY", help="key that holds the text (default: text)")
    add("--metadata-keys", nargs="+", default=[], metavar="KEY", help="keys to keep beside the text")
    add("--on-error", choices=("fail", "skip"), default="fail", help="lines that are no documents (default: fail)")
    add("--report-only", action="store_true", help="write what would be removed, and no corpus")
    add("--workers", type=int, default=1, metavar="N", help="processes (default: 1)")
    return result


def make_groups(files: list[Any]) -> list[Any]:
    """The files of each task: at most about MAX_TASKS tasks, sources never mixed."""
    from megatron_hybrid.tools.corpus.datatrove_steps import Group

    size = -(-len(files) // MAX_TASKS)
    groups = []
    for source in dict.fromkeys(file.source for file in files):
        paths = [file.path for file in files if file.source == source]
        groups += [Group(source, tuple(paths[at : at + size])) for at in range(0, len(paths), size)]
    return groups


class Cleaning:
    """One run: the steps asked for, as pipelines of datatrove over the same groups of files."""

    def __init__(self, args: argparse.Namespace) -> None:
        from datatrove.utils.hashing import HashConfig

        from megatron_hybrid.tools.corpus.datatrove_steps import Tally
        from megatron_hybrid.tools.corpus.inputs import find_inputs
        from megatron_hybrid.tools.corpus.plan import Options

        self.args = args
        self.files, _ = find_inputs(args.input)
        self.groups = make_groups(self.files)
        self.work = args.output_dir / "work"
        self.options = Options(args.text_key, metadata_keys=tuple(args.metadata_keys))
        self.hashing = HashConfig(hash_fc="sha1")  # its xxhash wants a version that is not ours
        self.tally = Tally()
        self._refuse_other_settings()

    def _refuse_other_settings(self) -> None:
        """A folder continues the run it was made for, and no other."""
        settings = {key: value for key, value in vars(self.args).items() if key not in ("workers", "output_dir")}
        evaluations = [hashlib.sha256(path.read_bytes()).hexdigest() for path in self.args.decontaminate]
        content = json.dumps([settings, evaluations, [vars(file) for file in self.files]], default=str)
        digest = hashlib.sha256(content.encode()).hexdigest()
        path = self.work / "settings"
        if path.exists() and path.read_text() != digest:
            raise ToolError(
                f"--output-dir {self.args.output_dir}: holds a run with other flags, or its inputs have changed; "
                "remove it"
            )
        self.work.mkdir(parents=True, exist_ok=True)
        path.write_text(digest)

    def run(self) -> dict[str, Any]:
        """Does what is not done yet; returns the accounts."""
        if self.args.exact:
            self._find_exact()
        if self.args.minhash:
            self._find_near()
        index = self._index_evaluations() if self.args.decontaminate else {}
        self._last_pass()
        return self._accounts(index)

    # ---- pipelines ----

    def _execute(self, name: str, tasks: int, pipeline: list[Any]) -> None:
        from datatrove.executor import LocalPipelineExecutor

        workers = min(self.args.workers, tasks)
        LocalPipelineExecutor(pipeline, tasks, workers, logging_dir=str(self.work / "logs" / name)).run()

    def _read(self, *later: Any) -> list[Any]:
        from megatron_hybrid.tools.corpus.datatrove_steps import Read

        return [Read(self.groups, self.options, self.args.on_error, self.work, self.tally), *later]

    def _exact_config(self) -> Any:
        from datatrove.pipeline.dedup.exact_dedup import ExactDedupConfig

        return ExactDedupConfig(text_of, hash_config=self.hashing)

    def _minhash_config(self) -> Any:
        from datatrove.pipeline.dedup.minhash import MinhashConfig

        return MinhashConfig(
            num_buckets=self.args.minhash_buckets,
            hashes_per_bucket=self.args.minhash_hashes,
            hash_config=self.hashing,
        )

    def _find_exact(self) -> None:
        from datatrove.pipeline.dedup.exact_dedup import ExactDedupSignature, ExactFindDedups

        config, folder = self._exact_config(), self.work / "exact"
        self._execute("exact-1", len(self.groups), self._read(ExactDedupSignature(str(folder / "signatures"), config)))
        find = ExactFindDedups(str(folder / "signatures"), str(folder / "duplicates"), config)
        self._execute("exact-2", 1, [find])

    def _find_near(self) -> None:
        from datatrove.pipeline.dedup.minhash import MinhashDedupBuckets, MinhashDedupCluster, MinhashDedupSignature

        config, folder = self._minhash_config(), self.work / "minhash"
        signatures, pairs, removed = (str(folder / name) for name in ("signatures", "pairs", "removed"))
        sign = MinhashDedupSignature(signatures, config, self.args.language)
        self._execute("minhash-1", len(self.groups), self._read(*self._exact_filter(None), sign))
        self._execute("minhash-2", config.num_buckets, [MinhashDedupBuckets(signatures, pairs, config=config)])
        self._execute("minhash-3", 1, [MinhashDedupCluster(pairs, removed, config)])

    def _exact_filter(self, removed: Any) -> list[Any]:
        from datatrove.pipeline.dedup.exact_dedup import ExactDedupFilter

        if not self.args.exact:
            return []
        return [ExactDedupFilter(str(self.work / "exact" / "duplicates"), self._exact_config(), removed)]

    def _last_pass(self) -> None:
        """Reads, filters and writes; lists what each filter took out."""
        from datatrove.pipeline.decont import NGramsDecontFilter
        from datatrove.pipeline.dedup.minhash import MinhashDedupFilter

        from megatron_hybrid.tools.corpus.datatrove_steps import Passed, Removed, Write

        def removed(step: str) -> Removed:
            return Removed(self.args.output_dir / "removed", step, self.groups)

        steps = [*self._exact_filter(removed("exact")), Passed("exact", self.tally)]
        if self.args.minhash:
            steps.append(MinhashDedupFilter(str(self.work / "minhash" / "removed"), removed("minhash")))
        steps.append(Passed("minhash", self.tally))
        if self.args.decontaminate:
            steps.append(
                NGramsDecontFilter(
                    str(self.work / "evaluations"),
                    self._decontamination(),
                    removed("decontaminate"),
                    self.args.language,
                )
            )
        output = None if self.args.report_only else self.args.output_dir
        steps.append(Write(output, self.work / "records", self.groups, self.args.text_key, self.tally))
        self._execute("last", len(self.groups), self._read(*steps))

    # ---- evaluation sets ----

    def _decontamination(self) -> Any:
        from datatrove.pipeline.decont.n_grams import NGramsDecontConfig

        return NGramsDecontConfig(self.args.ngram, find_query_ngrams=True, hash_config=self.hashing)

    def _index_evaluations(self) -> dict[str, dict[str, int]]:
        """Writes the n-grams of the evaluation sets as datatrove's filter reads them; {task: items and n-grams}.

        datatrove's own step for that needs lighteval, for sets that it would download; the hashes are its own.
        """
        import numpy as np
        from datatrove.pipeline.decont import NGramsDecontIndexer
        from datatrove.utils.hashing import create_hash_func
        from datatrove.utils.word_tokenizers import load_word_tokenizer

        config = self._decontamination()
        tools = SimpleNamespace(
            config=config, tokenizer=load_word_tokenizer(self.args.language), hash_func=create_hash_func(self.hashing)
        )
        hashes: dict[str, set[int]] = {}
        index: dict[str, dict[str, int]] = {}
        for task, query, text in read_evaluations(self.args.decontaminate):
            found = NGramsDecontIndexer.compute_hashes(tools, text, query)
            own = index.setdefault(task, {"items": 0, "items_too_short": 0, "ngrams": 0})
            own["items"] += 1
            own["items_too_short"] += not found
            hashes.setdefault(task, set()).update(found)
        folder = self.work / "evaluations"
        shutil.rmtree(folder, ignore_errors=True)
        for task, found_hashes in hashes.items():
            index[task]["ngrams"] = len(found_hashes)
            with atomic_open(folder / f"{task}.index.hashes") as handle:
                handle.write(np.array(sorted(found_hashes), dtype=self.hashing.np_descr).tobytes())
        if not any(hashes.values()):
            raise ToolError(f"--decontaminate: no item has {self.args.ngram} words in a row; choose a smaller --ngram")
        return index

    # ---- accounts ----

    def _accounts(self, index: dict[str, dict[str, int]]) -> dict[str, Any]:
        """Sums the tallies of all tasks, and checks them against what datatrove listed for removal."""
        sources: dict[str, Any] = {}
        for rank, group in enumerate(self.groups):
            own = json.loads((self.work / "records" / f"{rank:05d}.json").read_bytes())
            total = sources.setdefault(
                group.source,
                {"lines": 0, "documents": 0, "kept": 0, "rejected": {}, "removed": dict.fromkeys(STEPS, 0)},
            )
            passed = [own["passed"].get(name, 0) for name in ("read", "exact", "minhash", "kept")]
            if own["lines"] != passed[0] + sum(own["rejected"].values()):
                raise ToolError(f"task {rank}: {own['lines']} lines, {passed[0]} documents, {own['rejected']} rejected")
            for number, step in enumerate(STEPS):
                gone = passed[number] - passed[number + 1]
                if step != "decontaminate" and gone != self._listed(step, rank):
                    raise ToolError(f"task {rank}: {step} took {gone} documents out, {self._listed(step, rank)} listed")
                total["removed"][step] += gone
            total["lines"] += own["lines"]
            total["documents"] += passed[0]
            total["kept"] += passed[-1]
            total["rejected"] = dict(Counter(total["rejected"]) + Counter(own["rejected"]))
        return {"sources": sources, "contamination": self._contamination(index)}

    def _listed(self, step: str, rank: int) -> int:
        """Documents of a task that datatrove's finding steps listed for removal; 4 bytes each."""
        paths = {
            "exact": (self.work / "exact" / "duplicates").glob(f"*/{rank:05d}.c4_dup"),
            "minhash": (self.work / "minhash" / "removed").glob(f"{rank:06d}.remove"),
        }
        return sum(path.stat().st_size // 4 for path in paths[step]) if getattr(self.args, step) else 0

    def _contamination(self, index: dict[str, dict[str, int]]) -> dict[str, Any]:
        """Per task: what was looked for, the documents that hold it by source, and the most frequent n-grams."""
        documents: dict[str, Counter[str]] = {task: Counter() for task in index}
        ngrams: dict[str, Counter[str]] = {task: Counter() for task in index}
        for path in sorted((self.args.output_dir / "removed").glob("decontaminate-*.jsonl")):
            for line in path.read_text().splitlines():
                entry = json.loads(line)
                documents[entry["contaminated_task"]][entry["source"]] += 1
                ngrams[entry["contaminated_task"]][entry["contaminated_ngram"]] += 1
        return {
            task: {**own, "documents": dict(documents[task]), "first_ngrams": dict(ngrams[task].most_common(20))}
            for task, own in index.items()
        }


def text_of(document: Any) -> str:
    """What exact duplicates have in common."""
    text: str = document.text
    return text


def read_evaluations(paths: list[Path]) -> list[tuple[str, str | None, str]]:
    """(task, query or None, text) of every item; raises ToolError, naming the line, for one that is none."""
    items = []
    for path in paths:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if not line.strip():
                continue
            try:
                item = json.loads(line)
                text, query, task = item["text"], item.get("query"), item.get("task", path.stem)
                if not (isinstance(text, str) and isinstance(query, str | None) and isinstance(task, str)):
                    raise TypeError("text, query and task must be strings")
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ToolError(f"--decontaminate {path}:{number}: {error!r}; a line is {{'text': ...}}") from None
            items.append((task.replace("/", "_").replace(" ", "_"), query, text))
    return items


def table(accounts: dict[str, Any]) -> str:
    """The accounts as text."""
    lines = []
    for source, total in accounts["sources"].items():
        parts = [f"{total['kept']:,} kept"]
        parts += [f"{count:,} {step}" for step, count in total["removed"].items() if count]
        parts += [f"{count:,} {reason}" for reason, count in total["rejected"].items()]
        lines.append(f"{source}: {total['lines']:,} lines = {' + '.join(parts)}")
    for task, own in accounts["contamination"].items():
        lines.append(
            f"{task}: {own['items']:,} items ({own['items_too_short']:,} too short to look for), {own['ngrams']:,} "
            f"n-grams; found in {sum(own['documents'].values()):,} documents {own['documents'] or ''}"
        )
    return "\n".join(lines)


def main() -> None:
    """Command-line entry point."""
    args = parser().parse_args()
    if not (args.exact or args.minhash or args.decontaminate):
        raise ToolError("nothing to do; pass --exact, --minhash or --decontaminate FILE")
    for path in args.decontaminate:
        if not path.is_file():
            raise ToolError(f"--decontaminate {path}: no such file")
    os.environ.setdefault("LOGURU_LEVEL", "WARNING")  # datatrove's own log is in the work folder
    try:
        import datatrove  # noqa: F401
    except ImportError:
        raise ToolError("datatrove is not installed; pip install -e '.[clean]'") from None
    accounts = Cleaning(args).run()
    with atomic_open(args.output_dir / "clean.json") as handle:
        handle.write(json.dumps(accounts, indent=1).encode() + b"\n")
    print(table(accounts))


if __name__ == "__main__":
    run_cli(main)
