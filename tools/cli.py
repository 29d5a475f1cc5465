"""What the command-line tools share: errors that are one line, and a progress bar that stays out of logs."""

import shutil
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from tqdm import tqdm


class ToolError(RuntimeError):
    """A fault the user can act on. Its text is the whole message; no traceback is shown for it."""


def run_cli(main: Callable[[], None]) -> NoReturn:
    """Runs `main` and exits: 0 when it returns, 1 with one line on stderr for a fault, 130 for Ctrl-C."""
    try:
        main()
    except (ToolError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("interrupted; nothing was left under the final names", file=sys.stderr)
        sys.exit(130)
    sys.exit(0)


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
