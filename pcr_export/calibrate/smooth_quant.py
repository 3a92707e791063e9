"""SmoothQuant (arXiv 2211.10438): a part of the activations' outlying channels moves into the weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pcr_export.calibrate.simulate import Simulation
from pcr_export.models.denoiser import Denoiser, sample
from pcr_export.progress import Track
from pcr_export.sites import Layer

LEAST = 1e-5  # of max|x| and max|w|: a channel of zeros is not scaled without bound


class SmoothedLinear(nn.Module):
    """Linear(x, W) = Linear(x / s, W s), s per input channel."""

    def __init__(self, linear: nn.Linear, scale: Tensor) -> None:
        """`scale`: s, float32 [in_features], positive. The weight is copied; `linear` stays as it is."""
        super().__init__()
        self.linear = nn.Linear(linear.in_features, linear.out_features, bias=False)
        self.linear.weight = nn.Parameter(linear.weight.detach() * scale)
        self.linear.bias = linear.bias
        self.inverse: Tensor
        self.register_buffer("inverse", scale.reciprocal())

    def forward(self, input: Tensor) -> Tensor:
        """float32 [..., in_features]; named as Linear's, so that it is called as that was."""
        output: Tensor = self.linear(input * self.inverse)
        return output


def smoothing_scale(activation_peaks: Tensor, weight: Tensor, alpha: float) -> Tensor:
    """s_j = max|x_j|^alpha / max|W_j|^(1 - alpha), float32 [in_features].

    Args:
        activation_peaks: max|x_j|, float32 [in_features].
        weight: float32 [out_features, in_features].
        alpha: 0..1; the share of the difficulty that moves into the weights.
    """
    weight_peaks = weight.abs().amax(dim=0).clamp(min=LEAST)
    return activation_peaks.clamp(min=LEAST) ** alpha / weight_peaks ** (1 - alpha)


def smooth_linears(denoiser: Denoiser, layers: Sequence[Layer], peaks: Mapping[str, Tensor], alpha: float) -> int:
    """Replace every quantized Linear by a SmoothedLinear with a scale of its own; returns how many.

    `peaks` are those of `channel_peaks`, by site. The network of `denoiser` is changed.
    """
    smoothed = [layer for layer in layers if layer.site is not None and layer.op == "Linear"]
    for layer in smoothed:
        linear = denoiser.network.get_submodule(layer.name)
        assert isinstance(linear, nn.Linear)
        scale = smoothing_scale(peaks[str(layer.site)], linear.weight.detach(), alpha)
        denoiser.network.set_submodule(layer.name, SmoothedLinear(linear, scale))
    return len(smoothed)


@torch.inference_mode()
def channel_peaks(
    denoiser: Denoiser,
    layers: Sequence[Layer],
    conditions: Sequence[Any],
    seeds: Sequence[int],
    batch: int,
    track: Track,
) -> dict[str, Tensor]:
    """max|x| of every channel of every site that a Linear reads, over the float trajectories; site -> float32 [channels]."""
    sites = {layer.site for layer in layers if layer.site is not None and layer.op == "Linear"}
    peaks: dict[str, Tensor] = {}

    def visit(site: str, x: Tensor) -> tuple[Tensor, float]:
        if site in sites:
            peak = x.abs().flatten(0, -2).amax(dim=0)
            peaks[site] = torch.maximum(peaks[site], peak) if site in peaks else peak
        return x, 1.0

    starts = range(0, len(conditions), batch)
    with Simulation(denoiser, layers, None) as simulation, track("smoothing", len(starts)) as advance:
        for start in starts:
            part = slice(start, start + batch)
            sample(denoiser, lambda inputs: simulation.run(inputs, visit), conditions[part], seeds[part])
            advance(1)
    return peaks
