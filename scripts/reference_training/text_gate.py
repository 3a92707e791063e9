"""The gate behind stage text: does changing one thing in a caption move what the denoiser sees?"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from pcr_export.models.reference.captions import write_caption
from pcr_export.models.reference.scenes import LAYOUTS, draw_scene
from reference_training.text import TextTowers, change_one, tokenize

SPREAD_NEEDED = 0.3
CHANGES = ("colour_1", "size_1", "shape_1", "order", "layout", "background", "pattern")


@torch.no_grad()
def context_spread(towers: TextTowers, pipeline: Path, change: str, count: int = 128) -> float:
    """Return the RMS change of the context over its RMS when `change` alone differs, for captions worded alike."""
    rng = np.random.default_rng(13)
    scenes = []
    while len(scenes) < count:
        scene = draw_scene(rng, held_out=True)
        if scene.layout != LAYOUTS[0]:
            scenes.append(scene)
    others = [change_one(scene, rng, change) for scene in scenes]
    before, after = (
        towers.context(*tokenize([write_caption(s, np.random.default_rng(i)) for i, s in enumerate(side)], pipeline))[0]
        for side in (scenes, others)
    )
    return float((before - after).square().mean().sqrt() / before.square().mean().sqrt())


def check_spread(towers: TextTowers, pipeline: Path) -> dict[str, float]:
    """Return every change's spread; end the program where one is too faint for the denoiser to follow."""
    spreads = {change: context_spread(towers, pipeline, change) for change in CHANGES}
    faint = [change for change, spread in spreads.items() if spread < SPREAD_NEEDED]
    if faint:
        raise SystemExit(
            f"the text context hardly shows {', '.join(faint)} ({spreads}): train stage text for more steps"
        )
    return spreads
