"""MLPerf's description of a system (`system_desc_id`.json), from what workers report of their machines.

MLPerf submission rules, "System Description" (github.com/mlcommons/policies, submission_rules.adoc). What is not known
is an empty text, since MLPerf's checker joins the values.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from orchestrator.figures.records import TrialResult
from orchestrator.report.mlperf import SUBMITTER, Division

STATUS = "Research, Development, or Internal (RDI)"
"""MLPerf's word for a system that is neither for sale nor for rent as measured."""

UNKNOWN = (
    "host_processors_per_node", "host_processor_core_count", "host_processor_frequency", "host_processor_caches",
    "host_processor_interconnect", "host_storage_type", "host_storage_capacity", "host_networking",
    "host_networking_topology", "host_memory_configuration", "accelerator_host_interconnect", "accelerator_frequency",
    "accelerator_on-chip_memories", "accelerator_memory_configuration", "accelerator_interconnect",
    "accelerator_interconnect_topology", "cooling",
)  # fmt: skip
"""Fields of the schema that no worker can tell."""


def system_id(trial: TrialResult) -> str:
    """A name for the system of a trial, fit for a file: accelerators or workers, hosts, recipe."""
    device = trial.device_name or trial.device or "unknown"
    hosts = f"_{trial.num_nodes}-hosts" if (trial.num_nodes or 1) > 1 else ""
    name = f"{trial.world_size}x{device}{hosts}_{trial.recipe or 'unknown'}"
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.")


def system_description(known: Mapping[str, Any], trial: TrialResult, division: Division | None) -> dict[str, str]:
    """The fields of MLPerf's schema.

    Args:
        known: What `airank.system_information` gives.
        trial: A trial that ran on the system.
        division: The division of its logs.
    """
    on_gpu = trial.device == "cuda"
    per_node = known["accelerators_per_node"] if on_gpu else 0
    versions = dict(known["software_stack"] or {})
    framework = [
        f"{name} {versions.pop(name)}" for name in ("torch", "detectron2", "sal-detectron2") if name in versions
    ]
    values = {
        "submitter": SUBMITTER,
        "division": division,
        "status": STATUS,
        "system_name": system_id(trial),
        "number_of_nodes": known["number_of_nodes"],
        "host_processor_model_name": known["host_processor_name"],
        "host_processor_vcpu_count": known["host_processor_core_count"],
        "host_memory_capacity": known["host_memory_capacity"],
        "accelerators_per_node": None if per_node is None else f"{per_node:g}",
        "accelerator_model_name": known["accelerator_name"] if on_gpu else None,
        "accelerator_memory_capacity": known["accelerator_memory_capacity"] if on_gpu else None,
        "hw_notes": "An empty field is not known." + ("" if on_gpu else f" {trial.world_size} workers on CPUs."),
        "framework": ", ".join(framework),
        "other_software_stack": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "operating_system": known["operating_system"],
        "sw_notes": f"Recipe {trial.recipe}, precision {known['precision']}.",
    }
    return {name: "" if value is None else str(value) for name, value in {**dict.fromkeys(UNKNOWN), **values}.items()}
