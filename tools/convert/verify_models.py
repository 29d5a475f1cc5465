"""Runs the two implementations of a model on the same tokens, each in a process of its own, and compares them."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_hybrid.tools.cli import ToolError
from megatron_hybrid.tools.compare_logits import compare_logits
from megatron_hybrid.tools.convert.model_flags import training_flags
from megatron_hybrid.tools.convert.questions import NEW_TOKENS
from megatron_hybrid.tools.convert.source import MegatronSource
from megatron_hybrid.tools.convert.verify_rows import Row
from megatron_hybrid.tools.hf_mapping import ModelConfig

if TYPE_CHECKING:
    from torch import Tensor

#: One chunk of the recurrence, one token more, and three chunks with a ragged tail: a kernel that forgets its state
#: every 64 tokens passes at 64.
LENGTHS = (64, 65, 200)
DOCUMENTS = (70, 1, 64, 65)  # of the packed row: boundaries inside chunks, one document of a single token
PROMPT_TOKENS, TEXT_TOKENS = 16, 1024
LOSS_TOLERANCE = 1e-5  # relative difference of perplexities; state forgotten every 64 tokens moved one by 6.5e-5


def compare_models(source: MegatronSource, model: Path, text: Path | None, tolerance: float) -> list[Row]:
    """Runs both models in fp32 and compares logits, greedy tokens and the perplexity of a text."""
    from safetensors.torch import load_file, save_file

    with tempfile.TemporaryDirectory(prefix="verify_") as scratch:
        folder = Path(scratch)
        asked = questions(source.config, model, text)
        save_file(asked, folder / "questions.safetensors")
        common = ["--tokens", str(folder / "questions.safetensors"), "--output"]
        _run("hf_logits", ["-m", "megatron_hybrid.tools.hf_logits", "--model", str(model), *common, f"{folder}/hf"])
        load = loadable(source.folder, folder)
        flags = [*megatron_flags(source.config), "--load", str(load)]
        _run("megatron_hybrid.logits", ["-m", "megatron_hybrid.logits", *flags, *common, f"{folder}/megatron"])
        theirs, ours = load_file(folder / "hf"), load_file(folder / "megatron")
    return [*_logit_rows(source.config, theirs, ours, tolerance), _greedy_row(theirs, ours), _loss_row(theirs, ours)]


def questions(config: ModelConfig, model: Path, text: Path | None) -> dict[str, Tensor]:
    """Random tokens of each length, a packed row, a prompt, and the beginning of the text."""
    import torch

    generator = torch.Generator().manual_seed(0)

    def draw(count: int) -> Tensor:
        return torch.randint(0, config.true_vocab_size, (1, count), generator=generator)

    asked = {f"tokens.T={length}": draw(length) for length in LENGTHS}
    asked["tokens.packed"], asked["lengths.packed"] = draw(sum(DOCUMENTS)), torch.tensor(DOCUMENTS)
    asked["prompt.random"] = draw(PROMPT_TOKENS)
    if text is not None:
        asked["text.given"] = _text_tokens(model, text, config)
    return asked


def _text_tokens(model: Path, text: Path, config: ModelConfig) -> Tensor:
    import torch
    from transformers import AutoTokenizer

    if not text.is_file():
        raise ToolError(f"--text {text}: no such file")
    if not (model / "tokenizer.json").is_file():
        raise ToolError(f"--text {text}: --model {model} has no tokenizer.json; export with --tokenizer-model")
    tokenizer = AutoTokenizer.from_pretrained(str(model), local_files_only=True)
    ids = tokenizer.encode(text.read_text(encoding="utf-8"), add_special_tokens=False)[:TEXT_TOKENS]
    if len(ids) < 2 or max(ids) >= config.vocab_size:
        raise ToolError(f"--text {text}: {len(ids)} tokens up to id {max(ids, default=0)} are too few or no ids of it")
    return torch.tensor([ids])


def megatron_flags(config: ModelConfig) -> list[str]:
    """One rank in fp32; what training needs besides the model has no effect here, but Megatron's parser wants it."""
    longest = max(*LENGTHS, sum(DOCUMENTS), PROMPT_TOKENS + NEW_TOKENS, TEXT_TOKENS)
    length = str(max(longest, config.max_position_embeddings))
    return [
        *training_flags(config),
        *("--without", "bf16", "--without", "use-distributed-optimizer", "--mock-data"),
        *("--tokenizer-type", "NullTokenizer", "--vocab-size", str(config.true_vocab_size - 1)),
        *("--seq-length", length, "--max-position-embeddings", length),
        *("--micro-batch-size", "1", "--global-batch-size", "1"),
    ]


def loadable(iteration_folder: Path, scratch: Path) -> Path:
    """A save folder whose newest iteration is this one: Megatron loads no iteration folder by itself."""
    from megatron_hybrid.tools.dcp_reader import TRACKER_FILE

    folder = scratch / "checkpoints"
    folder.mkdir()
    (folder / "release").symlink_to(iteration_folder.resolve())
    (folder / TRACKER_FILE).write_text("release")
    return folder


def _run(name: str, command: list[str]) -> None:
    """On the CPU, also where there is a GPU: kernels there take no fp32, and Transformer Engine rounds it to TF32."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment)
    if done.returncode:
        lines = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        raise ToolError(f"{name} failed with status {done.returncode}: {lines[-1][:300] if lines else 'no message'}")


def _logit_rows(config: ModelConfig, theirs: dict[str, Tensor], ours: dict[str, Tensor], tolerance: float) -> list[Row]:
    rows = []
    for key in [*(f"T={length}" for length in LENGTHS), "packed"]:
        difference = compare_logits(theirs[f"logits.{key}"], ours[f"logits.{key}"], config.vocab_size)
        what = (
            f"largest difference {difference.max_abs:.2e} of logits up to {difference.reference_abs_max:.3g}, "
            f"argmax equal at {difference.argmax_agreement:.2%}"
        )
        if key == "packed":
            what += f", documents of {', '.join(map(str, DOCUMENTS))}"
        rows.append(Row(f"logits, {key}", difference.within(tolerance), what))
    return rows


def _greedy_row(theirs: dict[str, Tensor], ours: dict[str, Tensor]) -> Row:
    one, other = theirs["greedy.random"].tolist(), ours["greedy.random"].tolist()
    first = next((index for index, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), None)
    what = "all equal" if first is None else f"token {first} is {other[first]}, transformers' is {one[first]}"
    return Row(f"{NEW_TOKENS} greedy tokens", first is None, what)


def _loss_row(theirs: dict[str, Tensor], ours: dict[str, Tensor]) -> Row:
    if "loss.given" not in theirs:
        return Row("perplexity", None, "not asked for: give --text FILE")
    one, other = (side["loss.given"].exp().item() for side in (theirs, ours))
    what = f"{other:.6g}, transformers' is {one:.6g}"
    return Row("perplexity", abs(one - other) <= LOSS_TOLERANCE * one, what)
