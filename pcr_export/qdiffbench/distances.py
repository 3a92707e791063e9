"""Frechet and kernel distance and CLIP score of what networks see, PSNR and SSIM of pixels: torchmetrics, choices written down."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import poly_kernel

KID_ROWS = 1000  # and columns of the kernel matrix at a time
ROWS_OF_MOMENTS = 64  # of features at a time, in sums
HIGHEST_PSNR_DB = 100.0  # what an image without any error counts as


class Features:
    """What a network sees in N images, float32 [N, num_features], in a file: memory does not grow with N."""

    def __init__(self, path: Path, count: int, num_features: int) -> None:
        self._path, self.shape = path, (count, num_features)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._open("w+")

    def write(self, indices: range, features: np.ndarray) -> None:
        """Keep float32 [len(indices), num_features]."""
        self._open("r+")[indices.start : indices.stop] = features

    def split(self, size: int) -> Iterator[Tensor]:
        """All rows in order, float64 [up to size, num_features]."""
        for start in range(0, len(self), size):
            yield torch.from_numpy(self._open("r")[start : start + size].astype(np.float64))

    def __len__(self) -> int:
        return self.shape[0]

    def _open(self, mode: Literal["r", "r+", "w+"]) -> np.memmap:
        return np.memmap(self._path, np.float32, mode, shape=self.shape)


def all_distances(stores: Mapping[str, Features]) -> dict[str, float | None]:
    """The figures of sets of features, by their names in Scores: "artifact" and "fp32", and "real" where there are real images."""
    if not stores:
        return dict.fromkeys(("fid_to_fp32", "fid_to_real", "kid_to_fp32"))
    ours, theirs, real = stores["artifact"], stores["fp32"], stores.get("real")
    return {
        "fid_to_fp32": frechet_distance(ours, theirs),
        "fid_to_real": frechet_distance(ours, real) if real else None,
        "kid_to_fp32": kernel_distance(ours, theirs),
    }


def frechet_distance(ours: Features, theirs: Features) -> float:
    """|mu1 - mu2|^2 + tr(S1 + S2 - 2 sqrt(S1 S2)) in float64; both sets have two images or more."""
    metric = FrechetInceptionDistance(feature=_Given(ours.shape[1]))
    for features, real in ((ours, False), (theirs, True)):
        for some in features.split(ROWS_OF_MOMENTS):
            metric.update(some, real=real)
    return metric.compute().item()


def kernel_distance(ours: Features, theirs: Features) -> float:
    """KID (Binkowski et al. 2018) of two sets of the same prompts, two or more: unbiased MMD^2, kernel (x.y / num_features + 1)^3.

    An image and its counterpart share prompt and noise. The usual estimate counts k(x_i, y_i) as if they were independent, which
    puts near sets far below 0: by twice the mean of k(x_i, y_i) - k(x_i, y_j) over N. Here, as in Gretton et al. 2012, eq. 4, i
    and j always differ: the mean over i != j of k(x_i, x_j) + k(y_i, y_j) - 2 k(x_i, y_j). It takes all images, no random subsets,
    in float64: differences of near sets drown in float32.
    """
    total = 0.0
    for i, (x, y) in enumerate(zip(ours.split(KID_ROWS), theirs.split(KID_ROWS), strict=True)):
        for j, (u, v) in enumerate(zip(ours.split(KID_ROWS), theirs.split(KID_ROWS), strict=True)):
            for sign, a, b in ((1, x, u), (1, y, v), (-2, x, v)):
                kernel = poly_kernel(a, b)
                if i == j:
                    kernel.fill_diagonal_(0)
                total += sign * kernel.sum().item()
    return total / (len(ours) * (len(ours) - 1))


class _Given(nn.Module):
    """Lets torchmetrics' Frechet distance take features instead of images."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def psnr_db(ours: Tensor, theirs: Tensor) -> list[float]:
    """PSNR in dB of each pair of uint8 [batch, 3, height, width]."""
    each = peak_signal_noise_ratio(ours.float(), theirs.float(), data_range=255.0, dim=(1, 2, 3), reduction="none")
    values: list[float] = each.clamp(max=HIGHEST_PSNR_DB).tolist()
    return values


def ssim(ours: Tensor, theirs: Tensor) -> list[float]:
    """SSIM (Wang et al. 2004; Gaussian window of 11 x 11, sigma 1.5) of each pair of uint8 [batch, 3, height, width]."""
    each = structural_similarity_index_measure(ours.float(), theirs.float(), data_range=255.0, reduction="none")
    values: list[float] = torch.as_tensor(each).tolist()
    return values


def clip_scores(images: Tensor, text: Tensor) -> Tensor:
    """100 * max(cos(image, text), 0) of each pair (Hessel et al. 2021), [batch]."""
    return 100 * F.cosine_similarity(images, text).clamp(min=0)
