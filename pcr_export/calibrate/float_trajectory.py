"""The baselines of PCR: ranges from the trajectories of the float model, a row for each step or one row for all of them."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from pcr_export.calibrate.ranges import Quantizer, quantizer_from_range
from pcr_export.calibrate.simulate import Simulation, Visit
from pcr_export.calibrate.site_observer import Calibration, Histograms, Observe
from pcr_export.models.denoiser import Walk
from pcr_export.progress import Track
from pcr_export.recipe import Recipe, parse_observed_steps
from pcr_export.step_scales import StepScales

NORMAL_MEAN, NORMAL_DEVIATION = 0.4, 0.4  # of PTQ4DM's time t / T, t = 0 the cleanest
Peaks = dict[str, dict[int, list[float]]]  # site -> step -> max|x| of every call


def observed_steps(recipe: Recipe, num_steps: int) -> Mapping[int, int]:
    """How often each step is counted, steps that are not observed left out; step 0 = noisiest.

    "all": each once. "uniform:n" (Q-Diffusion, arXiv 2302.04304): n evenly spaced ones, both ends included. "normal:n" (PTQ4DM,
    arXiv 2211.15736): n draws of t ~ N(0.4 T, 0.4 T), redrawn where no step is there, from the recipe's seed.
    """
    kind, count = parse_observed_steps(recipe.observed_steps, num_steps)
    if kind == "normal":
        return _draw_normal(count, num_steps, recipe.seed)
    return Counter(np.linspace(0, num_steps - 1, count).round().astype(int).tolist())


def _draw_normal(count: int, num_steps: int, seed: int) -> Mapping[int, int]:
    generator = np.random.default_rng(seed)
    steps: list[int] = []
    while len(steps) < count:
        t = int(np.floor(generator.normal(NORMAL_MEAN, NORMAL_DEVIATION) * num_steps))
        if 0 <= t < num_steps:
            steps.append(num_steps - 1 - t)
    return Counter(sorted(steps))


class _ObservePeaks:
    """A visit that counts as `observe` does and keeps max|x| of every site in this call of a step."""

    def __init__(self, observe: Observe, peaks: Peaks, step: int) -> None:
        self._observe = observe
        self._peaks = peaks
        self._step = step
        self._seen: set[str] = set()

    def __call__(self, site: str, x: Tensor) -> tuple[Tensor, float]:
        if site not in self._seen:
            self._seen.add(site)
            self._peaks.setdefault(site, {}).setdefault(self._step, []).append(x.abs().max().item())
        return self._observe(site, x)


@torch.inference_mode()
def calibrate_from_float(
    calibration: Calibration, simulation: Simulation, walks: Sequence[Walk], track: Track
) -> StepScales:
    """Histograms on the trajectories of the float model, per step, or for "static" one over the observed steps."""
    static = calibration.recipe.scheme == "static"
    weights = observed_steps(calibration.recipe, len(calibration.timesteps))
    histograms: dict[int, Histograms] = defaultdict(dict)  # by row: a step, or 0 for all
    peaks: Peaks = {}
    timesteps = calibration.denoiser.timesteps
    with track("calibrating", len(walks) * len(timesteps)) as advance:
        inputs = [next(walk) for walk in walks]
        for index, timestep in enumerate(timesteps):
            step = calibration.timesteps.index(timestep)
            outputs = []
            for batch in inputs:
                visit: Visit | None = None
                if step in weights:
                    observe = Observe(histograms[0 if static else step], step, weights[step])
                    visit = observe if calibration.recipe.reduce == "pooled" else _ObservePeaks(observe, peaks, step)
                outputs.append(simulation.run(batch, visit))
                advance(1)
            if index < len(timesteps) - 1:
                inputs = [walk.send(output) for walk, output in zip(walks, outputs, strict=True)]
    if not static:
        return calibration.table([calibration.find_all(histograms[i], bits) for i, bits in enumerate(calibration.bits)])
    row_of_bits = {bits: calibration.find_all(histograms[0], bits) for bits in set(calibration.bits)}
    for row in row_of_bits.values() if peaks else ():
        row |= _min_mean_row(peaks, calibration.convolutions)
    return calibration.table([row_of_bits[bits] for bits in calibration.bits])


def _min_mean_row(peaks: Peaks, sites: set[str]) -> dict[str, Quantizer]:
    """Of each site the symmetric range of  min over steps of (mean over calls of max|x|)  (ModelOpt's "min-mean").

    ModelOpt divides the sum over calls by the number of steps: at the 16 calls and 20 steps of its SDXL example, 0.8 of this mean.
    """
    row = {}
    for site in sites:
        peak = min(float(np.mean(calls)) for calls in peaks[site].values())
        row[site] = quantizer_from_range(-peak, peak, affine=False)
    return row
