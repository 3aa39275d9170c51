"""A small comparison, on a cluster of each kind and on this machine."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster.comparison import Comparison, missing, write_settings
from cluster.here import CLUSTERS
from cluster.processes import Processes
from tiny_eval import write_world

REASON = "starts clusters on this machine; `make cluster-test` runs it"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of this folder run if they are asked for, and then not without what they need."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.cluster)
            if "CLUSTER_TESTS" not in os.environ:
                item.add_marker(pytest.mark.skip(reason=REASON))


@pytest.fixture(scope="session", autouse=True)
def prepared() -> None:
    """What is needed is there, and a signal to end ends the clusters as well."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if needed := missing():
        pytest.exit(f"these tests need more than is installed: {needed}", returncode=2)


@pytest.fixture(scope="session")
def settings(tmp_path_factory) -> Path:
    """The comparison's file."""
    return write_settings(write_world(tmp_path_factory.mktemp("world")))


@pytest.fixture(scope="session")
def local(settings, tmp_path_factory) -> Comparison:
    """Finished on this machine."""
    comparison = Comparison(settings, tmp_path_factory.mktemp("local") / "out", "local")
    comparison.finish()
    return comparison


@pytest.fixture(scope="module", params=CLUSTERS)
def engine(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def cluster(engine) -> Iterator[Processes]:
    """Two nodes of one core, where cells of that engine run."""
    with CLUSTERS[engine]() as processes:
        yield processes


@pytest.fixture
def comparison(settings, tmp_path, engine, cluster) -> Comparison:
    """Not begun, in an empty folder."""
    return Comparison(settings, tmp_path / "out", engine)
