"""What the tools share: quick start-up without heavy imports, one-line errors, files that appear whole."""

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from megatron_hybrid.tools.atomic_file import atomic_open
from megatron_hybrid.tools.cli import ToolError, run_cli

TOOLS = [
    *("gather_corpus", "train_tokenizer", "preprocess", "plot_run"),
    *("inspect_data", "mix", "import_tokens", "bench_preprocess", "convert", "clean", "plan"),
    *("bench_kernels", "tune_kernels"),
]
HEAVY = {"torch", "megatron", "transformers", "tensorboard", "matplotlib", "sentencepiece", "zstandard"}
HEAVY |= {"pyarrow", "fastokens", "tokenizers", "fsspec", "isal"}


@pytest.mark.parametrize("tool", TOOLS)
def test_help_imports_nothing_heavy_and_a_usage_error_is_one_line(tool: str) -> None:
    script = (
        "import runpy, sys\n"
        "for words, status in (['--help'], 0), (['--no-such-flag'], 2):\n"
        "    sys.argv = ['tool', *words]\n"
        "    try:\n"
        f"        runpy.run_module('megatron_hybrid.tools.{tool}', run_name='__main__')\n"
        "    except SystemExit as stop:\n"
        "        assert stop.code == status, stop.code\n"
        f"    print(sorted({HEAVY!r} & set(sys.modules)), file=sys.stderr)\n"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    free, error, still_free = run.stderr.splitlines()
    assert free == still_free == "[]"
    assert error.startswith("error: ") and f"; see python -m megatron_hybrid.tools.{tool}" in error
    assert f"python -m megatron_hybrid.tools.{tool}" in run.stdout


@pytest.mark.parametrize(
    ("fault", "status"),
    [
        pytest.param(None, 0, id="success"),
        pytest.param(ToolError("--flag 3: bad"), "error: --flag 3: bad", id="tool-error"),
        pytest.param(FileNotFoundError(2, "No such file", "x"), "error: [Errno 2] No such file: 'x'", id="os-error"),
        pytest.param(KeyboardInterrupt(), 130, id="ctrl-c"),
    ],
)
def test_fault_becomes_an_exit_status(fault: BaseException | None, status: int | str) -> None:
    def main() -> None:
        if fault is not None:
            raise fault

    with pytest.raises(SystemExit) as stop:
        run_cli(main)
    assert stop.value.code == status


@pytest.mark.parametrize(
    "command",
    [
        "tools.inspect_data --help",
        "tools.plan check --gpu H100 --gpus 512 -- --preset olmo-hybrid-7b --tensor-model-parallel-size 2",
        "parallel.pipeline_layout --preset olmo-hybrid-7b --pipeline-model-parallel-size 4",
        "pretrain --preset olmo-hybrid-7b --dry-run --gpus 64",
        "pretrain --preset olmo-hybrid-7b --print-args",
    ],
)
def test_a_reader_that_leaves_ends_it_quietly(command: str) -> None:
    read, write = os.pipe()
    os.close(read)
    program, *words = command.split()
    ended = subprocess.run(
        [sys.executable, "-m", f"megatron_hybrid.{program}", *words], stdout=write, stderr=subprocess.PIPE, text=True
    )
    os.close(write)
    assert (ended.returncode, ended.stderr) == (141, "")


def test_fault_of_the_program_keeps_its_traceback() -> None:
    def main() -> None:
        raise KeyError("bug")

    with pytest.raises(KeyError):
        run_cli(main)


@pytest.mark.parametrize("columns", [0, 100], ids="terminal-of-{}-columns".format)
@pytest.mark.parametrize("show_rate", [True, False], ids=["rate", "no-rate"])
def test_progress_is_drawn_on_a_terminal(columns: int, show_rate: bool) -> None:
    script = (
        "from megatron_hybrid.tools.cli import byte_progress_bar\n"
        f"with byte_progress_bar('reading', 4000, show_rate={show_rate}) as bar:\n"
        "    bar.update(4000)\n"
        "    bar.set_postfix_str('5 tokens')\n"
    )
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    subprocess.run([sys.executable, "-c", script], stderr=theirs, check=True)
    os.close(theirs)
    drawn = os.read(ours, 1 << 16).decode()
    assert "reading 100%|" in drawn and "4.00k/4.00k" in drawn and ", 5 tokens]" in drawn
    assert ("B/s" in drawn) == show_rate


def test_progress_stays_out_of_a_log() -> None:
    script = "from megatron_hybrid.tools.cli import byte_progress_bar\nbyte_progress_bar('reading', 4).update(4)\n"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    assert (run.stdout, run.stderr) == (b"", b"")


def test_atomic_file_appears_only_when_its_block_ends(tmp_path: Path) -> None:
    final = tmp_path / "new" / "file"
    with atomic_open(final) as handle:
        handle.write(b"whole")
        assert not final.exists()
    assert [path.read_bytes() for path in final.parent.iterdir()] == [b"whole"]


def test_atomic_file_keeps_the_older_one_when_its_block_fails(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"older")
    with pytest.raises(KeyError), atomic_open(tmp_path / "file") as handle:
        handle.write(b"half")
        raise KeyError
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"file": b"older"}
