"""The drawing is deterministic, the split is disjoint, and the labels say everything."""

from __future__ import annotations

import numpy as np
import pytest

from pcr_export.models.reference.drawing import PIXELS, draw_picture
from pcr_export.models.reference.scenes import (
    ABSENT,
    ATTRIBUTES,
    HELD_OUT_PERCENT,
    SHAPES,
    Scene,
    SceneObject,
    draw_scene,
    is_held_out,
    scene_from_labels,
    scene_labels,
)


def draw_many(count: int, *, held_out: bool) -> list[Scene]:
    rng = np.random.default_rng(5)
    return [draw_scene(rng, held_out=held_out) for _ in range(count)]


def test_one_seed_draws_one_picture() -> None:
    scene = draw_many(1, held_out=False)[0]
    first, again, other = (draw_picture(scene, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert first.dtype == np.uint8
    assert first.shape == (PIXELS, PIXELS, 3)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_the_two_sides_share_no_scene() -> None:
    train = {scene.key() for scene in draw_many(2000, held_out=False)}
    held_out = {scene.key() for scene in draw_many(500, held_out=True)}
    assert train.isdisjoint(held_out)


def test_about_five_percent_are_held_out() -> None:
    rng = np.random.default_rng(6)
    scenes = [
        Scene(
            (SceneObject(SHAPES[i % 6], "red", "small"), SceneObject("star", "blue", "large")), layout, paper, pattern
        )
        for i in range(6)
        for layout in ("beside", "stacked")
        for paper in ATTRIBUTES["background"]
        for pattern in ATTRIBUTES["pattern"]
    ]
    scenes += [draw_scene(rng, held_out=False) for _ in range(10)]
    share = 100 * sum(is_held_out(scene) for scene in scenes) / len(scenes)
    assert share == pytest.approx(HELD_OUT_PERCENT, abs=5)


def test_labels_and_scenes_translate_both_ways() -> None:
    for scene in draw_many(200, held_out=True):
        labels = scene_labels(scene)
        assert len(labels) == len(ATTRIBUTES)
        assert (labels[4] == ABSENT) == (len(scene.objects) == 1)
        assert scene_from_labels(labels) == scene


def test_two_objects_differ_in_colour() -> None:
    pairs = [scene.objects for scene in draw_many(300, held_out=False) if len(scene.objects) == 2]
    assert pairs
    assert all(first.colour != second.colour for first, second in pairs)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_is_drawn_in_its_colour_and_unlike_the_others(shape: str) -> None:
    def picture(name: str) -> np.ndarray:
        scene = Scene((SceneObject(name, "red", "large"),), "single", "white", "plain")
        return draw_picture(scene, np.random.default_rng(3)).astype(int)

    ink = (abs(picture(shape) - (222, 36, 36)).max(-1) < 10).mean()
    assert 0.04 < ink < 0.25  # share of the picture
    for other in set(SHAPES) - {shape}:
        assert (abs(picture(shape) - picture(other)).max(-1) > 50).mean() > 0.015


def test_objects_stand_where_the_layout_says() -> None:
    left, right = SceneObject("circle", "red", "large"), SceneObject("square", "blue", "large")
    for layout, axis in (("beside", 1), ("stacked", 0)):
        picture = draw_picture(Scene((left, right), layout, "white", "plain"), np.random.default_rng(3)).astype(int)
        centres = [np.argwhere(abs(picture - ink).max(-1) < 10).mean(0)[axis] for ink in ((222, 36, 36), (40, 84, 224))]
        assert centres[0] + 25 < centres[1]
