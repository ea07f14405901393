"""Takes from the schemas of KubeRay and Kueue what the manifests of cluster/ need: `python -m tests.builders.crds`.

Both projects have the Apache License 2.0. Their files are some megabytes, for the most part descriptions of pods. What
is kept names every field next to one that a manifest uses, and has the type of those with a plain value.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import yaml

from tests.builders.commands import ROOT

SOURCES = {
    "https://github.com/ray-project/kuberay": ("v1.6.2", "ray-operator/config/crd/bases/ray.io_rayjobs.yaml"),
    "https://github.com/kubernetes-sigs/kueue": ("v0.19.2", "config/components/crd/bases/kueue.x-k8s.io_*.yaml"),
}
"""Repository, release and files."""

SHORTENED = Path(__file__).with_name("crds.json")
LEFT_OUT = "left out"
"""`$comment` of what no manifest uses."""

PLAIN = ("type", "enum", "minimum", "maximum", "minLength", "maxLength", "pattern")


def manifests() -> list[dict[str, Any]]:
    """The objects of cluster/ that Kubernetes is given."""
    files = [ROOT / "cluster" / name for name in ("rayjob.yaml", "kueue.yaml")]
    return [each for file in files for each in yaml.safe_load_all(file.read_text())]


def shorten(schema: dict[str, Any], values: list[Any]) -> dict[str, Any]:
    """A schema without what none of some values of it has."""
    if not values and schema.get("type") in ("object", "array"):
        return {"$comment": LEFT_OUT}
    short = {key: schema[key] for key in (*PLAIN, "required") if key in schema}
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]} | {key: short[key] for key in ("pattern",) if key in short}
    if "items" in schema:
        short["items"] = shorten(schema["items"], [item for value in values for item in value])
    if "properties" in schema:
        short["additionalProperties"] = False
        short["properties"] = {
            name: shorten(inner, [value[name] for value in values if name in value])
            for name, inner in sorted(schema["properties"].items())
        }
    elif isinstance(inner := schema.get("additionalProperties"), dict):
        short["additionalProperties"] = shorten(inner, [each for value in values for each in value.values()])
    return short


def main(files: list[str]) -> None:
    """Writes `SHORTENED` from the definitions in some files."""
    given = manifests()
    texts = {"type": "object", "additionalProperties": {"type": "string"}}
    text = {"type": "string"}
    metadata = {"name": text, "namespace": text, "labels": texts, "annotations": texts}
    kinds = {}
    for file in files:
        definition = yaml.load(Path(file).read_text(), Loader=yaml.CSafeLoader)["spec"]
        for version in definition["versions"]:
            kind = f"{definition['group']}/{version['name']} {definition['names']['kind']}"
            if used := [each for each in given if f"{each['apiVersion']} {each['kind']}" == kind]:
                schema = shorten(version["schema"]["openAPIV3Schema"], used)
                schema["properties"]["metadata"] = {
                    "type": "object", "required": ["name"], "additionalProperties": False, "properties": metadata,
                }  # fmt: skip
                kinds[kind] = schema
    document = {"licence": "Apache-2.0", "sources": SOURCES, **kinds}
    lines = [f"{json.dumps(key)}: {json.dumps(value, separators=(',', ':'))}" for key, value in document.items()]
    SHORTENED.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
