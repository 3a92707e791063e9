"""Pure range estimators: a histogram of activations in, one quantizer (scale, zero point) out.

The histogram has one bin per bfloat16 value. The grid depends on no data, so the counts of any batches in any order add up to the
same integers, and a bin is at most 0.4 % wide.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from pcr_export.recipe import ESTIMATORS
from pcr_export.step_scales import ZERO_POINT_SYMMETRIC

NUM_BINS = 1 << 16
CLIP_RATIOS = torch.logspace(0, -1, 65, dtype=torch.float64)  # of the min-max range: 1 down to 0.1
_INFINITY_BITS = 0x7F80  # bfloat16 bit pattern; every pattern from here on, sign aside, is infinite or NaN


def _bin_values() -> Tensor:
    """float64 [NUM_BINS]: the bfloat16 value of every bin, bin = bit pattern."""
    patterns = torch.arange(NUM_BINS, dtype=torch.int32)
    return (patterns << 16).view(torch.float32).double()


@dataclass
class ActivationHistogram:
    """Counts of one site's activations in one step."""

    counts: Tensor = field(default_factory=lambda: torch.zeros(NUM_BINS, dtype=torch.int64))  # int64 [NUM_BINS]
    minimum: float = math.inf
    maximum: float = -math.inf

    def update(self, x: Tensor, weight: int = 1) -> None:
        """Count the activations `x` (float32, any shape), each `weight` times.

        Raises:
            ValueError: x holds NaN or infinite values.
        """
        low, high = (end.item() for end in torch.aminmax(x))
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ValueError("activations hold NaN or infinite values")
        self.minimum, self.maximum = min(self.minimum, low), max(self.maximum, high)
        patterns = x.detach().to(torch.bfloat16).view(torch.int16).flatten().to(torch.int32) & 0xFFFF
        self.counts += torch.bincount(patterns, minlength=NUM_BINS).to(self.counts.device) * weight

    def values_and_counts(self) -> tuple[Tensor, Tensor]:
        """The bins that were hit, ascending: values float64 [n], counts float64 [n]."""
        hit = self.counts.nonzero().squeeze(1)
        values, order = _bin_values()[hit].sort()
        return values, self.counts[hit][order].double()


@dataclass(frozen=True)
class Quantizer:
    """x is stored as q = clip(round(x / scale) + zero_point, 0, 255); see StepScales."""

    scale: float  # a float32 value
    zero_point: int  # 0..255


def quantize(x: Tensor, scale: Tensor | float, zero_point: Tensor | int, bits: int = 8) -> Tensor:
    """`x` in units of `scale` on the integer grid, in x's dtype: StepScales' equations.

    The result is q - zero_point, an integer in -255..255; a relaxed step (bits > 8) adds its second digit, a multiple of
    2 ** (8 - bits).
    """
    a = x / scale
    high = a.round().add_(zero_point).clamp_(0, 255).sub_(zero_point)
    if bits > 8:
        ratio = 2.0 ** (bits - 8)
        high += a.sub_(high).mul_(ratio).round_().clamp_(-128, 127).div_(ratio)
    return high


def quantize_dequantize(x: Tensor, scale: Tensor | float, zero_point: Tensor | int, bits: int = 8) -> Tensor:
    """The value that the graph computes with instead of `x`, in x's dtype."""
    return quantize(x, scale, zero_point, bits).mul_(scale)


def quantizer_from_range(low: float, high: float, *, affine: bool) -> Quantizer:
    """The finest 8-bit grid that holds [low, high] and represents 0 exactly."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = (high - low) / 255 if affine else max(-low / 128, high / 127)
    scale = float(np.float32(scale))
    if scale < np.finfo(np.float32).tiny:
        return Quantizer(1.0, ZERO_POINT_SYMMETRIC)
    return Quantizer(scale, round(-low / scale) if affine else ZERO_POINT_SYMMETRIC)


def minmax_range(histogram: ActivationHistogram) -> tuple[float, float]:
    """(minimum, maximum), exactly."""
    return histogram.minimum, histogram.maximum


def percentile_range(histogram: ActivationHistogram, percentile: float) -> tuple[float, float]:
    """The range between the (100 - percentile)-th and the percentile-th percentile, to a bin's width."""
    values, counts = histogram.values_and_counts()
    cumulative = counts.cumsum(0)
    total = cumulative[-1].item()
    low = values[torch.searchsorted(cumulative, total * (1 - percentile / 100), right=True).clamp(max=len(values) - 1)]
    high = values[torch.searchsorted(cumulative, total * percentile / 100).clamp(max=len(values) - 1)]
    return max(low.item(), histogram.minimum), min(high.item(), histogram.maximum)


def mse_quantizer(histogram: ActivationHistogram, *, affine: bool, bits: int = 8) -> Quantizer:
    """The quantizer with the least squared error over the histogram among clipped min-max ranges.

    Symmetric: both ends are clipped together. Affine: first the end farther from zero, then the other one.
    `bits` > 8 counts the relaxed digit in, so a relaxed step clips less.
    """
    values, counts = histogram.values_and_counts()
    low, high = minmax_range(histogram)
    if not affine:
        return _best(
            [quantizer_from_range(low * r, high * r, affine=False) for r in CLIP_RATIOS.tolist()], values, counts, bits
        )
    sweeps = ("high", "low") if high >= -low else ("low", "high")
    for end in sweeps:
        candidates = [(low * r, high) if end == "low" else (low, high * r) for r in CLIP_RATIOS.tolist()]
        quantizers = [quantizer_from_range(*candidate, affine=True) for candidate in candidates]
        best = _best(quantizers, values, counts, bits)
        low, high = candidates[quantizers.index(best)]
    return best


def _best(quantizers: list[Quantizer], values: Tensor, counts: Tensor, bits: int) -> Quantizer:
    scale = torch.tensor([q.scale for q in quantizers], dtype=torch.float64)[:, None]
    zero_point = torch.tensor([q.zero_point for q in quantizers], dtype=torch.float64)[:, None]
    error = (quantize_dequantize(values[None], scale, zero_point, bits) - values).square() @ counts
    return quantizers[int(error.argmin())]


def find_quantizer(
    histogram: ActivationHistogram, *, ranges: str, affine: bool, bits: int = 8, percentile: float = 99.99
) -> Quantizer:
    """The quantizer that the estimator `ranges` ("mse", "minmax", "percentile") gives for a histogram."""
    if ranges not in ESTIMATORS:
        raise ValueError(f"{ranges} is no range estimator")
    if ranges == "mse":
        return mse_quantizer(histogram, affine=affine, bits=bits)
    low, high = minmax_range(histogram) if ranges == "minmax" else percentile_range(histogram, percentile)
    return quantizer_from_range(low, high, affine=affine)
