"""Pairs of images, float model and quantized one: the worst, the median and the best prompts, ready for a page."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from pcr_export.errors import PcrExportError
from pcr_export.qdiffbench.images import image_path

PAIRS_OF_A_KIND = 3
LARGEST_SIDE = 384  # pixels; larger images are shown smaller, so that a phone can load the page
PIXELATED_BELOW = 128  # pixels; smaller images are enlarged without smoothing
PSNR_OF_EQUAL_IMAGES = 100.0  # dB, as the scores have it


@dataclass(frozen=True, kw_only=True)
class ImagePair:
    """Two images of one prompt and noise."""

    kind: str  # "worst", "median" or "best"
    index: int  # of the prompt
    prompt: str  # empty where it is not known
    psnr_db: float
    lpips: float | None
    size: int  # pixels: width of the image as it is shown
    reference: str  # data URI of a PNG: the float model's
    quantized: str

    @property
    def pixelated(self) -> bool:
        """Whether a pixel of the image is larger than one of the screen."""
        return self.size < PIXELATED_BELOW


@dataclass(frozen=True, kw_only=True)
class PairGroup:
    """Pairs with a title of their own, e.g. a domain or a scheme."""

    title: str
    pairs: Sequence[ImagePair]


def choose_pairs(
    reference: Path,
    quantized: Path,
    *,
    psnr_db: Sequence[float],
    lpips: Sequence[float] = (),
    prompts: Sequence[str] = (),
    count: int = PAIRS_OF_A_KIND,
) -> list[ImagePair]:
    """The `count` worst, median and best prompts by LPIPS, or by PSNR where there is no LPIPS; worst first.

    Args:
        reference, quantized: folders of the images of both models.
        psnr_db, lpips: of each image, in the order of the prompts.

    Raises:
        PcrExportError: an image is missing or damaged.
    """
    badness = np.asarray(lpips) if len(lpips) else -np.asarray(psnr_db)
    order = np.argsort(-badness, kind="stable").tolist()  # worst first
    pairs = []
    for kind, indices in _kinds(order, count):
        for index in indices:
            shown, size = _data_uri(image_path(reference, index))
            pairs.append(
                ImagePair(
                    kind=kind,
                    index=index,
                    prompt=prompts[index] if index < len(prompts) else "",
                    psnr_db=psnr_db[index],
                    lpips=lpips[index] if len(lpips) else None,
                    size=size,
                    reference=shown,
                    quantized=_data_uri(image_path(quantized, index))[0],
                )
            )
    return pairs


def measure_psnr(reference: Path, quantized: Path) -> list[float]:
    """PSNR in dB of each pair 0, 1, ... that lies in both folders, for 8-bit pixels."""
    values: list[float] = []
    while all(image_path(folder, len(values)).exists() for folder in (reference, quantized)):
        ours, theirs = (_pixels(image_path(folder, len(values))) for folder in (quantized, reference))
        if ours.shape != theirs.shape:
            raise PcrExportError(f"{quantized} and {reference} hold images of two sizes: export again")
        error = np.square(ours - theirs).mean()
        values.append(10 * float(np.log10(255**2 / error)) if error else PSNR_OF_EQUAL_IMAGES)
    return values


def _kinds(order: Sequence[int], count: int) -> list[tuple[str, Sequence[int]]]:
    """Indices of the worst, the median and the best, none of them twice; few images are all shown."""
    count = min(count, -(-len(order) // 3))
    best = order[max(count, len(order) - count) :]
    between = order[count : len(order) - len(best)]
    start = (len(between) - count) // 2 if len(between) > count else 0
    return [("worst", order[:count]), ("median", between[start : start + count]), ("best", best)]


def _pixels(path: Path) -> np.ndarray:
    """float64 [height, width, 3], 0..255."""
    with _open(path) as image:
        return np.asarray(image, np.float64)


def _data_uri(path: Path) -> tuple[str, int]:
    """The image for a page, and its width there in pixels."""
    with _open(path) as image:
        if max(image.size) > LARGEST_SIDE:
            image.thumbnail((LARGEST_SIDE, LARGEST_SIDE), Image.Resampling.LANCZOS)
        file = io.BytesIO()
        image.save(file, format="PNG")
        return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode(), image.width


def _open(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError) as error:
        raise PcrExportError(f"image {path} can't be read ({error}): delete it and evaluate again") from error
