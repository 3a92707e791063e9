"""Pairs of images, float model and quantized one: the worst, the median and the best prompts, ready for a page."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from pcr_export.qdiffbench.images import image_path, read_image
from pcr_export.qdiffbench.scores import PerImage

PAIRS_OF_A_KIND = 3
LARGEST_SIDE = 384  # pixels; larger images are shown smaller, so that a phone can load the page
PIXELATED_BELOW = 128  # pixels; smaller images are enlarged without smoothing


@dataclass(frozen=True, kw_only=True)
class ImagePair:
    """Two images of one prompt and noise."""

    kind: str  # "worst", "median" or "best"
    index: int  # of the prompt
    prompt: str
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
    reference: Path, quantized: Path, per_image: PerImage, count: int = PAIRS_OF_A_KIND
) -> list[ImagePair]:
    """The `count` worst, median and best prompts by LPIPS, or by PSNR where there is no LPIPS; worst first.

    Args:
        reference, quantized: folders of the images of both models.
        per_image: what `measure_scores` found for each image.

    Raises:
        PcrExportError: an image is missing or damaged.
    """
    badness = np.asarray(per_image.lpips) if per_image.lpips else -np.asarray(per_image.psnr_db)
    order = np.argsort(-badness, kind="stable").tolist()  # worst first
    pairs = []
    for kind, indices in _kinds(order, count):
        for index in indices:
            shown, size = _data_uri(image_path(reference, index))
            pairs.append(
                ImagePair(
                    kind=kind,
                    index=index,
                    prompt=per_image.prompts[index],
                    psnr_db=per_image.psnr_db[index],
                    lpips=per_image.lpips[index] if per_image.lpips else None,
                    size=size,
                    reference=shown,
                    quantized=_data_uri(image_path(quantized, index))[0],
                )
            )
    return pairs


def _kinds(order: Sequence[int], count: int) -> list[tuple[str, Sequence[int]]]:
    """Indices of the worst, the median and the best, none of them twice; few images are all shown."""
    count = min(count, -(-len(order) // 3))
    best = order[max(count, len(order) - count) :]
    between = order[count : len(order) - len(best)]
    start = (len(between) - count) // 2 if len(between) > count else 0
    return [("worst", order[:count]), ("median", between[start : start + count]), ("best", best)]


def _data_uri(path: Path) -> tuple[str, int]:
    """The image for a page, and its width there in pixels."""
    with read_image(path, advice="delete it and evaluate again") as image:
        if max(image.size) > LARGEST_SIDE:
            image.thumbnail((LARGEST_SIDE, LARGEST_SIDE), Image.Resampling.LANCZOS)
        file = io.BytesIO()
        image.save(file, format="PNG")
        return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode(), image.width
