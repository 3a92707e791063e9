"""Stage prompts: the calibration and evaluation prompts of tiny-sdxl."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from pcr_export.models.reference.captions import write_caption, write_foreign_caption
from pcr_export.models.reference.scenes import Scene, draw_scene

Writer = Callable[[Scene, np.random.Generator], str]


def write_prompt_files(folder: Path) -> None:
    """Write 256 calibration prompts, 2048 of held-out scenes, and 2048 of held-out scenes in a foreign wording."""
    calibration = draw_prompts(256, 101, write_caption, held_out=False)
    files = {
        "tiny-sdxl.txt": calibration,
        "tiny-sdxl-eval.txt": draw_prompts(2048, 102, write_caption, held_out=True),
        "tiny-sdxl-out-of-domain.txt": draw_prompts(2048, 103, write_foreign_caption, held_out=True),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, prompts in files.items():
        partial = folder / f"{name}.partial"
        partial.write_text("\n".join(prompts) + "\n")
        os.replace(partial, folder / name)


def draw_prompts(count: int, seed: int, write: Writer, *, held_out: bool) -> list[str]:
    """Draw `count` different prompts from one side of the split."""
    rng = np.random.default_rng(seed)
    prompts: dict[str, None] = {}
    while len(prompts) < count:
        prompts[write(draw_scene(rng, held_out=held_out), rng)] = None
    return list(prompts)
