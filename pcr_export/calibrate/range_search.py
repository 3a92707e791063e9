"""`--ranges auto`: the range estimator whose scales do least to final latents that they were not found from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import Tensor

from pcr_export.calibrate.canonical_batches import Batch, canonical_batches
from pcr_export.calibrate.ranges import Quantizer
from pcr_export.calibrate.simulate import Simulation, simulated_call
from pcr_export.calibrate.site_observer import Calibration, Histograms, Observe
from pcr_export.calibrate.weights.rounding import NEAREST_8
from pcr_export.models.denoiser import Denoiser, Inputs, sample
from pcr_export.progress import Track, silent
from pcr_export.recipe import ESTIMATORS, Recipe
from pcr_export.sites import Layer
from pcr_export.stages import Facts, Key, Stages
from pcr_export.step_scales import StepScales

Rows = dict[float, dict[str, Quantizer]]  # by timestep


@dataclass(frozen=True, kw_only=True)
class RangeSearch:
    """One search: the network, the prompts that scales are found from and those that judge them, and where it keeps what is done.

    A clipped activation is a bias, and biases add up over the steps, so an error of one call tells nothing here: each estimator's
    scales run to the final latents. They are those of the float trajectories, for one pass over these serves all estimators, and of
    8-bit weights, for what is compared are activations. Min-max clips nothing of what it has seen, so the judges are other samples.
    """

    denoiser: Denoiser
    layers: Sequence[Layer]
    observed: Batch  # any number of conditions and seeds
    judged: Batch
    recipe: Recipe
    folder: Path
    key: Key
    resume: bool = True
    track: Track = silent
    log: Callable[[str], None] = field(default=lambda _line: None)

    def run(self) -> Facts:
        """{"ranges": the best estimator, "range_sqnr_db": {estimator: dB}}, the mean SQNR of the judges' final latents.

        A stopped search goes on with the next estimator.
        """
        stages = Stages(self.folder, resume=self.resume, log=self.log)
        trials = {name: stages.run(f"ranges_{name}", self.key, [], partial(self._measure, name)) for name in ESTIMATORS}
        decibels = {name: facts["sqnr_db"] for name, facts in trials.items()}
        return {"ranges": max(decibels, key=lambda name: decibels[name]), "range_sqnr_db": decibels}

    def _measure(self, ranges: str) -> Facts:
        table = self._tables[ranges]
        with Simulation(self.denoiser, self.layers, NEAREST_8) as simulation:
            call = simulated_call(simulation, table, self.denoiser.timestep)
            found = self._final_latents(call, f"{ranges} ranges")
        return {"sqnr_db": _mean_sqnr_db(self._float_latents, found)}

    @cached_property
    def _float_latents(self) -> Tensor:
        return self._final_latents(self.denoiser, "float model")

    @torch.inference_mode()
    def _final_latents(self, call: Callable[[Inputs], Tensor], description: str) -> Tensor:
        """Of the judges, float32 [samples, ...]."""
        batches = canonical_batches(*self.judged, self.recipe)
        with self.track(description, len(batches) * len(self.denoiser.timesteps)) as advance:

            def counted(inputs: Inputs) -> Tensor:
                advance(1)
                return call(inputs)

            return torch.cat([sample(self.denoiser, counted, *batch) for batch in batches])

    @cached_property
    @torch.inference_mode()
    def _tables(self) -> dict[str, StepScales]:
        """By estimator, from the float trajectories of `observed`; the histograms of one step at a time are in memory."""
        calibrations = {
            name: Calibration(self.denoiser, self.layers, replace(self.recipe, ranges=name)) for name in ESTIMATORS
        }
        steps = next(iter(calibrations.values())).timesteps
        rows: dict[str, Rows] = {name: {} for name in ESTIMATORS}
        timesteps = self.denoiser.timesteps
        walks = [self.denoiser.walk(*batch) for batch in canonical_batches(*self.observed, self.recipe)]
        inputs = [next(walk) for walk in walks]
        with (
            Simulation(self.denoiser, self.layers, None) as simulation,
            self.track("float trajectories", len(walks) * len(timesteps)) as advance,
        ):
            for index, timestep in enumerate(timesteps):
                step, histograms, outputs = steps.index(timestep), Histograms(), []
                for batch in inputs:
                    outputs.append(simulation.run(batch, Observe(histograms, step)))
                    advance(1)
                for name, calibration in calibrations.items():
                    if timestep not in rows[name]:
                        rows[name][timestep] = calibration.find_all(histograms, calibration.bits[step])
                if index < len(timesteps) - 1:
                    inputs = [walk.send(output) for walk, output in zip(walks, outputs, strict=True)]
        return {name: each.table([rows[name][timestep] for timestep in steps]) for name, each in calibrations.items()}


def _mean_sqnr_db(reference: Tensor, found: Tensor) -> float:
    """The mean over samples: one that takes another way to its picture does not outweigh all others."""
    error = (found - reference).double().square().flatten(1).sum(1).clamp(min=1e-30)
    energy = reference.double().square().flatten(1).sum(1).clamp(min=1e-30)
    return round((10 * torch.log10(energy / error)).mean().item(), 4)
