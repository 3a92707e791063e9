"""Scores of a folder of images against the float model's of the same prompts and noise, and against real images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pcr_export.errors import PcrExportError
from pcr_export.progress import Track, silent
from pcr_export.qdiffbench.features import Extractors
from pcr_export.qdiffbench.images import read_images

IMAGES_FOR_A_STABLE_DISTANCE = 2048
REAL_IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
FIGURES_OF_NETWORKS = ("fid_to_fp32", "fid_to_real", "kid_to_fp32", "clip_score", "clip_score_fp32")
LIBRARIES = ("torch", "torchmetrics", "torch-fidelity", "torchvision", "transformers", "pillow")


@dataclass(frozen=True, kw_only=True)
class PerImage:
    """Prompt and figures of each image."""

    prompts: list[str] = field(default_factory=list)
    psnr_db: list[float] = field(default_factory=list)  # an image without any error counts as 100 dB
    ssim: list[float] = field(default_factory=list)
    lpips: list[float] = field(default_factory=list)  # empty without extractors


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Scores of the artifact's images; None without extractors. Lower is better but for CLIP score, PSNR and SSIM."""

    n_images: int
    fid_to_fp32: float | None
    fid_to_real: float | None  # None also where no real images were given
    kid_to_fp32: float | None  # unbiased, so that it can be below 0
    clip_score: float | None  # mean of 100 * max(cos(image, text), 0)
    clip_score_fp32: float | None  # of the float model's images
    psnr_db: float  # mean over the images, to the float model's, as the next two
    ssim: float
    lpips: float | None
    protocol: dict[str, Any]  # plain JSON: networks, hashes of their weights, resizing, counts, library versions
    warning: str | None
    per_image: PerImage


def measure_scores(
    images: Path,
    reference: Path,
    prompts: Sequence[str],
    extractors: Extractors | None,
    *,
    real: Path | None = None,
    batch: int = 64,
    track: Track = silent,
) -> Scores:
    """Score the images of two folders, image i belonging to prompt i.

    Memory does not grow with their number but for the figures of each image and KID's features, which `KernelDistance` keeps.

    Args:
        extractors: None leaves only PSNR and SSIM.
        real: a folder of real images, of any names and sizes.
        batch: images that are scored at a time.

    Raises:
        PcrExportError: an image is missing or damaged, two of a pair differ in size, or there are fewer than two.
    """
    if len(prompts) < 2:
        raise PcrExportError("fewer than 2 images have no Frechet distance: raise --images")
    try:  # where torch-fidelity is installed without a torchvision for this torch, torchmetrics can't be imported
        from pcr_export.qdiffbench.distances import NetworkScores, psnr_db, ssim
    except (ImportError, RuntimeError) as error:
        raise PcrExportError(f"torchmetrics can't be imported ({error}): pip install pcr-export[fid]") from error
    real_paths = _find_real_images(real) if real and extractors else []
    per_image, networks = PerImage(), NetworkScores(extractors) if extractors else None
    with track("scores", len(prompts) + len(real_paths)) as advance:
        for start in range(0, len(prompts), batch):
            stop = min(start + batch, len(prompts))
            ours, theirs = (read_images(folder, start, stop) for folder in (images, reference))
            if ours.shape != theirs.shape:
                raise PcrExportError(f"{images} and {reference} hold images of two sizes: make them again at one size")
            per_image.prompts.extend(prompts[start:stop])
            per_image.psnr_db.extend(psnr_db(ours, theirs))
            per_image.ssim.extend(ssim(ours, theirs))
            if networks:
                per_image.lpips.extend(networks.update(ours, theirs, prompts[start:stop]))
            advance(stop - start)
        for some in _read_real_images(real_paths, batch):
            if networks:
                networks.update_real(some)
            advance(len(some))
    figures: dict[str, Any] = networks.compute() if networks else dict.fromkeys(FIGURES_OF_NETWORKS)
    return Scores(
        n_images=len(prompts),
        **figures,
        psnr_db=float(np.mean(per_image.psnr_db)),
        ssim=float(np.mean(per_image.ssim)),
        lpips=float(np.mean(per_image.lpips)) if networks else None,
        protocol={"n_images": len(prompts), **(networks.protocol() if networks else {"extractor": None}), **_choices()},
        warning=_warning(len(prompts), len(real_paths), extractors),
        per_image=per_image,
    )


def _find_real_images(folder: Path) -> list[Path]:
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in REAL_IMAGE_SUFFIXES)
    if len(paths) < 2:
        raise PcrExportError(f"{folder} holds {len(paths)} images: a Frechet distance to real images needs 2 or more")
    return paths


def _read_real_images(paths: Sequence[Path], batch: int) -> Iterator[Tensor]:
    """All images in the order of their names, as uint8 [up to batch, 3, height, width]: neighbours of one size together."""
    arrays: list[np.ndarray] = []
    for path in paths:
        try:
            with Image.open(path) as image:
                array = np.asarray(image.convert("RGB"))
        except OSError as error:
            raise PcrExportError(f"real image {path} can't be read ({error}): delete or replace it") from error
        if arrays and (len(arrays) == batch or arrays[0].shape != array.shape):
            yield _stack(arrays)
            arrays = []
        arrays.append(array)
    if arrays:
        yield _stack(arrays)


def _stack(arrays: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)


def _choices() -> dict[str, Any]:
    """What the protocol says of every evaluation."""
    return {
        "psnr": "8 bit RGB, equal images count as 100 dB",
        "ssim": "RGB, Gaussian window 11 x 11, sigma 1.5, edges reflected",
        "versions": {name: found for name in LIBRARIES if (found := _version(name))},
    }


def _warning(count: int, real_count: int, extractors: Extractors | None) -> str | None:
    if extractors is None:
        return "no CLIP beside the model: only PSNR and SSIM were measured"
    fewest = min(count, real_count or count)
    if fewest < IMAGES_FOR_A_STABLE_DISTANCE:
        return (
            f"a Frechet distance of {fewest} images is biased (below {IMAGES_FOR_A_STABLE_DISTANCE}): "
            "compare equal counts only"
        )
    return None


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None
