"""Put a scene into words: the grammar of the captions that tiny-sdxl was trained on, and another wording for tests."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from pcr_export.models.reference.scenes import BACKGROUNDS, COLOURS, PATTERNS, SHAPES, SIZES, Scene, SceneObject

MAX_TOKENS = 24  # with the start and end tokens

SYNONYMS = {
    "circle": ("circle", "disc"),
    "square": ("square", "box"),
    "cross": ("cross", "plus"),
    "ring": ("ring", "hoop"),
    "small": ("small", "little", "tiny"),
    "medium": ("medium", "middling"),
    "large": ("large", "big", "huge"),
}
RELATIONS = {
    ("beside", True): ("left of", "to the left of", "on the left of"),
    ("beside", False): ("right of", "to the right of", "on the right of"),
    ("stacked", True): ("above", "over", "higher than"),
    ("stacked", False): ("below", "under", "beneath"),
}
TEMPLATES = (
    "{things} on a {background}",
    "{things}, {background}",
    "a {background} with {things}",
    "a picture of {things} on a {background}",
)
FOREIGN_TEMPLATES = (
    "on this {background} there is {things}",
    "in front of a {background}: {things}",
    "we see {things} against some {background}",
    "{background} behind {things}",
)


def write_caption(scene: Scene, rng: np.random.Generator) -> str:
    """Write one caption: either object may come first, synonyms and the template are drawn at random."""
    template = TEMPLATES[int(rng.integers(len(TEMPLATES)))]
    background = f"{scene.pattern} {scene.background} background"
    return template.format(things=_things(scene, rng), background=background)


def write_short_caption(scene: Scene, rng: np.random.Generator) -> tuple[str, Scene]:
    """Write a caption that leaves out sizes, the background or both, and the scene that it stands for.

    What is not said is a medium size and a plain white background.
    """
    sizes, background = [(False, False), (False, False), (True, False), (False, True)][int(rng.integers(4))]
    if not sizes:
        scene = replace(scene, objects=tuple(replace(item, size="medium") for item in scene.objects))
    if not background:
        scene = replace(scene, background="white", pattern="plain")
    things = _things(scene, rng, sizes=sizes)
    if not background:
        return things, scene
    template = TEMPLATES[int(rng.integers(len(TEMPLATES)))]
    return template.format(things=things, background=f"{scene.pattern} {scene.background} background"), scene


def write_foreign_caption(scene: Scene, rng: np.random.Generator) -> str:
    """Write the scene in an order of words, and with some words, that the training grammar never uses."""
    first = int(rng.integers(len(scene.objects)))
    things = _foreign_object(scene.objects[first], rng)
    if len(scene.objects) == 2:
        relation = RELATIONS[scene.layout, first == 0][0]
        things += f" {relation} {_foreign_object(scene.objects[1 - first], rng)}"
    template = FOREIGN_TEMPLATES[int(rng.integers(len(FOREIGN_TEMPLATES)))]
    return template.format(things=things, background=f"{scene.background} {scene.pattern} background")


def grammar_words() -> list[str]:
    """List every word and mark of both wordings, sorted; the tokenizer keeps each as one token."""
    words = {*SHAPES, *COLOURS, *SIZES, *BACKGROUNDS, *PATTERNS, "one", "in"}
    phrases = [*_flatten(SYNONYMS.values()), *_flatten(RELATIONS.values()), *TEMPLATES, *FOREIGN_TEMPLATES]
    for phrase in phrases:
        plain = phrase.replace("{things}", "").replace("{background}", "background")
        words.update(plain.replace(",", " , ").replace(":", " : ").split())
    return sorted(words)


def _flatten(groups: Iterable[Sequence[str]]) -> list[str]:
    return [word for group in groups for word in group]


def _things(scene: Scene, rng: np.random.Generator, *, sizes: bool = True) -> str:
    first = int(rng.integers(len(scene.objects)))
    things = _object(scene.objects[first], rng, sizes=sizes)
    if len(scene.objects) == 1:
        return things
    relations = RELATIONS[scene.layout, first == 0]
    relation = relations[int(rng.integers(len(relations)))]
    return f"{things} {relation} {_object(scene.objects[1 - first], rng, sizes=sizes)}"


def _object(item: SceneObject, rng: np.random.Generator, *, sizes: bool) -> str:
    size = f"{_synonym(item.size, rng)} " if sizes else ""
    return f"a {size}{item.colour} {_synonym(item.shape, rng)}"


def _foreign_object(item: SceneObject, rng: np.random.Generator) -> str:
    if rng.random() < 0.5:
        return f"one {item.colour} {item.shape}"
    return f"one {item.shape} in {item.colour}"


def _synonym(word: str, rng: np.random.Generator) -> str:
    choices = SYNONYMS.get(word, (word,))
    return choices[int(rng.integers(len(choices)))]
