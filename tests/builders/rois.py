"""Feature maps, and boxes of all the kinds that ROIAlign meets."""

import torch
from detectron2.structures import Boxes
from torchvision.ops import roi_align


def boxes(num: int, height: int, width: int, generator: torch.Generator) -> Boxes:
    """Boxes of all sizes; some over the border, outside the image, thinner than a pixel or of no size at all."""
    centre = torch.rand(num, 2, generator=generator) * torch.tensor([width, height]) * 1.2 - 10
    sides = torch.exp(torch.rand(num, 2, generator=generator) * 6 - 0.5)
    corners = torch.cat([centre - sides / 2, centre + sides / 2], dim=1)
    inside = torch.tensor([width, height, width, height])
    clipped = torch.minimum(corners.clamp(min=0), inside)
    corners = torch.where(torch.rand(num, 1, generator=generator) < 0.5, clipped, corners)
    corners[:: max(num // 7, 1), 2:] = corners[:: max(num // 7, 1), :2]
    return Boxes(corners)


def pyramid(batch: int, channels: int, height: int, width: int, levels: int) -> list[torch.Tensor]:
    """Random feature maps of strides 4, 8 and so on."""
    return [
        torch.randn(batch, channels, -(-height // 2**level), -(-width // 2**level)) for level in range(2, 2 + levels)
    ]


def torchvision_pool(
    features: list[torch.Tensor],
    boxes: torch.Tensor,
    image: torch.Tensor,
    level: torch.Tensor,
    scales: list[float],
    output_size: int,
    sampling_ratio: int,
    aligned: bool,
) -> torch.Tensor:
    """What `trainers.speedups.level_pooling.pool` returns, by torchvision's `roi_align` of each level, in 32 bits."""
    pooled = torch.zeros(len(boxes), features[0].shape[1], output_size, output_size)
    rois = torch.cat([image[:, None], boxes], dim=1)
    for number, (maps, scale) in enumerate(zip(features, scales, strict=True)):
        values = roi_align(maps.float(), rois[level == number], output_size, scale, sampling_ratio, aligned)
        pooled = pooled.index_put((level == number,), values)
    return pooled
