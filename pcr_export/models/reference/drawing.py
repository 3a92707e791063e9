"""Draw a scene as a picture of 64 x 64 pixels with signed distances, so that edges are anti-aliased."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from pcr_export.models.reference.scenes import Scene, SceneObject

PIXELS = 64
CELL = 8  # width of a stripe and of a checker, in pixels
RADII = {"small": 7.5, "medium": 10.5, "large": 14.5}  # pixels
OFFSET = 15.5  # from the centre of the picture to the centre of each of two objects, in pixels
INK = {
    "red": (222, 36, 36),
    "orange": (248, 140, 24),
    "yellow": (248, 224, 48),
    "green": (36, 164, 68),
    "cyan": (56, 208, 220),
    "blue": (40, 84, 224),
    "purple": (136, 52, 192),
    "pink": (248, 140, 196),
}
PAPER = {
    "white": ((244, 244, 244), (206, 206, 206)),
    "gray": ((156, 156, 156), (118, 118, 118)),
    "black": ((20, 20, 20), (62, 62, 62)),
    "beige": ((226, 206, 170), (188, 166, 128)),
    "navy": ((24, 32, 92), (58, 68, 132)),
    "brown": ((98, 62, 40), (136, 98, 72)),
}

Plane = npt.NDArray[Any]  # floating [64, 64]


def draw_picture(scene: Scene, rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """Draw the scene: uint8 [64, 64, 3]. The generator moves every object by up to 2.5 pixels and scales it by up to 4 %."""
    canvas = _background(scene.background, scene.pattern)
    for item, (x, y) in zip(scene.objects, _centres(scene.layout), strict=True):
        dx, dy, stretch = rng.uniform(-1, 1, 3)
        _stamp(canvas, item, (x + 2.5 * dx, y + 2.5 * dy), RADII[item.size] * (1 + 0.04 * stretch))
    return np.clip(canvas + 0.5, 0, 255).astype(np.uint8)


def _centres(layout: str) -> list[tuple[float, float]]:
    middle = PIXELS / 2
    if layout == "single":
        return [(middle, middle)]
    if layout == "beside":
        return [(middle - OFFSET, middle), (middle + OFFSET, middle)]
    return [(middle, middle - OFFSET), (middle, middle + OFFSET)]


def _background(colour: str, pattern: str) -> Plane:
    first, second = (np.asarray(shade, np.float32) for shade in PAPER[colour])
    rows, columns = np.mgrid[0:PIXELS, 0:PIXELS]
    share = {
        "plain": np.zeros((PIXELS, PIXELS)),
        "striped": rows // CELL % 2,
        "gradient": 1.6 * rows / (PIXELS - 1) - 0.3,
        "checkered": (rows // CELL + columns // CELL) % 2,
    }[pattern].astype(np.float32)[..., None]
    return first + share * (second - first)


def _stamp(canvas: Plane, item: SceneObject, centre: tuple[float, float], radius: float) -> None:
    rows, columns = np.mgrid[0:PIXELS, 0:PIXELS].astype(np.float32) + 0.5
    distance = DISTANCES[item.shape](columns - centre[0], rows - centre[1], radius)
    cover = np.clip(0.5 - distance, 0, 1)[..., None]
    canvas += cover * (np.asarray(INK[item.colour], np.float32) - canvas)


def _circle(x: Plane, y: Plane, radius: float) -> Plane:
    return np.hypot(x, y) - radius


def _square(x: Plane, y: Plane, radius: float) -> Plane:
    return np.maximum(abs(x), abs(y)) - 0.86 * radius


def _triangle(x: Plane, y: Plane, radius: float) -> Plane:
    """Intersect three half-planes; the tip points up and the figure is centred by its height."""
    y = y - 0.22 * radius
    side = 0.866 * abs(x) - 0.5 * y
    return np.maximum(side, y) - 0.56 * radius


def _star(x: Plane, y: Plane, radius: float) -> Plane:
    """Fold the plane into one half-arm of five, then measure to the line from the tip to the notch."""
    sector = 2 * np.pi / 5
    angle = np.arctan2(x, -y)
    angle = abs(angle - sector * np.round(angle / sector))
    length = np.hypot(x, y)
    tip, notch = 1.12 * radius, 0.46 * radius
    edge = np.array([notch * np.cos(sector / 2) - tip, notch * np.sin(sector / 2)])
    normal = np.array([edge[1], -edge[0]]) / np.hypot(*edge)
    return (length * np.cos(angle) - tip) * normal[0] + length * np.sin(angle) * normal[1]


def _cross(x: Plane, y: Plane, radius: float) -> Plane:
    long, short = np.maximum(abs(x), abs(y)), np.minimum(abs(x), abs(y))
    return np.maximum(long - radius, short - 0.33 * radius)


def _ring(x: Plane, y: Plane, radius: float) -> Plane:
    return abs(np.hypot(x, y) - 0.76 * radius) - 0.24 * radius


DISTANCES: dict[str, Callable[[Plane, Plane, float], Plane]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "cross": _cross,
    "ring": _ring,
}
