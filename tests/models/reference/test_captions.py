"""Captions fit the context, say what the scene is, and consist of words that the tokenizer keeps whole."""

from __future__ import annotations

import re

import numpy as np

from pcr_export.models.reference.captions import (
    MAX_TOKENS,
    RELATIONS,
    SYNONYMS,
    grammar_words,
    write_caption,
    write_foreign_caption,
    write_short_caption,
)
from pcr_export.models.reference.scenes import SIZES, Scene, SceneObject, draw_scene

PAIR = Scene((SceneObject("ring", "red", "small"), SceneObject("star", "blue", "large")), "beside", "navy", "striped")


def words_of(caption: str) -> list[str]:
    return re.findall(r"[a-z]+|[,:]", caption)


def test_captions_fit_and_use_the_grammar() -> None:
    rng, known = np.random.default_rng(0), set(grammar_words())
    for _ in range(500):
        scene = draw_scene(rng, held_out=False)
        for write in (write_caption, write_foreign_caption):
            words = words_of(write(scene, rng))
            assert len(words) + 2 <= MAX_TOKENS
            assert set(words) <= known


def test_either_object_comes_first_and_the_relation_follows() -> None:
    rng = np.random.default_rng(1)
    captions = [write_caption(PAIR, rng) for _ in range(100)]
    red_first = [caption.index("red") < caption.index("blue") for caption in captions]
    assert 20 < sum(red_first) < 80
    for caption, first in zip(captions, red_first, strict=True):
        assert any(f" {phrase} " in caption for phrase in RELATIONS["beside", first])


def test_captions_name_every_attribute() -> None:
    rng = np.random.default_rng(2)
    for _ in range(50):
        words = set(words_of(write_caption(PAIR, rng)))
        assert {"red", "blue", "star", "navy", "striped", "background"} <= words
        assert words & set(SYNONYMS["ring"])
        assert words & set(SYNONYMS["small"])


def test_the_foreign_wording_is_foreign() -> None:
    rng = np.random.default_rng(3)
    own = {write_caption(PAIR, rng) for _ in range(300)}
    assert own.isdisjoint(write_foreign_caption(PAIR, rng) for _ in range(300))


def test_a_short_caption_stands_for_medium_objects_on_plain_white() -> None:
    rng = np.random.default_rng(5)
    left_out = set()
    for _ in range(200):
        caption, meant = write_short_caption(draw_scene(rng, held_out=False), rng)
        words = set(caption.replace(",", " ").split())
        sized = bool(words & {word for size in SIZES for word in SYNONYMS[size]})
        assert sized or {item.size for item in meant.objects} == {"medium"}
        assert "background" in words or (meant.background, meant.pattern) == ("white", "plain")
        left_out.add((sized, "background" in words))
    assert left_out == {(False, False), (True, False), (False, True)}
