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

The trap this module protects against: rounding that depends on the run. Every sum has a fixed order. Against detectron2
results differ by rounding, in the fifth digit of the largest value.
"""

from __future__ import annotations

from functools import lru_cache
from types import MethodType
from typing import Any, Literal

import torch
from detectron2.layers import Conv2d
from torch import Tensor, nn
from torch.nn.functional import conv2d, linear, pad

Way = Literal["tiles", "rows", "torch"]

MIN_TILES, FEWEST_CHANNELS, FEWEST_BOTH = 32, 64, 3072
"""Below, and below so many tiles times channels, transforms cost more than they save (measured by layer, AVX2)."""

MAX_ROWS = 128
"""Up to so many results, a product over neighbourhoods is faster than oneDNN (measured likewise)."""

SPARSE = 0.2
"""Share of rows with a gradient up to which only these are multiplied: a row costs four times as much as in tiles."""

# For tiles with so many results a side: what transforms a line of pixels, of weights, and of products into results.
_LINES: dict[int, tuple[list[list[float]], ...]] = {
    3: ([[2, -1, -2, 1, 0], [0, -2, -1, 1, 0], [0, 2, -3, 1, 0], [0, -1, 0, 1, 0], [0, 2, -1, -2, 1]],
        [[1 / 2, 0, 0], [-1 / 2, -1 / 2, -1 / 2], [-1 / 6, 1 / 6, -1 / 6], [1 / 6, 1 / 3, 2 / 3], [0, 0, 1]],
        [[1, 1, 1, 1, 0], [0, 1, -1, 2, 0], [0, 1, 1, 4, 1]]),
    4: ([[4, 0, -5, 0, 1, 0], [0, -4, -4, 1, 1, 0], [0, 4, -4, -1, 1, 0],
         [0, -2, -1, 2, 1, 0], [0, 2, -1, -2, 1, 0], [0, 4, 0, -5, 0, 1]],
        [[1 / 4, 0, 0], [-1 / 6, -1 / 6, -1 / 6], [-1 / 6, 1 / 6, -1 / 6],
         [1 / 24, 1 / 12, 1 / 6], [1 / 24, -1 / 12, 1 / 6], [0, 0, 1]],
        [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]]),
}  # fmt: skip


def _both_ways(part: int) -> dict[int, Tensor]:
    """What does the same to both directions of an image at once: one matrix product transforms a tile's channels."""
    lines = {side: torch.tensor(parts[part], dtype=torch.float64) for side, parts in _LINES.items()}
    return {side: torch.kron(line, line).float() for side, line in lines.items()}


_OF_INPUT, _OF_WEIGHT, _OF_OUTPUT = (_both_ways(part) for part in range(3))


def install(model: nn.Module) -> int:
    """Exchanges how a CPU model's convolutions are computed, in place; checkpoints stay as they are.

    Returns:
        How many convolutions are computed here from now on; 7 x 7, dilated and grouped ones stay torch's.
    """
    found = [module for module in model.modules() if type(module) is Conv2d and _can_compute(module)]
    rpn = getattr(getattr(model, "proposal_generator", None), "rpn_head", None)
    sparse = {id(module) for module in rpn.modules()} if rpn is not None else set()
    for module in found:
        module.sparse_gradient = id(module) in sparse  # type: ignore[assignment]
        module.forward = MethodType(_forward, module)
    return len(found)


def _can_compute(module: Conv2d) -> bool:
    sides = (module.kernel_size, module.padding)
    return (
        sides in (((3, 3), (1, 1)), ((1, 1), (0, 0)))
        and module.stride in ((1, 1), (2, 2))
        and module.dilation == (1, 1)
        and module.groups == 1
        and module.padding_mode == "zeros"
    )


def _forward(self: Conv2d, x: Tensor) -> Tensor:
    """detectron2's `Conv2d.forward`, its convolution computed here."""
    if self.kernel_size == (1, 1):
        x = _one_by_one(x, self.weight, self.bias, self.stride[0])
    else:
        x = three_by_three(x, self.weight, self.bias, self.stride[0], self.sparse_gradient)
    if self.norm is not None:
        x = self.norm(x)
    return x if self.activation is None else self.activation(x)


def _one_by_one(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> Tensor:
    pixels = x.permute(0, 2, 3, 1)[:, ::stride, ::stride]
    return linear(pixels, weight.flatten(1), bias).permute(0, 3, 1, 2)


def three_by_three(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, sparse_gradient: bool) -> Tensor:
    """A convolution with 3 x 3 weights and a border of one zero, by the fastest of three ways.

    Args:
        x: (N, C, H, W) in 32 bits.
        weight: (O, C, 3, 3).
        bias: (O,) or none.
        stride: 1 or 2.
        sparse_gradient: Whether to look for results without a gradient in the backward pass.

    Returns:
        (N, O, H / stride, W / stride), rounded up, in channels-last memory order.
    """
    images, channels, height, width = x.shape
    results = images * -(-height // stride) * -(-width // stride)
    side, fewest = _side(height, width), min(channels, len(weight))
    tiles = images * -(-height // side) * -(-width // side)
    way: Way = "torch"
    if stride == 1 and tiles >= MIN_TILES and fewest >= FEWEST_CHANNELS and tiles * fewest >= FEWEST_BOTH:
        way = "tiles"
    elif 0 < results <= MAX_ROWS:
        way = "rows"
    elif not sparse_gradient:
        return conv2d(x, weight, bias, stride, padding=1)
    found: Tensor = _ThreeByThree.apply(x, weight, bias, stride, way, sparse_gradient)
    return found


class _ThreeByThree(torch.autograd.Function):
    """`three_by_three` by Winograd's tiles, row by row, or by torch."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, way: Way, sparse_gradient: bool
    ) -> Tensor:
        ctx.stride, ctx.way, ctx.sparse_gradient, ctx.has_bias = stride, way, sparse_gradient, bias is not None
        pixels, transformed, tiles = x.permute(0, 2, 3, 1), None, None
        if way == "torch":
            result = conv2d(x, weight, bias, stride, padding=1).permute(0, 2, 3, 1)
        elif way == "rows":
            result = _by_rows(pixels, weight, stride)
        else:
            side = _side(*x.shape[2:])
            transformed, tiles = _of_weight(weight, side), _to_tiles(pixels, side)
            result = _by_tiles(tiles, transformed, pixels.shape, side)
        # Tiles are two to three times the pixels, and of no use where few rows have a gradient.
        ctx.save_for_backward(x, weight, transformed, None if sparse_gradient else tiles)
        if bias is not None and way != "torch":
            result += bias
        return result.permute(0, 3, 1, 2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, transformed, tiles = ctx.saved_tensors
        wants_x: bool = ctx.needs_input_grad[0]
        pixels, of_results = x.permute(0, 2, 3, 1), gradient.permute(0, 2, 3, 1)
        rows = of_results.reshape(-1, len(weight))
        there = (rows != 0).any(1).nonzero()[:, 0] if ctx.sparse_gradient else None
        if ctx.way == "rows" or (there is not None and len(there) <= SPARSE * len(rows)):
            of_x, of_weight = _rows_backward(pixels, weight, rows, ctx.stride, there, wants_x)
        elif ctx.way == "tiles":
            side = _side(*x.shape[2:])
            tiles = _to_tiles(pixels, side) if tiles is None else tiles
            of_x, of_weight = _tiles_backward(tiles, transformed, of_results, side, wants_x)
        else:
            of_x, of_weight, _ = torch.ops.aten.convolution_backward(
                gradient, x, weight, None, [ctx.stride] * 2, [1, 1], [1, 1], False, [0, 0], 1, [wants_x, True, False]
            )
        return of_x, of_weight, rows.sum(0) if ctx.has_bias else None, None, None, None


def _flat(weight: Tensor) -> Tensor:
    """(O, C, 3, 3) weights as (O, 9 C): a view of channels-last weights."""
    return weight.permute(0, 2, 3, 1).flatten(1)


def _unflat(flat: Tensor, weight: Tensor) -> Tensor:
    return flat.view(len(weight), 3, 3, -1).permute(0, 3, 1, 2)


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
    seen = _neighbours(images, height, width, stride)
    results = _rows(pixels)[seen].flatten(1) @ _flat(weight).t()
    return results.view(images, -(-height // stride), -(-width // stride), -1)


def _rows_backward(
    pixels: Tensor, weight: Tensor, gradient: Tensor, stride: int, there: Tensor | None, wants_x: bool
) -> tuple[Tensor | None, Tensor]:
    """Gradients of pixels and weights from the rows `there` of the results' gradient, (results, O)."""
    images, height, width, channels = pixels.shape
    seen, rows = _neighbours(images, height, width, stride), _rows(pixels)
    if there is not None:
        seen, gradient = seen[there], gradient[there]
    of_weight = _unflat(gradient.t() @ rows[seen].flatten(1), weight)
    if not wants_x:
        return None, of_weight
    spread = (gradient @ _flat(weight)).view(-1, channels)
    of_rows = torch.zeros_like(rows).index_add_(0, seen.flatten(), spread)
    of_pixels = of_rows.view(images, height + 2, width + 2, channels)[:, 1:-1, 1:-1]
    return of_pixels.permute(0, 3, 1, 2), of_weight


def _side(height: int, width: int) -> int:
    """Results a side of the tiles that cover a map with the fewest multiplications."""
    return min(_LINES, key=lambda side: -(-height // side) * -(-width // side) * (side + 2) ** 2)


def _transformed(matrix: Tensor, tiles: Tensor) -> Tensor:
    """A matrix (I, J) times each of (T, J, C): a product for each tile, which MKL deals out to all threads.

    As one product with a row for each j it would stay on one thread.
    """
    return torch.bmm(matrix.expand(len(tiles), -1, -1), tiles)


def _to_tiles(pixels: Tensor, side: int) -> Tensor:
    """All overlapping input tiles of (N, H, W, C) pixels, transformed: ((side + 2)^2, tiles, C)."""
    images, height, width, channels = pixels.shape
    down, across, seen = -(-height // side), -(-width // side), side + 2
    padded = pad(pixels, (0, 0, 1, side * across + 1 - width, 1, side * down + 1 - height))
    image, row, column, channel = padded.stride()
    tiles = padded.as_strided(
        (images, down, across, seen, seen, channels), (image, side * row, side * column, row, column, channel)
    )
    return _transformed(_OF_INPUT[side], tiles.reshape(-1, seen**2, channels)).transpose(0, 1)


def _of_weight(weight: Tensor, side: int) -> Tensor:
    """Transformed weights, ((side + 2)^2, O, C)."""
    return _transformed(_OF_WEIGHT[side], _flat(weight).view(len(weight), 9, -1)).transpose(0, 1)


def _by_tiles(tiles: Tensor, weight: Tensor, shape: torch.Size, side: int) -> Tensor:
    """The results, (N, H, W, O), for pixels of a shape (N, H, W, C), from both transformed."""
    images, height, width, _ = shape
    down, across = -(-height // side), -(-width // side)
    products = torch.bmm(tiles, weight.transpose(1, 2))
    results = _transformed(_OF_OUTPUT[side], products.transpose(0, 1)).view(images, down, across, side, side, -1)
    whole = results.transpose(2, 3).reshape(images, side * down, side * across, -1)
    return whole[:, :height, :width]


def _tiles_backward(
    tiles: Tensor, weight: Tensor, gradient: Tensor, side: int, wants_x: bool
) -> tuple[Tensor | None, Tensor]:
    """The transpose of each step of the forward pass, last step first; from transformed pixels and weights."""
    images, height, width, outputs = gradient.shape
    down, across, seen, channels = -(-height // side), -(-width // side), side + 2, weight.shape[2]
    padded = pad(gradient, (0, 0, 0, side * across - width, 0, side * down - height))
    of_results = padded.reshape(images, down, side, across, side, outputs).transpose(2, 3)
    of_products = _transformed(_OF_OUTPUT[side].t(), of_results.reshape(-1, side**2, outputs)).transpose(0, 1)
    of_transformed = torch.bmm(of_products.transpose(1, 2), tiles)
    of_weight = _transformed(_OF_WEIGHT[side].t(), of_transformed.transpose(0, 1))
    of_weight = of_weight.view(outputs, 3, 3, channels).permute(0, 3, 1, 2)
    if not wants_x:
        return None, of_weight
    of_tiles = _transformed(_OF_INPUT[side].t(), torch.bmm(of_products, weight).transpose(0, 1))
    of_tiles = of_tiles.view(images, down, across, seen, seen, channels)
    # A tile's last two rows and columns lie on the next tile's first.
    whole = of_tiles.new_zeros(images, down + 1, side, across + 1, side, channels)
    for i, rows in enumerate(torch.split(of_tiles, side, dim=3)):
        for j, part in enumerate(torch.split(rows, side, dim=4)):
            whole[:, i : i + down, : part.shape[3], j : j + across, : part.shape[4]] += part.transpose(2, 3)
    of_pixels = whole.view(images, side * (down + 1), side * (across + 1), channels)
    return of_pixels[:, 1 : height + 1, 1 : width + 1].permute(0, 3, 1, 2), of_weight
