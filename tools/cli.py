"""What the command-line tools share: errors that are one line, and a progress bar that stays out of logs."""

import argparse
import os
import select
import shutil
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from tqdm import tqdm


class ToolError(RuntimeError):
    """A fault the user can act on. Its text is the whole message; no traceback is shown for it."""


class Parser(argparse.ArgumentParser):
    """argparse's, but what is wrong with a command is one line: the usage of dozens of flags would bury it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; see {self.prog} --help\n")


def run_cli(main: Callable[[], None]) -> NoReturn:
    """Runs `main` and exits: 0 when it returns, 1 with one line on stderr for a fault, 130 for Ctrl-C."""
    try:
        main()
        sys.stdout.flush()
    except (ToolError, OSError) as error:
        if isinstance(error, BrokenPipeError) and _reader_has_left():
            end_without_reader()
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("interrupted; nothing was left under the final names", file=sys.stderr)
        sys.exit(130)
    sys.exit(0)


def _reader_has_left() -> bool:
    """Of stdout, and not of a pipe to another process."""
    pipe = select.poll()
    pipe.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in pipe.poll(0))


def end_without_reader() -> NoReturn:
    """For what `| head` has left: status 141, as of other programs, and no traceback."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more when it ends
    sys.exit(141)


def byte_progress_bar(label: str, total_bytes: int | None, show_rate: bool = True) -> "tqdm[Any]":
    """A tqdm bar that counts bytes, in powers of 1,000; nothing where stderr is a file or a pipe (a job's log).

    `show_rate` False leaves out the bytes per second, for a caller that has a better rate to show.
    """
    from tqdm import tqdm

    rate = ", {rate_fmt}" if show_rate else ""
    return tqdm(
        total=total_bytes,
        desc=label,
        unit="B",
        unit_scale=True,
        unit_divisor=1000,
        disable=None,
        mininterval=0.2,
        ncols=shutil.get_terminal_size((100, 24)).columns,  # a terminal that tells no size gets 100
        bar_format="{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}" + rate + "{postfix}]",
    )
