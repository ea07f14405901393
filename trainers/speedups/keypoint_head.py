"""A keypoint head for models whose weights, or whose pooled features, are in the channels-last format."""

from __future__ import annotations

from detectron2.modeling.roi_heads.keypoint_head import KRCNNConvDeconvUpsampleHead
from torch import Tensor


class ContiguousKeypointHead(KRCNNConvDeconvUpsampleHead):
    """detectron2's, with its heatmaps in the order in memory in which its loss views them."""

    def layers(self, x: Tensor) -> Tensor:
        """Heatmaps (N, K, S, S) of pooled features."""
        heatmaps: Tensor = super().layers(x)
        return heatmaps.contiguous()
