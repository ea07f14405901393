"""Fixtures and hooks of all tests: where the real excerpt is, and what holds for every run that they track."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.builders.commands import ROOT
from tests.builders.metric_rows import repeated_points

# Examples may take as long as they do on a busy machine.
settings.register_profile("any-speed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any-speed")

SHARED = ROOT.parent / "shared" / "data"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not SHARED.is_dir():
        skip = pytest.mark.skip(reason=f"{SHARED} (the real COCO excerpt and the seed's logs) is not on this machine")
        for item in items:
            if "shared" in item.keywords:
                item.add_marker(skip)


@pytest.fixture(scope="session", autouse=True)
def _one_point_per_step(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Fails the last test where a store that any of them wrote has a metric twice at one step of a run."""
    yield
    stores = [path for path in tmp_path_factory.getbasetemp().rglob("*.db") if path.is_file()]
    assert {str(path): found for path in stores if (found := repeated_points(path))} == {}


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The real COCO excerpt (`coco/`) and the seed's logs (`seed_logs/`); use with the `shared` marker."""
    return SHARED
