"""Files that appear whole or not at all: a temporary name in the same folder, fsync, then rename."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


def temporary_path(final: Path) -> Path:
    """The name `final` is written under until it is complete; told apart by host and process."""
    return final.with_name(f"{final.name}.tmp.{socket.gethostname()}.{os.getpid()}")


def flush_to_disk(handle: BinaryIO) -> None:
    """Pushes what was written to `handle` through Python's and the kernel's buffers to the disk."""
    handle.flush()
    os.fsync(handle.fileno())


def fsync_folder(folder: Path) -> None:
    """Makes renames and removals inside `folder` survive a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_open(final: Path) -> Iterator[BinaryIO]:
    """Opens a temporary file for writing bytes; renames it to `final` only if the block succeeds.

    The parent folder is made if it is missing. If the block raises, the temporary file is removed
    and an earlier file called `final` stays as it was.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(final)
    try:
        with open(temporary, "wb") as handle:
            yield handle
            flush_to_disk(handle)
        os.replace(temporary, final)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_folder(final.parent)
