"""Images by index: generated once, kept as PNG, never under a name made from a prompt."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pcr_export.errors import PcrExportError
from pcr_export.progress import Track, silent
from pcr_export.write_files import new_file, write_text

PIXELS_PER_CALL = 2**17  # prompts of one call, times height and width


def prompts_per_call(height: int, width: int) -> int:
    """How many images of this size are painted together. Float sums depend on it in the last digit: it is the same everywhere."""
    return max(1, PIXELS_PER_CALL // (height * width))


def image_path(folder: Path, index: int) -> Path:
    """Where image `index` of a folder lies."""
    return folder / f"{index:05d}.png"


def to_uint8(images: Tensor) -> np.ndarray:
    """float [batch, 3, height, width] in 0..1 -> uint8 [batch, height, width, 3]."""
    return (images.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def generate_images(
    paint: Callable[[Sequence[str], Sequence[int]], np.ndarray],
    prompts: Sequence[str],
    seeds: Sequence[int],
    folder: Path,
    *,
    chunk: int,
    description: str,
    track: Track = silent,
) -> None:
    """Image i of prompt i and seed i; images that are there already are kept.

    Prompts are painted in chunks that depend on nothing else: [0, chunk), [chunk, 2 chunk), ... A chunk of which one image is
    missing is painted again as a whole, so that a stopped run ends with the pixels of an undisturbed one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with track(description, len(prompts)) as advance:
        missing = missing_chunks(folder, len(prompts), chunk)
        advance(len(prompts) - sum(map(len, missing)))
        for indices in missing:
            write_chunk(paint([prompts[i] for i in indices], [seeds[i] for i in indices]), folder, indices)
            advance(len(indices))


def has_images_of(folder: Path, key: str) -> bool:
    """Whether the images of a folder, all or some, were made under this key."""
    mark = folder / ".key"
    return bool(key) and mark.is_file() and mark.read_text() == key


def forget_images_of_another_key(folder: Path, key: str) -> None:
    """Images are kept one by one and resumed; those made under another key, or where the key is empty, are deleted first."""
    if not has_images_of(folder, key):
        if folder.exists():
            shutil.rmtree(folder)
        write_text(folder / ".key", key)


def missing_chunks(folder: Path, count: int, chunk: int) -> list[range]:
    """The chunks of `count` images of which at least one is not in `folder`."""
    chunks = [range(start, min(start + chunk, count)) for start in range(0, count, chunk)]
    return [indices for indices in chunks if not all(image_path(folder, index).exists() for index in indices)]


def write_chunk(pixels: np.ndarray, folder: Path, indices: range) -> None:
    """Write uint8 [len(indices), height, width, 3] as the images of these indices."""
    for index, image in zip(indices, pixels, strict=True):
        write_png(image, image_path(folder, index))


def write_png(image: np.ndarray, path: Path) -> None:
    """Write uint8 [height, width, 3] as PNG, through a temporary name."""
    with new_file(path) as file:
        Image.fromarray(image).save(file, format="PNG")


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
