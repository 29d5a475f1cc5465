"""What tests of several folders share."""

from collections.abc import Iterator

import pytest

from tests.slurm import cluster


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[cluster.Cluster]:
    """A real Slurm, started once; skips where it cannot be."""
    if reason := cluster.cannot_run():
        pytest.skip(reason)
    with cluster.running(tmp_path_factory.mktemp("slurm")) as running:
        yield running
