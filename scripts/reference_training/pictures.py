"""A cached set of rendered scenes, and seeded batches from it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from pcr_export.models.reference.drawing import PIXELS, draw_picture
from pcr_export.models.reference.scenes import ATTRIBUTES, draw_scene, scene_labels

SEED = 20_25


@dataclass(frozen=True)
class Pictures:
    """Rendered scenes: uint8 [N, 3, 64, 64] and their labels, int64 [N, 9] in the order of ATTRIBUTES."""

    pixels: np.ndarray
    labels: np.ndarray

    def batch(self, rng: np.random.Generator, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw a batch: float32 [B, 3, 64, 64] from -1 to 1, int64 [B, 9]."""
        rows = np.sort(rng.integers(len(self.pixels), size=size))
        return as_images(self.pixels[rows]), torch.from_numpy(self.labels[rows])


def as_images(pixels: np.ndarray) -> torch.Tensor:
    """Turn uint8 [N, 3, H, W] into float32 from -1 to 1."""
    return torch.from_numpy(np.ascontiguousarray(pixels)).float() / 127.5 - 1


def render(count: int, seed: int, *, held_out: bool) -> Pictures:
    """Draw `count` scenes of one side of the split; scene i depends on the seed and i alone."""
    pixels = np.empty((count, 3, PIXELS, PIXELS), np.uint8)
    labels = np.empty((count, len(ATTRIBUTES)), np.int64)
    for i in range(count):
        rng = np.random.default_rng([seed, i])
        scene = draw_scene(rng, held_out=held_out)
        pixels[i] = draw_picture(scene, rng).transpose(2, 0, 1)
        labels[i] = scene_labels(scene)
    return Pictures(pixels, labels)


def cached_pictures(folder: Path, count: int) -> Pictures:
    """Render the training scenes once, then map them from the folder."""
    paths = folder / "pixels.npy", folder / "labels.npy"
    if not all(path.exists() for path in paths):
        pictures = render(count, SEED, held_out=False)
        for path, array in zip(paths, (pictures.pixels, pictures.labels), strict=True):
            partial = path.with_suffix(".partial.npy")
            np.save(partial, array)
            os.replace(partial, path)
    return Pictures(np.load(paths[0], mmap_mode="r"), np.load(paths[1]))
