"""The cluster that all tests of this folder share; without one they are skipped."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.builds import Site, end_all
from tests.cluster.kit import Cluster, IndexTaken, missing
from tests.workflow.conftest import Project, built, project

__all__ = ["built", "project"]

FOLDER = Path(__file__).parent
INDICES = 150
WORKERS = 30


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    ours = [item for item in items if item.path.is_relative_to(FOLDER)]
    reason = missing() if ours else ""
    for item in ours:
        if reason:
            item.add_marker(pytest.mark.skip(reason=f"NOT TESTED: {reason}"))


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two nodes with 8 GPUs each, of this test process alone."""
    worker = os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")
    first = 1 + int(worker) % WORKERS
    for index in range(first, INDICES + 1, WORKERS):
        cluster = Cluster(tmp_path_factory.mktemp("cluster"), index=index)
        try:
            cluster.start()
            break
        except IndexTaken:  # by another run of the tests
            continue
    else:
        pytest.fail(f"clusters {first}, {first + WORKERS}, ... are all taken")
    yield cluster
    cluster.stop()


@pytest.fixture(autouse=True)
def repaired(request: pytest.FixtureRequest) -> Iterator[None]:
    """After each test: no jobs, no faults."""
    used = "cluster" in request.fixturenames
    cluster = request.getfixturevalue("cluster") if used else None
    yield
    end_all()
    if cluster:
        cluster.repair()


@pytest.fixture
def site(project: Project, cluster: Cluster) -> Site:
    """A copy of the built project, on the cluster."""
    return Site(project, cluster)
