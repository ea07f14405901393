"""Fixtures and hooks of all tests: where the real excerpt is."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.builders.commands import ROOT

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


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The real COCO excerpt (`coco/`) and the seed's logs (`seed_logs/`); use with the `shared` marker."""
    return SHARED
