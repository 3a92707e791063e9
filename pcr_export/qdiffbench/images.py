"""Images by index: generated once, kept as PNG, never under a name made from a prompt."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pcr_export.errors import PcrExportError
from pcr_export.models.denoiser import Denoiser, Inputs, sample
from pcr_export.progress import Track, silent


def image_path(folder: Path, index: int) -> Path:
    """Where image `index` of a folder lies."""
    return folder / f"{index:05d}.png"


def to_uint8(images: Tensor) -> np.ndarray:
    """float [batch, 3, height, width] in 0..1 -> uint8 [batch, height, width, 3]."""
    return (images.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def generate_images(
    denoiser: Denoiser,
    call: Callable[[Inputs], Tensor],
    prompts: Sequence[str],
    seeds: Sequence[int],
    folder: Path,
    *,
    batch: int,
    description: str,
    track: Track = silent,
) -> None:
    """Image i of prompt i and seed i with `call` as the network; images that are there already are kept.

    Raises ValueError where the denoiser has no `decode`.
    """
    if denoiser.decode is None:
        raise ValueError("a denoiser without decode makes no images")
    folder.mkdir(parents=True, exist_ok=True)
    missing = [index for index in range(len(prompts)) if not image_path(folder, index).exists()]
    with track(description, len(prompts)) as advance:
        advance(len(prompts) - len(missing))
        for start in range(0, len(missing), batch):
            indices = missing[start : start + batch]
            latents = sample(denoiser, call, [prompts[i] for i in indices], [seeds[i] for i in indices])
            with torch.inference_mode():
                pixels = to_uint8(denoiser.decode(latents))
            for index, image in zip(indices, pixels, strict=True):
                write_png(image, image_path(folder, index))
            advance(len(indices))


def write_png(image: np.ndarray, path: Path) -> None:
    """Write uint8 [height, width, 3] as PNG, through a temporary name."""
    temporary = path.with_name(path.name + ".tmp")
    Image.fromarray(image).save(temporary, format="PNG")
    os.replace(temporary, path)


def read_images(folder: Path, start: int, stop: int) -> Tensor:
    """Images start..stop-1 of a folder, uint8 [batch, 3, height, width].

    Raises PcrExportError where one is missing or damaged.
    """
    arrays = []
    for index in range(start, stop):
        try:
            with Image.open(image_path(folder, index)) as image:
                arrays.append(np.asarray(image.convert("RGB")))
        except OSError as error:
            raise PcrExportError(
                f"image {image_path(folder, index)} can't be read ({error}): delete it and run again"
            ) from error
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)
