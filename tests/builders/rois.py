"""Feature maps, and boxes of all the kinds that ROIAlign meets."""

import torch
from detectron2.structures import Boxes


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
