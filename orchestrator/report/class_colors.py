"""Colours of classes: far apart for the eye, and mostly the same for a name whatever the other classes are."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from itertools import product

import numpy as np
from numpy.typing import NDArray

Color = tuple[int, int, int]
"""Red, green and blue, 0–255."""

LEVELS = (20, 52, 84, 116, 148, 180, 212, 244)
"""Of each channel."""

MIN_LIGHTNESS, MAX_LIGHTNESS, MIN_CHROMA = 0.5, 0.9, 0.12
"""In OKLab, 0–1: neither black, white nor grey, which photos are full of."""

WIDEST_DISTANCE, NARROWEST_DISTANCE = 0.2, 0.02
"""Distances in OKLab between two classes that are tried: 0.2 is red from orange, 0.02 can just be seen."""


def class_colors(names: Iterable[str]) -> dict[str, Color]:
    """A colour for each name.

    A name prefers the colour that its letters choose. Where that is close to another class's, it takes the next one
    that is far enough; with many classes, less far is enough.
    """
    candidates = _candidates()
    places = _oklab(candidates)
    free = np.full(len(candidates), np.inf)  # distance of each candidate to the nearest colour that is taken
    chosen: dict[str, Color] = {}
    for name in sorted(set(names)):
        preferred = zlib.crc32(name.encode(errors="surrogatepass")) % len(candidates)
        order = (np.arange(len(candidates)) + preferred) % len(candidates)
        distance = WIDEST_DISTANCE
        while not (fits := free[order] >= distance).any() and distance > NARROWEST_DISTANCE:
            distance *= 0.85
        index = order[int(fits.argmax())]
        red, green, blue = (int(value) for value in candidates[index])
        chosen[name] = (red, green, blue)
        free = np.minimum(free, np.linalg.norm(places - places[index], axis=1))
    return chosen


def _candidates() -> NDArray[np.int64]:
    colors = np.array(list(product(LEVELS, repeat=3)))
    lab = _oklab(colors)
    chroma = np.hypot(lab[:, 1], lab[:, 2])
    return colors[(lab[:, 0] >= MIN_LIGHTNESS) & (lab[:, 0] <= MAX_LIGHTNESS) & (chroma >= MIN_CHROMA)]


def _oklab(colors: NDArray[np.int64]) -> NDArray[np.float64]:
    """Björn Ottosson's perceptual colour space (https://bottosson.github.io/posts/oklab), rows of lightness, a, b."""
    srgb = colors / 255
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    to_cones = [[0.4122214708, 0.5363325363, 0.0514459929], [0.2119034982, 0.6806995451, 0.1073969566],
                [0.0883024619, 0.2817188376, 0.6299787005]]  # fmt: skip
    to_lab = [[0.2104542553, 0.7936177850, -0.0040720468], [1.9779984951, -2.4285922050, 0.4505937099],
              [0.0259040371, 0.7827717662, -0.8086757660]]  # fmt: skip
    lab: NDArray[np.float64] = np.cbrt(linear @ np.array(to_cones).T) @ np.array(to_lab).T
    return lab
