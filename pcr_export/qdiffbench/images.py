"""Images by index: generated once, kept as PNG, never under a name made from a prompt."""

from __future__ import annotations

import io
import shutil
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pcr_export.errors import PcrExportError, first_line
from pcr_export.progress import Track, silent
from pcr_export.read_files import read_bytes, read_text
from pcr_export.write_files import new_file, write_text

FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
MOST_BYTES = 2**28  # of an image's file
MOST_PIXELS = 2**27  # of an image
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
    return bool(key) and mark.exists() and read_text(mark, advice="delete it") == key


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


def read_image(path: Path, *, advice: str) -> Image.Image:
    """An image in RGB, of one of a few formats: some of Pillow's start other programs.

    Raises:
        PcrExportError: it is missing or damaged, or has too many pixels or bytes.
    """
    data = read_bytes(path, most=MOST_BYTES, advice=advice)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's of many pixels, which are counted below
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                if image.width * image.height <= MOST_PIXELS:
                    return image.convert("RGB")
                size = f"{image.width} x {image.height}"
    except Exception as error:  # whatever a damaged file makes of Pillow
        raise PcrExportError(f"image {path} can't be read ({first_line(error)}): {advice}") from error
    raise PcrExportError(f"image {path} has {size} pixels, {MOST_PIXELS} are read at most: {advice}")


def read_images(folder: Path, start: int, stop: int) -> Tensor:
    """Images start..stop-1 of a folder, uint8 [batch, 3, height, width].

    Raises PcrExportError where one is missing or damaged.
    """
    paths = [image_path(folder, index) for index in range(start, stop)]
    arrays = [np.asarray(read_image(path, advice="delete it and run again")) for path in paths]
    for path, array in zip(paths, arrays, strict=True):
        if array.shape != arrays[0].shape:
            raise PcrExportError(f"image {path} has another size than {paths[0]}: delete both and run again")
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)
