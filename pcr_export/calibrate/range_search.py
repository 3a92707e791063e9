"""`--ranges auto`: the range estimator whose scales do least to the final latents of a few calibration prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pcr_export.calibrate.canonical_batches import canonical_batches
from pcr_export.calibrate.progressive import calibrate
from pcr_export.calibrate.simulate import Simulation, simulated_call
from pcr_export.calibrate.state import CalibrationState
from pcr_export.calibrate.weights.rounding import NEAREST_8
from pcr_export.models.denoiser import Denoiser, Inputs, sample
from pcr_export.progress import Track, silent
from pcr_export.recipe import ESTIMATORS, Recipe
from pcr_export.sites import Layer
from pcr_export.stages import Facts, Key, Stages, key_hash


@dataclass(frozen=True, kw_only=True)
class RangeSearch:
    """One search: the network, the calibration prompts it is measured on, and where it keeps what is done.

    Each estimator is tried by a whole calibration on these prompts, with 8-bit weights: what is compared are activations. A clipped
    activation is a bias, and biases add up over the steps, so an error of one call tells nothing here.
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

        A stopped search goes on with the step that it was in.
        """
        stages = Stages(self.folder, resume=self.resume, log=self.log)
        trials = {name: stages.run(f"ranges_{name}", self.key, [], partial(self._measure, name)) for name in ESTIMATORS}
        decibels = {name: facts["sqnr_db"] for name, facts in trials.items()}
        return {"ranges": max(decibels, key=lambda name: decibels[name]), "range_sqnr_db": decibels}

    def _measure(self, ranges: str) -> Facts:
        recipe, name = replace(self.recipe, ranges=ranges), self.denoiser.timestep
        state = CalibrationState(self.folder / f"ranges_{ranges}_calls", key_hash({**self.key, "ranges": ranges}))
        if not self.resume:
            state.clear()
        scales = calibrate(
            self.denoiser,
            self.layers,
            self.conditions,
            self.seeds,
            recipe,
            round_weight=NEAREST_8,
            state=state,
            track=self.track,
        )
        with Simulation(self.denoiser, self.layers, NEAREST_8) as simulation:
            found = self._final_latents(simulated_call(simulation, scales, name), f"{ranges} ranges")
        state.clear()
        return {"sqnr_db": _mean_sqnr_db(self._float_latents, found)}

    @cached_property
    def _float_latents(self) -> Tensor:
        return self._final_latents(self.denoiser, "float trajectories")

    @torch.inference_mode()
    def _final_latents(self, call: Callable[[Inputs], Tensor], description: str) -> Tensor:
        """float32 [prompts, ...]."""
        batches = canonical_batches(self.conditions, self.seeds, self.recipe)
        with self._counted(call, description, len(batches)) as counted:
            return torch.cat([sample(self.denoiser, counted, *batch) for batch in batches])

    @contextmanager
    def _counted(
        self, call: Callable[[Inputs], Tensor], description: str, batches: int
    ) -> Iterator[Callable[[Inputs], Tensor]]:
        with self.track(description, batches * len(self.denoiser.timesteps)) as advance:

            def counted(inputs: Inputs) -> Tensor:
                advance(1)
                return call(inputs)

            yield counted


def _mean_sqnr_db(reference: Tensor, found: Tensor) -> float:
    """The mean over samples: one that takes another way to its picture does not outweigh all others."""
    error = (found - reference).double().square().flatten(1).sum(1).clamp(min=1e-30)
    energy = reference.double().square().flatten(1).sum(1).clamp(min=1e-30)
    return round((10 * torch.log10(energy / error)).mean().item(), 4)
