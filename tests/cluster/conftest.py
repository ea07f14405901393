"""The cluster of several hosts that the tests of this folder share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.builders.cluster import ClusterOfHosts
from tests.builders.hosts import Network, why_not


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterOfHosts]:
    if reason := why_not():
        pytest.skip(reason)
    with Network() as network:
        yield ClusterOfHosts(network, tmp_path_factory.mktemp("cluster"))
