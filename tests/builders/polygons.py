"""Random objects of polygons, and boxes around them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

Polygons = list[list[np.ndarray[Any, Any]]]


def shapes(rng: np.random.Generator, num_instances: int, most_polygons: int = 3, most_corners: int = 40) -> Polygons:
    """Ragged instances of one to several polygons, self-crossing ones and ones of whole numbers among them."""
    instances = []
    for _ in range(num_instances):
        polygons = []
        for _ in range(rng.integers(1, most_polygons + 1)):
            corners = rng.uniform(0, 300, 2) + rng.normal(
                0, rng.choice([1, 30, 120]), (rng.integers(3, most_corners), 2)
            )
            polygons.append((corners.round() if rng.random() < 0.2 else corners).ravel())
        instances.append(polygons)
    return instances


def boxes_around(polygons: Polygons, rng: np.random.Generator) -> Tensor:
    """Proposals near, within and outside the instances, some of them thinner than a tenth of a pixel."""
    rows = []
    for instance in polygons:
        points = np.concatenate(instance).reshape(-1, 2)
        low, high = points.min(0) + rng.normal(0, 8, 2), points.max(0) + rng.normal(0, 8, 2)
        if rng.random() < 0.1:
            high = low + rng.choice([0.0, 0.05, 0.1, 0.2], 2)
        rows.append([*low, *np.maximum(low, high)])
    return torch.tensor(np.array(rows).reshape(-1, 4), dtype=torch.float32)


def as_edges(images: list[Polygons], max_objects: int, max_edges: int) -> tuple[Tensor, Tensor, Tensor]:
    """`edges`, `edge_polygon` and `first_edge` of a `PaddedBatch` of these images."""
    edges = torch.zeros(len(images), max_edges, 4, dtype=torch.float64)
    edge_polygon = torch.zeros(len(images), max_edges, dtype=torch.int32)
    first_edge = torch.zeros(len(images), max_objects + 1, dtype=torch.int32)
    for n, instances in enumerate(images):
        position = number = 0
        for i, polygons in enumerate(instances):
            for polygon in polygons:
                corners = torch.from_numpy(polygon).view(-1, 2)
                rows = slice(position, position + len(corners))
                edges[n, rows] = torch.cat([corners, corners.roll(-1, 0)], dim=1)
                edge_polygon[n, rows] = number
                position, number = position + len(corners), number + 1
            first_edge[n, i + 1 :] = position
    return edges, edge_polygon, first_edge
