"""How near the artifact is to the arithmetic that it was calibrated with, and how much of each site its grid loses."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pcr_export.calibrate.simulate import QuantizeSites, Simulation, quantizers_of_step
from pcr_export.calibrate.weights.rounding import NEAREST_8, RoundWeight
from pcr_export.models.denoiser import Denoiser, Inputs
from pcr_export.progress import Track, silent
from pcr_export.sites import Layer
from pcr_export.step_scales import StepScales

ROUNDINGS = 4  # that the sums in front of a site are off by, at most, in units of half its largest value's last place
LARGEST_INTEGER = 128  # of a grid of 8 bits
HALF_LAST_PLACE = 2.0**-24  # of float32, of a value between 1 and 2
MARGIN_DB = 6.0  # twice the error that rounding makes: which activations fall to the other side is chance
MOST_ASKED_DB = (
    40.0  # of an artifact, where no activation fell to the other side at all: one that does may leave so little
)


@dataclass(frozen=True, kw_only=True)
class Fidelity:
    """SQNRs in dB; infinite where there is no error at all."""

    per_call: list[float]  # artifact against simulation, for every call of a trajectory
    overall: float  # the same over all calls
    rounding_floor: float  # simulation against itself with every site a few roundings away: what float32 alone does
    rounding_floor_per_call: list[float]  # the same for every call
    simulation: float  # simulation against the float network: the quantization error itself
    simulation_per_call: list[float]  # the same for every call
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
    round_weight: RoundWeight = NEAREST_8,
    track: Track = silent,
) -> Fidelity:
    """Walk the simulation's trajectory and give the artifact, and the float network, the same inputs at every call.

    Two faithful float32 implementations of a quantized network differ: an activation next to a rounding boundary falls to either
    side, and that grows from layer to layer. `rounding_floor` says how much of the artifact's distance that explains.
    """
    overall, floor, quantization = _Energies(), _Energies(), _Energies()
    floor_per_call: list[float] = []
    generator = torch.Generator().manual_seed(0)
    sites = {site: _Energies() for site in scales.sites}
    per_call: list[float] = []
    calls: list[tuple[Inputs, Tensor]] = []
    walk = denoiser.walk(conditions, seeds)
    inputs = next(walk)
    with (
        Simulation(denoiser, layers, round_weight) as simulation,
        track("checking the artifact", len(denoiser.timesteps)) as advance,
    ):
        for index in range(len(denoiser.timesteps)):
            simulated, nearby = _simulate(simulation, scales, inputs, denoiser.timestep, sites, generator)
            floor_per_call.append(floor.add(simulated, nearby))
            per_call.append(overall.add(simulated, artifact(inputs)))
            calls.append(
                ({name: x.clone() for name, x in inputs.items()}, simulated)
            )  # a walk may change its own in place
            advance(1)
            if index < len(denoiser.timesteps) - 1:
                inputs = walk.send(simulated)
    simulation_per_call = [quantization.add(denoiser(inputs), simulated) for inputs, simulated in calls]
    return Fidelity(
        per_call=per_call,
        overall=overall.db(),
        rounding_floor=floor.db(),
        rounding_floor_per_call=floor_per_call,
        simulation=quantization.db(),
        simulation_per_call=simulation_per_call,
        sites={site: energies.db() for site, energies in sites.items()},
    )


def _simulate(
    simulation: Simulation,
    scales: StepScales,
    inputs: Inputs,
    timestep: str,
    sites: dict[str, _Energies],
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """The simulation's output, and its output where every site is off as by sums in another order; fills `sites`."""
    step = scales.nearest_step(float(inputs[timestep]))
    quantizers = quantizers_of_step(scales, step)
    quantize_sites = QuantizeSites(quantizers, int(scales.bits[step]))

    def visit(site: str, x: Tensor) -> tuple[Tensor, float]:
        quantized, scale = quantize_sites(site, x)
        sites[site].add(x, quantized * scale)
        return quantized, scale

    def visit_nearby(site: str, x: Tensor) -> tuple[Tensor, float]:
        largest = quantizers[site].scale * LARGEST_INTEGER
        chance = (2 * torch.rand(x.shape, generator=generator) - 1).to(x.device)
        return quantize_sites(site, x + chance * (ROUNDINGS * HALF_LAST_PLACE * largest))

    return simulation.run(inputs, visit), simulation.run(inputs, visit_nearby)


def asked_of_artifact(rounding_floor_per_call: Sequence[float | None]) -> list[float]:
    """The SQNR in dB that a right artifact has at every call, and a wrong one hardly has; None (no error) as in the report.

    asked[t] = min(floor[t], mean floor, MOST_ASKED_DB + MARGIN_DB) - MARGIN_DB

    The mean, over the calls' relative errors, is there for networks of few activations: in some calls none of them falls to the
    other side, in others some do, and the artifact's calls are others than the floor's.
    """
    errors = [0.0 if value is None else 10 ** (-value / 10) for value in rounding_floor_per_call]
    mean = sqnr_db(1.0, sum(errors) / len(errors)) if errors else math.inf
    floors = (math.inf if value is None else value for value in rounding_floor_per_call)
    return [round(min(floor, mean, MOST_ASKED_DB + MARGIN_DB) - MARGIN_DB, 2) for floor in floors]
