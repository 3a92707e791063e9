"""Scores of a folder of images against the float model's of the same prompts and noise, and against real images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pcr_export.errors import PcrExportError
from pcr_export.progress import Track, silent
from pcr_export.qdiffbench.features import Extractors
from pcr_export.qdiffbench.images import read_image, read_images
from pcr_export.qdiffbench.workers import ONE_PROCESS, Part, Workers, compute_parts, torch_threads, worker_processes
from pcr_export.write_files import new_folder, write_json

IMAGES_FOR_A_STABLE_DISTANCE = 2048
REAL_IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
IMAGES_PER_BATCH = 64
PIXELS_PER_BATCH = 2**22  # of one of a pair; SSIM needs some hundred bytes for each
KID = "kernel (x.y / features + 1)^3, unbiased, all pairs of different prompts, no subsets"
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
    batch: int | None = None,
    workers: Workers = ONE_PROCESS,
    track: Track = silent,
) -> Scores:
    """Score the images of two folders, image i belonging to prompt i. The figures do not depend on the number of workers.

    Memory does not grow with the number of images, but for a few numbers of each: features lie in files in `images` meanwhile.

    Args:
        extractors: None leaves only PSNR and SSIM.
        real: a folder of real images, of any names and sizes.
        batch: images that are scored at a time, on which the last digits depend; None: as many as their size lets.

    Raises:
        PcrExportError: an image is missing or damaged, two of a pair differ in size, there are fewer than two, or a worker fails.
    """
    if len(prompts) < 2:
        raise PcrExportError("fewer than 2 images have no Frechet distance: raise --images")
    try:  # where torch-fidelity is installed without a torchvision for this torch, torchmetrics can't be imported
        from pcr_export.qdiffbench.distances import Features, all_distances
        from pcr_export.qdiffbench.judge import ExtractFeatures, judge_pairs
    except (ImportError, RuntimeError) as error:
        raise PcrExportError(f"torchmetrics can't be imported ({error}): pip install pcr-export[fid]") from error
    real_paths = _find_real_images(real) if real and extractors else []
    progress = track("scores", len(prompts) + len(real_paths))
    with new_folder(images / ".features") as folder, worker_processes(workers), progress as advance:
        stores = {}
        if extractors:
            for name, count in (("artifact", len(prompts)), ("fp32", len(prompts)), ("real", len(real_paths))):
                if count:
                    stores[name] = Features(folder / name, count, extractors.num_features)
        pairs = _read_pairs(images, reference, prompts, batch)
        each = judge_pairs(pairs, extractors, stores, workers, advance)
        if extractors and real_paths:
            parts = _read_real_images(real_paths, batch)
            for indices, features in compute_parts(ExtractFeatures(extractors), parts, workers):
                stores["real"].write(indices, features)
                advance(len(indices))
        with torch_threads(workers.threads):
            figures: dict[str, Any] = all_distances(stores)
    figures |= {name: float(np.mean(values)) if values else None for name, values in each.items()}
    protocol = (
        {**extractors.protocol, "kid": KID, "n_real_images": len(real_paths)} if extractors else {"extractor": None}
    )
    return Scores(
        n_images=len(prompts),
        **figures,
        protocol={"n_images": len(prompts), **protocol, **_choices()},
        warning=_warning(len(prompts), len(real_paths), extractors),
        per_image=PerImage(prompts=list(prompts), **{name: each[name] for name in ("psnr_db", "ssim", "lpips")}),
    )


def write_scores(scores: Scores, per_image: Path) -> dict[str, Any]:
    """Write the figures of each image to a file of their own; returns the others, plain JSON."""
    facts = asdict(scores)
    write_json(per_image, facts.pop("per_image"))
    return facts


def _read_pairs(images: Path, reference: Path, prompts: Sequence[str], batch: int | None) -> Iterator[Part]:
    """Batches of both folders' images and their prompts, as JudgePairs takes them."""
    size = batch or _images_per_batch(*read_images(images, 0, 1).shape[-2:])
    for start in range(0, len(prompts), size):
        indices = range(start, min(start + size, len(prompts)))
        ours, theirs = (read_images(folder, indices.start, indices.stop) for folder in (images, reference))
        if ours.shape != theirs.shape:
            raise PcrExportError(f"{images} and {reference} hold images of two sizes: make them again at one size")
        yield Part(indices=indices, args=(ours, theirs, prompts[indices.start : indices.stop]))


def _images_per_batch(height: int, width: int) -> int:
    return max(1, min(IMAGES_PER_BATCH, PIXELS_PER_BATCH // (height * width)))


def _find_real_images(folder: Path) -> list[Path]:
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in REAL_IMAGE_SUFFIXES)
    if len(paths) < 2:
        raise PcrExportError(f"{folder} holds {len(paths)} images: a Frechet distance to real images needs 2 or more")
    return paths


def _read_real_images(paths: Sequence[Path], batch: int | None) -> Iterator[Part]:
    """All images in the order of their names, as ExtractFeatures takes them: neighbours of one size together."""
    arrays: list[np.ndarray] = []
    for index, path in enumerate(paths):
        array = np.asarray(read_image(path, advice="delete or replace it"))
        full = arrays and len(arrays) == (batch or _images_per_batch(*arrays[0].shape[:2]))
        if arrays and (full or arrays[0].shape != array.shape):
            yield _real_part(arrays, index)
            arrays = []
        arrays.append(array)
    if arrays:
        yield _real_part(arrays, len(paths))


def _real_part(arrays: Sequence[np.ndarray], stop: int) -> Part:
    images = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)
    return Part(indices=range(stop - len(arrays), stop), args=(images,))


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
