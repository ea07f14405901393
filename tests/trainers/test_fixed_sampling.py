"""Samples drawn by random keys have the numbers and the distribution of detectron2's `subsample_labels`."""

from __future__ import annotations

import torch
from detectron2.modeling.sampling import subsample_labels
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trainers.speedups.fixed_sampling import sample

ROWS = 20_000


@settings(max_examples=150)
@given(
    labels=st.lists(st.lists(st.sampled_from([-1, 0, 1]), min_size=9, max_size=9), min_size=1, max_size=4),
    num_samples=st.integers(1, 12),
    fraction=st.sampled_from([0.0, 0.25, 0.5, 1.0]),
)
def test_as_many_are_sampled_as_detectron2_samples_objects_first(
    labels: list[list[int]], num_samples: int, fraction: float
) -> None:
    each = torch.tensor(labels)
    samples = sample(each == 1, each == 0, num_samples, fraction)
    assert all(part.shape == (len(labels), num_samples) for part in samples)
    for row, (indices, valid_mask, positive_mask) in zip(each, zip(*samples, strict=True), strict=True):
        objects, background = (len(found) for found in subsample_labels(row, num_samples, fraction, 0))
        assert positive_mask.tolist() == [True] * objects + [False] * (num_samples - objects)
        assert valid_mask.tolist() == [True] * (objects + background) + [False] * (num_samples - objects - background)
        used = indices[valid_mask]
        assert row[used].tolist() == [1] * objects + [0] * background
        assert len(used.unique()) == len(used)
        assert indices.min() >= 0 and indices.max() < 9


def test_every_choice_is_as_likely_as_detectron2s() -> None:
    torch.manual_seed(0)
    labels = torch.tensor([1, 0, -1, 0, 1, 1, 0, 0, 1, -1, 0, 0, 1, 0])  # 5 objects, 7 of background
    each = labels.expand(ROWS, -1)
    samples = sample(each == 1, each == 0, 6, 0.5)
    assert samples.valid_mask.all()
    ours = _chosen(samples.indices, len(labels))
    theirs = _chosen(
        torch.stack([torch.cat(subsample_labels(labels, 6, 0.5, 0)) for _ in range(ROWS // 4)]), len(labels)
    )
    likely = torch.zeros(len(labels))
    likely[labels == 1], likely[labels == 0] = 3 / 5, 3 / 7
    for chosen in (ours, theirs):
        _assert_likely(chosen, likely)
    # Of two boxes of a kind both are chosen in 3 * 2 of 5 * 4, or of 7 * 6, cases; of two kinds independently.
    alike = labels[:, None] == labels
    pairs = torch.where(alike, torch.where(labels == 1, 6 / 20, 6 / 42), likely[:, None] * likely)
    pairs = torch.where((labels == -1) | (labels == -1)[:, None], 0.0, pairs)
    one, other = torch.triu_indices(len(labels), len(labels), 1)
    for chosen in (ours, theirs):
        _assert_likely(chosen[:, one] * chosen[:, other], pairs[one, other])


def _chosen(indices: Tensor, num_boxes: int) -> Tensor:
    return torch.zeros(len(indices), num_boxes).scatter_(1, indices, 1.0)


def _assert_likely(chosen: Tensor, likely: Tensor) -> None:
    """Each column of 0 and 1 has its likelihood, within 4.5 standard deviations of the mean."""
    deviation = (likely * (1 - likely) / len(chosen)).sqrt()
    assert ((chosen.mean(dim=0) - likely).abs() <= 4.5 * deviation).all()
