"""What a scene is: one or two objects on a background, drawn at random, and which scenes are held out from training."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")
SIZES = ("small", "medium", "large")
LAYOUTS = ("single", "beside", "stacked")
BACKGROUNDS = ("white", "gray", "black", "beige", "navy", "brown")
PATTERNS = ("plain", "striped", "gradient", "checkered")

HELD_OUT_PERCENT = 5
SINGLE_SHARE = 0.3

ATTRIBUTES = {
    "layout": LAYOUTS,
    "shape_1": SHAPES,
    "colour_1": COLOURS,
    "size_1": SIZES,
    "shape_2": SHAPES,
    "colour_2": COLOURS,
    "size_2": SIZES,
    "background": BACKGROUNDS,
    "pattern": PATTERNS,
}
ABSENT = -100  # the label of a second object that is not there; cross-entropy's own ignore index


@dataclass(frozen=True)
class SceneObject:
    """One object; each field is a word of SHAPES, COLOURS or SIZES."""

    shape: str
    colour: str
    size: str


@dataclass(frozen=True)
class Scene:
    """One or two objects, left before right and upper before lower, over a background."""

    objects: tuple[SceneObject, ...]
    layout: str
    background: str
    pattern: str

    def key(self) -> str:
        """Name the specification: equal scenes have equal keys, and the key decides the split."""
        words = [word for item in self.objects for word in (item.size, item.colour, item.shape)]
        return " ".join([self.layout, *words, self.pattern, self.background])


def is_held_out(scene: Scene) -> bool:
    """Say whether the scene's specification belongs to the held-out side, by the hash of its key."""
    digest = hashlib.blake2b(scene.key().encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % 100 < HELD_OUT_PERCENT


def draw_scene(rng: np.random.Generator, *, held_out: bool) -> Scene:
    """Draw a scene from one side of the split; two objects always differ in colour."""
    while True:
        scene = _draw_any(rng)
        if is_held_out(scene) == held_out:
            return scene


def scene_labels(scene: Scene) -> list[int]:
    """Return the index of every attribute in the order of ATTRIBUTES; a missing second object is ABSENT."""
    first = scene.objects[0]
    labels = [LAYOUTS.index(scene.layout), *_object_labels(first)]
    labels += _object_labels(scene.objects[1]) if len(scene.objects) == 2 else [ABSENT] * 3
    return [*labels, BACKGROUNDS.index(scene.background), PATTERNS.index(scene.pattern)]


def scene_from_labels(labels: Sequence[int]) -> Scene:
    """Rebuild the scene whose scene_labels these are."""
    layout, *items, background, pattern = (int(label) for label in labels)
    objects = tuple(
        SceneObject(SHAPES[items[i]], COLOURS[items[i + 1]], SIZES[items[i + 2]]) for i in (0, 3) if items[i] != ABSENT
    )
    return Scene(objects, LAYOUTS[layout], BACKGROUNDS[background], PATTERNS[pattern])


def _object_labels(item: SceneObject) -> list[int]:
    return [SHAPES.index(item.shape), COLOURS.index(item.colour), SIZES.index(item.size)]


def _draw_any(rng: np.random.Generator) -> Scene:
    layout = "single" if rng.random() < SINGLE_SHARE else LAYOUTS[1 + int(rng.integers(2))]
    colours = rng.permutation(len(COLOURS))
    objects = tuple(
        SceneObject(SHAPES[int(rng.integers(6))], COLOURS[int(colours[i])], SIZES[int(rng.integers(3))])
        for i in range(1 if layout == "single" else 2)
    )
    background = BACKGROUNDS[int(rng.integers(len(BACKGROUNDS)))]
    return Scene(objects, layout, background, PATTERNS[int(rng.integers(len(PATTERNS)))])
