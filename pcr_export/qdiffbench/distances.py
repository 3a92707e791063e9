"""Frechet and kernel distance and CLIP score of what networks see, PSNR and SSIM of pixels: torchmetrics, choices written down."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import poly_kernel

from pcr_export.qdiffbench.features import Extractors

KID_ROWS = 1000  # of the kernel matrix at a time
HIGHEST_PSNR_DB = 100.0  # what an image without any error counts as


class FrechetDistance:
    """|mu1 - mu2|^2 + tr(S1 + S2 - 2 sqrt(S1 S2)) of two sets of features. Memory does not grow with their number."""

    def __init__(self, num_features: int) -> None:
        self._metric = FrechetInceptionDistance(feature=_Given(num_features))

    def update(self, features: Tensor, *, real: bool) -> None:
        """Take float32 [batch, num_features] into the set that is compared with (real) or the one that is judged."""
        self._metric.update(features.double(), real=real)

    def compute(self) -> float:
        """The distance, in float64; both sets need two or more."""
        return self._metric.compute().item()


class KernelDistance:
    """KID (Binkowski et al. 2018) of two sets of features of the same prompts: unbiased MMD^2, kernel (x.y / num_features + 1)^3.

    An image and its counterpart share prompt and noise. The usual estimate counts k(x_i, y_i) as if they were independent, which
    puts near sets far below 0: by twice the mean of k(x_i, y_i) - k(x_i, y_j) over N. Here, as in Gretton et al. 2012, eq. 4, i
    and j always differ: the mean over i != j of k(x_i, x_j) + k(y_i, y_j) - 2 k(x_i, y_j). It takes all images, no random subsets.
    The features are kept, float32 [N, num_features] each: 16 kB a prompt for InceptionV3.
    """

    def __init__(self) -> None:
        self._ours: list[Tensor] = []
        self._theirs: list[Tensor] = []

    def update(self, ours: Tensor, theirs: Tensor) -> None:
        """Take the features of a batch of counterparts, float32 [batch, num_features] each."""
        self._ours.append(ours)
        self._theirs.append(theirs)

    def compute(self) -> float:
        """The distance, in float64: differences of near sets drown in float32. There must be two prompts or more."""
        ours, theirs = torch.cat(self._ours).double(), torch.cat(self._theirs).double()
        count, total = len(ours), 0.0
        for x, y in zip(ours.split(KID_ROWS), theirs.split(KID_ROWS), strict=True):
            total += (
                poly_kernel(x, ours).sum() + poly_kernel(y, theirs).sum() - 2 * poly_kernel(x, theirs).sum()
            ).item()
        gamma = 1 / ours.shape[1]
        same = [
            ((a * b).sum(1) * gamma + 1).pow(3).sum().item()
            for a, b in ((ours, ours), (theirs, theirs), (ours, theirs))
        ]
        return (total - same[0] - same[1] + 2 * same[2]) / (count * (count - 1))


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


class NetworkScores:
    """The figures of one evaluation that networks give, batch by batch."""

    def __init__(self, extractors: Extractors) -> None:
        self._extractors = extractors
        self._to_fp32 = FrechetDistance(extractors.num_features)
        self._to_real = FrechetDistance(extractors.num_features)
        self._kernel = KernelDistance()
        self._count, self._count_real, self._clip, self._clip_fp32 = 0, 0, 0.0, 0.0

    def update(self, ours: Tensor, theirs: Tensor, prompts: Sequence[str]) -> list[float]:
        """Take a batch of the artifact's and of the float model's uint8 [batch, 3, height, width]; returns LPIPS of each pair."""
        text = self._extractors.text_features(prompts)
        our_outputs, their_outputs = self._extractors.outputs(ours), self._extractors.outputs(theirs)
        self._to_fp32.update(our_outputs.features, real=False)
        self._to_fp32.update(their_outputs.features, real=True)
        self._to_real.update(our_outputs.features, real=False)
        self._kernel.update(our_outputs.features, their_outputs.features)
        self._clip += clip_scores(our_outputs.embeds, text).sum().item()
        self._clip_fp32 += clip_scores(their_outputs.embeds, text).sum().item()
        self._count += len(prompts)
        values: list[float] = self._extractors.lpips(our_outputs, their_outputs).tolist()
        return values

    def update_real(self, images: Tensor) -> None:
        """Take a batch of real images, uint8 [batch, 3, height, width]."""
        self._to_real.update(self._extractors.features(images), real=True)
        self._count_real += len(images)

    def compute(self) -> dict[str, float | None]:
        """The figures by their names in Scores; fid_to_real is None where no real images came."""
        return {
            "fid_to_fp32": self._to_fp32.compute(),
            "fid_to_real": self._to_real.compute() if self._count_real else None,
            "kid_to_fp32": self._kernel.compute(),
            "clip_score": self._clip / self._count,
            "clip_score_fp32": self._clip_fp32 / self._count,
        }

    def protocol(self) -> dict[str, Any]:
        """The networks, the kernel of KID and the number of real images, as plain JSON."""
        return {
            **self._extractors.protocol,
            "kid": "kernel (x.y / features + 1)^3, unbiased, all pairs of different prompts, no subsets",
            "n_real_images": self._count_real,
        }


def clip_scores(images: Tensor, text: Tensor) -> Tensor:
    """100 * max(cos(image, text), 0) of each pair (Hessel et al. 2021), [batch]."""
    return 100 * F.cosine_similarity(images, text).clamp(min=0)
