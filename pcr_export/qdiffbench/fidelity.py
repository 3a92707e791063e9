"""How near the artifact is to the arithmetic that it was calibrated with, and how much of each site its grid loses."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pcr_export.calibrate.ranges import quantize_dequantize
from pcr_export.calibrate.simulate import Simulation, quantizers_of_step
from pcr_export.models.denoiser import Denoiser, Inputs
from pcr_export.progress import Track, silent
from pcr_export.sites import Layer
from pcr_export.step_scales import StepScales


@dataclass(frozen=True)
class Fidelity:
    """SQNRs in dB; infinite where there is no error at all."""

    per_call: list[float]  # artifact against simulation, for every call of a trajectory
    overall: float  # the same over all calls
    sites: dict[str, float]  # the site's quantized activations against what they stand for, over all calls


def sqnr_db(signal: float, noise: float) -> float:
    """10 log10(signal energy / noise energy)."""
    return math.inf if noise == 0 else 10 * math.log10(max(signal, 1e-45) / noise)


class _Energies:
    def __init__(self) -> None:
        self.signal = 0.0
        self.noise = 0.0

    def add(self, exact: Tensor, approximate: Tensor) -> float:
        signal, noise = exact.double().square().sum().item(), (exact - approximate).double().square().sum().item()
        self.signal, self.noise = self.signal + signal, self.noise + noise
        return sqnr_db(signal, noise)

    def db(self) -> float:
        return sqnr_db(self.signal, self.noise)


@torch.inference_mode()
def measure_fidelity(
    denoiser: Denoiser,
    layers: Sequence[Layer],
    scales: StepScales,
    artifact: Callable[[Inputs], Tensor],
    conditions: Sequence[Any],
    seeds: Sequence[int],
    *,
    track: Track = silent,
) -> Fidelity:
    """Walk the simulation's trajectory and give the artifact the same inputs at every call."""
    overall = _Energies()
    sites = {site: _Energies() for site in scales.sites}
    per_call: list[float] = []
    walk = denoiser.walk(conditions, seeds)
    inputs = next(walk)
    with (
        Simulation(denoiser, layers, 8) as simulation,
        track("checking the artifact", len(denoiser.timesteps)) as advance,
    ):
        for index in range(len(denoiser.timesteps)):
            step = scales.nearest_step(float(inputs[denoiser.timestep]))
            quantizers, bits = quantizers_of_step(scales, step), int(scales.bits[step])

            def visit(site: str, x: Tensor, quantizers: Any = quantizers, bits: int = bits) -> Tensor:
                quantized = quantize_dequantize(x, quantizers[site].scale, quantizers[site].zero_point, bits)
                sites[site].add(x, quantized)
                return quantized

            simulated = simulation.run(inputs, visit)
            per_call.append(overall.add(simulated, artifact(inputs)))
            advance(1)
            if index < len(denoiser.timesteps) - 1:
                inputs = walk.send(simulated)
    return Fidelity(per_call, overall.db(), {site: energies.db() for site, energies in sites.items()})
