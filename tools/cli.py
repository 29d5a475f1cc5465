"""What the command-line tools share: errors that are one line, and a progress bar that stays out of logs."""

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


def progress_bar(label: str, total: float | None, unit: str, **options: Any) -> "tqdm[Any]":
    """A tqdm bar on a terminal, nothing where stderr is a file or a pipe (a scheduler's log)."""
    from tqdm import tqdm

    return tqdm(total=total, desc=label, unit=unit, disable=None, dynamic_ncols=True, mininterval=0.2, **options)


def byte_progress_bar(label: str, total_bytes: int | None) -> "tqdm[Any]":
    """A progress bar that counts bytes and shows their rate in kB/s, MB/s and so on (powers of 1,000)."""
    return progress_bar(label, total_bytes, "B", unit_scale=True, unit_divisor=1000)
