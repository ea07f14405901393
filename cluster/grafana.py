"""A dashboard for Grafana of the figures of running trials: `python -m cluster.grafana` writes its file again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from orchestrator.figures.catalog import FIGURES
from orchestrator.figures.gauges import GAUGES, TAGS

DASHBOARD = Path(__file__).with_name("grafana_dashboard.json")
"""The dashboard, which Grafana reads."""

SOURCE = "${datasource}"
"""Variable of the dashboard for the Prometheus that scrapes the cluster's nodes, as in Ray's own dashboards."""

WIDTH, HEIGHT, COLUMNS = 8, 7, 3
"""Size of a panel on Grafana's grid of 24 columns, and panels in a row."""

UNITS = {"_seconds": "s", "_bytes": "bytes", "_ratio": "percentunit"}
"""Grafana's units by the end of a gauge's name."""


def dashboard() -> dict[str, Any]:
    """The dashboard: a panel for each gauge, and variables that choose the experiment, the run and its trials."""
    first = "ray_" + next(iter(GAUGES.values()))
    source = {
        "name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus", "refresh": 1,
    }  # fmt: skip
    return {
        "uid": "detectron2-benchmark",
        "title": "detectron2 benchmark",
        "tags": ["ray", "detectron2"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": [source, *(_variable(first, tag, TAGS[:number]) for number, tag in enumerate(TAGS))]},
        "panels": [_panel(number, key, name) for number, (key, name) in enumerate(GAUGES.items())],
    }


def _variable(metric: str, tag: str, before: tuple[str, ...]) -> dict[str, Any]:
    query = f"label_values({metric}{{{_chosen(before)}}}, {tag})"
    return {
        "name": tag, "type": "query", "datasource": {"type": "prometheus", "uid": SOURCE}, "definition": query,
        "query": {"query": query, "refId": "A"}, "refresh": 2, "includeAll": True, "multi": True, "allValue": ".*",
        "current": {"text": ["All"], "value": ["$__all"]},
    }  # fmt: skip


def _panel(number: int, key: str, name: str) -> dict[str, Any]:
    figure, source = FIGURES[key], {"type": "prometheus", "uid": SOURCE}
    # A driver that goes on with a run is another process, which has the same series under another label.
    query = f"max by ({', '.join(TAGS)}) (ray_{name}{{{_chosen(TAGS)}}})"
    unit = next((unit for end, unit in UNITS.items() if name.endswith(end)), "short")
    return {
        "id": number + 1, "type": "timeseries", "title": figure.heading, "description": figure.definition,
        "datasource": source,
        "gridPos": {"x": number % COLUMNS * WIDTH, "y": number // COLUMNS * HEIGHT, "w": WIDTH, "h": HEIGHT},
        "fieldConfig": {"defaults": {"unit": unit, "custom": {"fillOpacity": 0, "spanNulls": False}}, "overrides": []},
        "targets": [{"refId": "A", "datasource": source, "expr": query, "legendFormat": "{{experiment}} {{trial}}"}],
    }  # fmt: skip


def _chosen(tags: tuple[str, ...]) -> str:
    return ", ".join(f'{tag}=~"${tag}"' for tag in tags)


if __name__ == "__main__":
    DASHBOARD.write_text(json.dumps(dashboard(), indent=1) + "\n", encoding="utf-8")
