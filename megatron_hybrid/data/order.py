"""The order of samples: one seeded shuffle of all instances per epoch, which knows nothing of ranks.

OLMo-core's `NumpyFSLDataLoader` with chunk size 1, bit for bit: uint32 numbers of the instances, shuffled by numpy's
PCG64 seeded with seed + epoch (epochs count from 1), what is over a whole number of global batches dropped. Global
batch k of an epoch is positions [k·B, (k+1)·B); Megatron's sampler gives its columns to data-parallel ranks.
"""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_hybrid.data.token_files import DataError
from megatron_hybrid.tools.atomic_file import atomic_open

#: Above this an order is 400 MB in every process: it must lie in a file that the processes of a node share.
MOST_WITHOUT_CACHE = 100_000_000


def shuffled(instances: int, seed: int, epoch: int) -> NDArray[np.uint32]:
    """[instances] uint32, the shuffle of one epoch (from 1). 4 bytes per instance, nothing beside it."""
    order = np.arange(instances, dtype=np.uint32)
    np.random.Generator(np.random.PCG64(seed=seed + epoch)).shuffle(order)
    return order


@contextmanager
def one_at_a_time(path: Path) -> Iterator[None]:
    """A lock beside `path`, so that of the processes that need a file one makes it and the others wait.

    Where the file system has no locks all make it; each writes under a name of its own and renames.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(f"{path.name}.lock"), "wb") as lock:
        with suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _cached(path: Path, make: Callable[[], NDArray[np.uint32]], count: int) -> NDArray[np.uint32]:
    with one_at_a_time(path):
        if not path.is_file():
            with atomic_open(path) as handle:
                handle.write(memoryview(make()).cast("B"))
    if path.stat().st_size != 4 * count:
        raise DataError(f"{path}: {path.stat().st_size} bytes where {count} instances take {4 * count}; remove it")
    return np.memmap(path, mode="r", dtype=np.uint32)


@lru_cache(maxsize=4)  # this epoch's and the next one's, of training and validation
def _epoch(instances: int, seed: int, epoch: int, cache: Path | None) -> NDArray[np.uint32]:
    if cache is None:
        return shuffled(instances, seed, epoch)
    path = cache / f"order-{instances}-seed{seed}-epoch{epoch}.u4"
    return _cached(path, lambda: shuffled(instances, seed, epoch), instances)


@dataclass(frozen=True)
class SampleOrder:
    """Position in training (consumed samples) to the number of an instance, which is the sample's id.

    Attributes:
        instances: in the data.
        batch: global batch size in instances; each epoch's tail that fills no batch is dropped.
        epochs: passes over the data that are allowed.
        shuffle: False keeps the order of the data.
        cache: folder for shuffles, shared by the processes of a node; None keeps them in memory.
    """

    instances: int
    batch: int
    seed: int
    epochs: int = 1
    shuffle: bool = True
    cache: Path | None = None

    def __post_init__(self) -> None:
        if self.instances < self.batch:
            raise DataError(
                f"--global-batch-size {self.batch}: the data has {self.instances} instances, less than one batch; give "
                "more data or a smaller batch"
            )
        if self.instances >= 2**32 - 1:
            raise DataError(f"--instance-data: {self.instances:,} instances; their numbers are uint32: split the data")
        if self.shuffle and self.cache is None and self.instances > MOST_WITHOUT_CACHE:
            raise DataError(
                f"--instance-data: the order of {self.instances:,} instances takes {self.instances * 4e-9:.1f} GB in "
                "each process; give --data-cache-path, a folder that the processes of a node share"
            )

    @property
    def per_epoch(self) -> int:
        """Samples of one epoch."""
        return self.instances // self.batch * self.batch

    def __len__(self) -> int:
        return self.per_epoch * self.epochs

    def ids(self, first: int, count: int) -> NDArray[np.int64]:
        """Ids of the samples at positions [first, first + count).

        Raises:
            DataError: past the epochs that are allowed.
        """
        if not 0 <= first <= first + count <= len(self):
            raise DataError(
                f"samples {first:,} to {first + count:,} of {len(self):,}: the data ends; allow more --instance-epochs"
            )
        parts = [np.zeros(0, dtype=np.int64)]
        while count:
            epoch, start = divmod(first, self.per_epoch)
            stop = min(start + count, self.per_epoch)
            parts.append(self._of_epoch(epoch + 1, start, stop))
            first, count = first + stop - start, count - (stop - start)
        return np.concatenate(parts)

    def ids_of_batch(self, batch: int) -> NDArray[np.int64]:
        """Ids of global batch `batch`, from 0: those that iteration batch + 1 trains on, whatever the layout."""
        return self.ids(batch * self.batch, self.batch)

    def _of_epoch(self, epoch: int, start: int, stop: int) -> NDArray[np.int64]:
        if not self.shuffle:
            return np.arange(start, stop, dtype=np.int64)
        return _epoch(self.instances, self.seed, epoch, self.cache)[start:stop].astype(np.int64)
