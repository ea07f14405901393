"""Convolutions on the CPU with fewer multiplications: Winograd, matrix products, and sparse gradients.

oneDNN has no Winograd kernel for training on CPUs with AVX2, and its backward pass runs at a fifth of the processor's
speed on large maps. Here, on channels-last maps, where a pixel's channels are a row of a matrix:

- 3 x 3 with stride 1: Winograd's F(4 x 4, 3 x 3) or F(3 x 3, 3 x 3), a quarter or a third of the multiplications,
  forward and backward. Construction and the matrices of the first: Lavin and Gray, "Fast Algorithms for Convolutional
  Neural Networks" (2015), section 4; those of the second by the points 0, 1, -1, 2 and infinity.
- 3 x 3 on maps of a few pixels: one matrix product over the pixels' neighbourhoods.
- 1 x 1: one matrix product, without a copy.
- The backward pass of the RPN's convolution: only the sampled anchors have a loss, so nearly all rows of its gradient
  are zero, and the product over the others is the whole gradient.

Every sum has a fixed order, so the same batch gives the same gradients. Against detectron2 results differ by rounding,
in the fifth digit of the largest value.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Literal

import torch
from detectron2.layers import Conv2d
from torch import Tensor
from torch.nn.functional import conv2d, linear, pad

Method = Literal["tiles", "rows", "torch"]

MIN_TILES, MIN_CHANNELS, MIN_TILES_TIMES_CHANNELS = 32, 64, 3072
"""Below any of these, transforms cost more than they save (measured by layer, AVX2)."""
MAX_ROWS = 128
"""Up to so many results, a product over neighbourhoods is faster than oneDNN (measured likewise)."""
MAX_SPARSE_SHARE = 0.2
"""Share of rows with a gradient up to which only these are multiplied: a row costs four times as much as in tiles."""

# For tiles with so many results a side: what transforms a line of pixels, of weights, and of products into results.
_TRANSFORMS_1D: dict[int, tuple[list[list[float]], ...]] = {
    3: ([[2, -1, -2, 1, 0], [0, -2, -1, 1, 0], [0, 2, -3, 1, 0], [0, -1, 0, 1, 0], [0, 2, -1, -2, 1]],
        [[1 / 2, 0, 0], [-1 / 2, -1 / 2, -1 / 2], [-1 / 6, 1 / 6, -1 / 6], [1 / 6, 1 / 3, 2 / 3], [0, 0, 1]],
        [[1, 1, 1, 1, 0], [0, 1, -1, 2, 0], [0, 1, 1, 4, 1]]),
    4: ([[4, 0, -5, 0, 1, 0], [0, -4, -4, 1, 1, 0], [0, 4, -4, -1, 1, 0],
         [0, -2, -1, 2, 1, 0], [0, 2, -1, -2, 1, 0], [0, 4, 0, -5, 0, 1]],
        [[1 / 4, 0, 0], [-1 / 6, -1 / 6, -1 / 6], [-1 / 6, 1 / 6, -1 / 6],
         [1 / 24, 1 / 12, 1 / 6], [1 / 24, -1 / 12, 1 / 6], [0, 0, 1]],
        [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]]),
}  # fmt: skip


def _transform_2d(part: int) -> dict[int, Tensor]:
    """What does the same to both directions of an image at once: one matrix product transforms a tile's channels."""
    lines = {side: torch.tensor(parts[part], dtype=torch.float64) for side, parts in _TRANSFORMS_1D.items()}
    return {side: torch.kron(line, line).float() for side, line in lines.items()}


_INPUT_TRANSFORM, _WEIGHT_TRANSFORM, _OUTPUT_TRANSFORM = (_transform_2d(part) for part in range(3))


class WinogradConv2d(Conv2d):
    """detectron2's `Conv2d` with weights of 3 x 3 or 1 x 1, on channels-last maps of a CPU in 32 bits."""

    sparse_gradient = False

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) convolved, normalized and activated."""
        stride = self.stride[0]
        if self.kernel_size == (1, 1):
            pixels = x.permute(0, 2, 3, 1)[:, ::stride, ::stride]
            x = linear(pixels, self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)
        else:
            x = three_by_three(x, self.weight, self.bias, stride, self.sparse_gradient)
        if self.norm is not None:
            x = self.norm(x)
        return x if self.activation is None else self.activation(x)


class SparseGradientConv2d(WinogradConv2d):
    """The RPN's convolution: only the sampled anchors have a loss."""

    sparse_gradient = True


def winograd_conv(name: str, conv: Conv2d) -> type[Conv2d] | None:
    """The class that computes a convolution's results; None for 7 x 7, dilated, grouped and unpadded ones."""
    if (
        (conv.kernel_size, conv.padding) not in (((3, 3), (1, 1)), ((1, 1), (0, 0)))
        or conv.stride not in ((1, 1), (2, 2))
        or conv.dilation != (1, 1)
        or conv.groups != 1
        or conv.padding_mode != "zeros"
    ):
        return None
    return SparseGradientConv2d if name.startswith("proposal_generator.rpn_head.") else WinogradConv2d


def three_by_three(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, sparse_gradient: bool) -> Tensor:
    """A convolution with 3 x 3 weights and a border of one zero, by the fastest of three methods.

    `x` is (N, C, H, W) in 32 bits, `weight` (O, C, 3, 3), `stride` 1 or 2; `sparse_gradient` says whether to look for
    results without a gradient in the backward pass.

    Returns:
        (N, O, H / stride, W / stride), rounded up, in channels-last memory order.
    """
    images, channels, height, width = x.shape
    results = images * -(-height // stride) * -(-width // stride)
    side, channels = _side(height, width), min(channels, len(weight))
    tiles = images * -(-height // side) * -(-width // side)
    enough = tiles >= MIN_TILES and channels >= MIN_CHANNELS and tiles * channels >= MIN_TILES_TIMES_CHANNELS
    method: Method = "torch"
    if stride == 1 and enough:
        method = "tiles"
    elif 0 < results <= MAX_ROWS:
        method = "rows"
    elif not sparse_gradient:
        return conv2d(x, weight, bias, stride, padding=1)
    result: Tensor = _ThreeByThree.apply(x, weight, bias, stride, method, sparse_gradient)
    return result


class _ThreeByThree(torch.autograd.Function):
    """`three_by_three` by Winograd's tiles, row by row, or by torch."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, method: Method, sparse_gradient: bool
    ) -> Tensor:
        ctx.stride, ctx.method, ctx.sparse_gradient, ctx.has_bias = stride, method, sparse_gradient, bias is not None
        pixels, transformed, tiles = x.permute(0, 2, 3, 1), None, None
        if method == "torch":
            result = conv2d(x, weight, bias, stride, padding=1).permute(0, 2, 3, 1)
        elif method == "rows":
            result = _by_rows(pixels, weight, stride)
        else:
            side = _side(*x.shape[2:])
            transformed = _transformed(_WEIGHT_TRANSFORM[side], _flat(weight).view(len(weight), 9, -1)).transpose(0, 1)
            tiles = _to_tiles(pixels, side)
            result = _by_tiles(tiles, transformed, pixels.shape, side)
        # Tiles are two to three times the pixels, and of no use where few rows have a gradient.
        ctx.save_for_backward(x, weight, transformed, None if sparse_gradient else tiles)
        if bias is not None and method != "torch":
            result += bias
        return result.permute(0, 3, 1, 2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, transformed, tiles = ctx.saved_tensors
        needs_x: bool = ctx.needs_input_grad[0]
        pixels, grad_results = x.permute(0, 2, 3, 1), gradient.permute(0, 2, 3, 1)
        rows = grad_results.reshape(-1, len(weight))
        nonzero = (rows != 0).any(1).nonzero()[:, 0] if ctx.sparse_gradient else None
        if ctx.method == "rows" or (nonzero is not None and len(nonzero) <= MAX_SPARSE_SHARE * len(rows)):
            grad_x, grad_weight = _rows_backward(pixels, weight, rows, ctx.stride, nonzero, needs_x)
        elif ctx.method == "tiles":
            side = _side(*x.shape[2:])
            tiles = _to_tiles(pixels, side) if tiles is None else tiles
            grad_x, grad_weight = _tiles_backward(tiles, transformed, grad_results, side, needs_x)
        else:
            grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
                gradient, x, weight, None, [ctx.stride] * 2, [1, 1], [1, 1], False, [0, 0], 1, [needs_x, True, False]
            )
        return grad_x, grad_weight, rows.sum(0) if ctx.has_bias else None, None, None, None


def _flat(weight: Tensor) -> Tensor:
    """(O, C, 3, 3) weights as (O, 9 C): a view of channels-last weights."""
    return weight.permute(0, 2, 3, 1).flatten(1)


def _rows(pixels: Tensor) -> Tensor:
    """The pixels and a border of one zero as rows of channels."""
    return pad(pixels, (0, 0, 1, 1, 1, 1)).flatten(0, 2)


@lru_cache(maxsize=16)
def _neighbours(images: int, height: int, width: int, stride: int) -> Tensor:
    """For each result the nine rows of `_rows` that it is made from, (results, 9)."""
    number = torch.arange(images * (height + 2) * (width + 2)).view(images, height + 2, width + 2)
    first = number[:, :height:stride, :width:stride].reshape(-1, 1)
    return first + number[0, :3, :3].reshape(1, 9)


def _by_rows(pixels: Tensor, weight: Tensor, stride: int) -> Tensor:
    """The results, (N, H / stride, W / stride, O)."""
    images, height, width, _ = pixels.shape
    neighbours = _neighbours(images, height, width, stride)
    results = _rows(pixels)[neighbours].flatten(1) @ _flat(weight).t()
    return results.view(images, -(-height // stride), -(-width // stride), -1)


def _rows_backward(
    pixels: Tensor, weight: Tensor, gradient: Tensor, stride: int, nonzero: Tensor | None, needs_x: bool
) -> tuple[Tensor | None, Tensor]:
    """Gradients of pixels and weights from the results' gradient, (results, O), or its rows `nonzero`."""
    images, height, width, channels = pixels.shape
    neighbours, rows = _neighbours(images, height, width, stride), _rows(pixels)
    if nonzero is not None:
        neighbours, gradient = neighbours[nonzero], gradient[nonzero]
    grad_weight = (gradient.t() @ rows[neighbours].flatten(1)).view(-1, 3, 3, channels).permute(0, 3, 1, 2)
    if not needs_x:
        return None, grad_weight
    spread = (gradient @ _flat(weight)).view(-1, channels)
    grad_rows = torch.zeros_like(rows).index_add_(0, neighbours.flatten(), spread)
    grad_pixels = grad_rows.view(images, height + 2, width + 2, channels)[:, 1:-1, 1:-1]
    return grad_pixels.permute(0, 3, 1, 2), grad_weight


def _side(height: int, width: int) -> int:
    """Results a side of the tiles that cover a map with the fewest multiplications."""
    return min(_TRANSFORMS_1D, key=lambda side: -(-height // side) * -(-width // side) * (side + 2) ** 2)


def _transformed(matrix: Tensor, tiles: Tensor) -> Tensor:
    """A matrix (I, J) times each of (T, J, C): MKL deals these out to all threads; one large product stays on one."""
    return torch.bmm(matrix.expand(len(tiles), -1, -1), tiles)


def _to_tiles(pixels: Tensor, side: int) -> Tensor:
    """All overlapping input tiles of (N, H, W, C) pixels, transformed: ((side + 2)^2, tiles, C)."""
    images, height, width, channels = pixels.shape
    down, across, window = -(-height // side), -(-width // side), side + 2
    padded = pad(pixels, (0, 0, 1, side * across + 1 - width, 1, side * down + 1 - height))
    image, row, column, channel = padded.stride()
    tiles = padded.as_strided(
        (images, down, across, window, window, channels), (image, side * row, side * column, row, column, channel)
    )
    return _transformed(_INPUT_TRANSFORM[side], tiles.reshape(-1, window**2, channels)).transpose(0, 1)


def _by_tiles(tiles: Tensor, weight: Tensor, shape: torch.Size, side: int) -> Tensor:
    """The results, (N, H, W, O), for pixels of a shape (N, H, W, C), from both transformed."""
    images, height, width, _ = shape
    down, across = -(-height // side), -(-width // side)
    products = torch.bmm(tiles, weight.transpose(1, 2))
    results = _transformed(_OUTPUT_TRANSFORM[side], products.transpose(0, 1)).view(images, down, across, side, side, -1)
    whole = results.transpose(2, 3).reshape(images, side * down, side * across, -1)
    return whole[:, :height, :width]


def _tiles_backward(
    tiles: Tensor, weight: Tensor, gradient: Tensor, side: int, needs_x: bool
) -> tuple[Tensor | None, Tensor]:
    """The transpose of each step of the forward pass, last step first; from transformed pixels and weights."""
    images, height, width, outputs = gradient.shape
    down, across, window, channels = -(-height // side), -(-width // side), side + 2, weight.shape[2]
    padded = pad(gradient, (0, 0, 0, side * across - width, 0, side * down - height))
    grad_results = padded.reshape(images, down, side, across, side, outputs).transpose(2, 3)
    grad_results = grad_results.reshape(-1, side**2, outputs)
    grad_products = _transformed(_OUTPUT_TRANSFORM[side].t(), grad_results).transpose(0, 1)
    grad_transformed = torch.bmm(grad_products.transpose(1, 2), tiles)
    grad_weight = _transformed(_WEIGHT_TRANSFORM[side].t(), grad_transformed.transpose(0, 1))
    grad_weight = grad_weight.view(outputs, 3, 3, channels).permute(0, 3, 1, 2)
    if not needs_x:
        return None, grad_weight
    grad_tiles = _transformed(_INPUT_TRANSFORM[side].t(), torch.bmm(grad_products, weight).transpose(0, 1))
    grad_tiles = grad_tiles.view(images, down, across, window, window, channels)
    # A tile's last two rows and columns lie on the next tile's first.
    whole = grad_tiles.new_zeros(images, down + 1, side, across + 1, side, channels)
    for i, rows in enumerate(torch.split(grad_tiles, side, dim=3)):
        for j, part in enumerate(torch.split(rows, side, dim=4)):
            whole[:, i : i + down, : part.shape[3], j : j + across, : part.shape[4]] += part.transpose(2, 3)
    grad_pixels = whole.view(images, side * (down + 1), side * (across + 1), channels)
    return grad_pixels[:, 1 : height + 1, 1 : width + 1].permute(0, 3, 1, 2), grad_weight
