"""`--ranges auto`: the range estimator whose scales do least to the final latents of a few calibration prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pcr_export.calibrate.canonical_batches import canonical_batches
from pcr_export.calibrate.ranges import Quantizer
from pcr_export.calibrate.simulate import Simulation, simulated_call
from pcr_export.calibrate.site_observer import Calibration, Histograms, Observe
from pcr_export.calibrate.weights.rounding import NEAREST_8
from pcr_export.models.denoiser import Denoiser, Inputs, Walk, sample
from pcr_export.progress import Track, silent
from pcr_export.recipe import ESTIMATORS, Recipe
from pcr_export.sites import Layer
from pcr_export.stages import Facts, Key, Stages
from pcr_export.step_scales import StepScales

Rows = list[dict[str, Quantizer]]


@dataclass(frozen=True, kw_only=True)
class RangeSearch:
    """One search: the network, the calibration prompts it is measured on, and where it keeps what is done.

    A clipped activation is a bias, and biases add up over the steps, so an error of one call tells nothing here: each estimator's
    scales run to the final latents. They are those of the float trajectories, for one pass over these serves all estimators, and of
    8-bit weights, for what is compared are activations.
    """

    denoiser: Denoiser
    layers: Sequence[Layer]
    conditions: Sequence[Any]
    seeds: Sequence[int]
    recipe: Recipe
    folder: Path
    key: Key
    resume: bool = True
    track: Track = silent
    log: Callable[[str], None] = field(default=lambda _line: None)

    def run(self) -> Facts:
        """{"ranges": the best estimator, "range_sqnr_db": {estimator: dB}}, the mean over prompts of their final latents' SQNR.

        A stopped search goes on with the next estimator.
        """
        stages = Stages(self.folder, resume=self.resume, log=self.log)
        trials = {name: stages.run(f"ranges_{name}", self.key, [], partial(self._measure, name)) for name in ESTIMATORS}
        decibels = {name: facts["sqnr_db"] for name, facts in trials.items()}
        return {"ranges": max(decibels, key=lambda name: decibels[name]), "range_sqnr_db": decibels}

    def _measure(self, ranges: str) -> Facts:
        tables, reference = self._float_pass
        with (
            Simulation(self.denoiser, self.layers, NEAREST_8) as simulation,
            self.track(f"{ranges} ranges", self._num_calls) as advance,
        ):
            call = simulated_call(simulation, tables[ranges], self.denoiser.timestep)

            def counted(inputs: Inputs) -> Tensor:
                advance(1)
                return call(inputs)

            found = [sample(self.denoiser, counted, *batch) for batch in self._batches]
        return {"sqnr_db": _mean_sqnr_db(reference, torch.cat(found))}

    @property
    def _batches(self) -> list[tuple[Sequence[Any], Sequence[int]]]:
        return canonical_batches(self.conditions, self.seeds, self.recipe)

    @property
    def _num_calls(self) -> int:
        return len(self._batches) * len(self.denoiser.timesteps)

    @cached_property
    @torch.inference_mode()
    def _float_pass(self) -> tuple[dict[str, StepScales], Tensor]:
        """Each estimator's table, and the float model's final latents; the histograms of one step at a time are in memory."""
        calibrations = {
            name: Calibration(self.denoiser, self.layers, replace(self.recipe, ranges=name)) for name in ESTIMATORS
        }
        steps = next(iter(calibrations.values())).timesteps
        rows: dict[str, Rows] = {name: [] for name in ESTIMATORS}
        walks = [self.denoiser.walk(*batch) for batch in self._batches]
        inputs, latents = [next(walk) for walk in walks], []
        with (
            Simulation(self.denoiser, self.layers, None) as simulation,
            self.track("float trajectories", self._num_calls) as advance,
        ):
            for timestep in self.denoiser.timesteps:
                step, histograms, outputs = steps.index(timestep), Histograms(), []
                for batch in inputs:
                    outputs.append(simulation.run(batch, Observe(histograms, step)))
                    advance(1)
                for name, calibration in calibrations.items():
                    if len(rows[name]) == step:  # a repeated timestep has one row
                        rows[name].append(calibration.find_all(histograms, calibration.bits[step]))
                ends = [_send(walk, output) for walk, output in zip(walks, outputs, strict=True)]
                inputs = [following for following, _ in ends if following is not None]
                latents = [final for _, final in ends if final is not None]
        tables = {name: calibration.table(rows[name]) for name, calibration in calibrations.items()}
        return tables, torch.cat(latents)


def _send(walk: Walk, output: Tensor) -> tuple[Inputs | None, Tensor | None]:
    """The next inputs, or the final latents."""
    try:
        return walk.send(output), None
    except StopIteration as stop:
        return None, stop.value


def _mean_sqnr_db(reference: Tensor, found: Tensor) -> float:
    """The mean over samples: one that takes another way to its picture does not outweigh all others."""
    error = (found - reference).double().square().flatten(1).sum(1).clamp(min=1e-30)
    energy = reference.double().square().flatten(1).sum(1).clamp(min=1e-30)
    return round((10 * torch.log10(energy / error)).mean().item(), 4)
