"""Step scales from the extremes of a few float calls: enough to exercise a graph."""

from collections.abc import Sequence

import numpy as np
import torch

from pcr_export.calibrate.layers import find_layers
from pcr_export.models.denoiser import Denoiser, Inputs
from pcr_export.sites import Layer
from pcr_export.step_scales import StepScales


@torch.no_grad()
def min_max_scales(
    denoiser: Denoiser,
    inputs: Inputs,
    timesteps: Sequence[float],
    *,
    bits: Sequence[int] | None = None,
    skip: Sequence[str] = ("*conv_in", "*conv_out"),
) -> tuple[StepScales, list[Layer]]:
    layers = find_layers(denoiser, inputs, skip)
    quantized = [layer for layer in layers if layer.site is not None]
    sites = tuple(dict.fromkeys(str(layer.site) for layer in quantized))
    low, high = (np.zeros((len(timesteps), len(sites))) for _ in range(2))
    modules = dict(denoiser.network.named_modules())
    step = 0

    def observe(column: int, x: torch.Tensor) -> None:
        low[step, column] = min(low[step, column], float(x.min()))
        high[step, column] = max(high[step, column], float(x.max()))

    handles = [
        modules[site].register_forward_pre_hook(lambda _module, args, column=column: observe(column, args[0]))
        for column, site in enumerate(sites)
    ]
    for step, timestep in enumerate(timesteps):  # noqa: B007 - observe reads it
        denoiser({**inputs, denoiser.timestep: torch.tensor(float(timestep))})
    for handle in handles:
        handle.remove()
    symmetric = np.array([any(not each.affine for each in quantized if each.site == site) for site in sites])
    span = np.where(symmetric, np.maximum(-low, high) * 255 / 127, high - low)
    scale = np.maximum(span / 255, 1e-6).astype(np.float32)
    zero = np.where(symmetric, 128, np.clip(np.rint(-low / scale), 0, 255)).astype(np.uint8)
    scales = StepScales(
        scale=scale,
        zero_point=zero,
        bits=np.array([8] * len(timesteps) if bits is None else bits, np.uint8),
        timesteps=np.array(timesteps, np.float32),
        sites=sites,
        layers={layer.name: str(layer.site) for layer in quantized},
    )
    return scales, layers


def feed(inputs: Inputs, **changed: torch.Tensor) -> dict[str, np.ndarray]:
    """Inputs as an engine takes them."""
    return {name: value.numpy() for name, value in {**inputs, **changed}.items()}


def sqnr_db(reference: np.ndarray, value: np.ndarray) -> float:
    noise = np.square(reference - value, dtype=np.float64).sum()
    return float(10 * np.log10(np.square(reference, dtype=np.float64).sum() / max(noise, 1e-300)))
