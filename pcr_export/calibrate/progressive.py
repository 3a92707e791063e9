"""PCR's progressive calibration (arXiv 2311.06322, section 3.2), and the door to the baselines that it is measured against."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from pcr_export.calibrate.canonical_batches import canonical_batches
from pcr_export.calibrate.float_trajectory import calibrate_from_float
from pcr_export.calibrate.ranges import Quantizer
from pcr_export.calibrate.simulate import QuantizeSites, Simulation
from pcr_export.calibrate.site_observer import Calibration, Histograms, Observe
from pcr_export.calibrate.state import CalibrationState, CallRecord
from pcr_export.calibrate.weights.rounding import NearestRounding, RoundWeight
from pcr_export.models.denoiser import Denoiser, Inputs, Walk
from pcr_export.progress import Advance, Track, silent
from pcr_export.recipe import Recipe
from pcr_export.sites import Layer
from pcr_export.step_scales import StepScales

OnCall = Callable[[int, Sequence[Inputs]], None]


def calibrate(
    denoiser: Denoiser,
    layers: Sequence[Layer],
    conditions: Sequence[Any],
    seeds: Sequence[int],
    recipe: Recipe,
    *,
    round_weight: RoundWeight | None = None,
    state: CalibrationState | None = None,
    on_call: OnCall | None = None,
    track: Track = silent,
) -> StepScales:
    """Find the activation quantizers of every step and site, by `recipe.scheme`.

    "progressive": step t is observed while every step before it ran quantized, weights included. At each step every batch is observed,
    with quantized weights and float activations, then advanced with the row found from all of them: 2T-1 calls per batch.
    "float-trajectory": per step, observed on the float model. "static": the same, one row for all steps, from
    `recipe.observed_steps` (see `observed_steps`).

    Args:
        conditions, seeds: the calibration set; any length, one seed each. `canonical_batches` cuts it into batches.
        round_weight: gives the integer weights; None: to nearest with recipe.weight_bits.
        state: where finished steps are kept and resumed from ("progressive" only).
        on_call: told the index and the inputs of each call of the trajectory, a batch each, before it is made ("progressive" only).

    Raises:
        PcrExportError: an activation is NaN or infinite (the site is named), or the timesteps do not descend.
    """
    calibration = Calibration(denoiser, layers, recipe)
    walks = [denoiser.walk(*batch) for batch in canonical_batches(conditions, seeds, recipe)]
    if recipe.scheme == "progressive":
        with Simulation(denoiser, layers, round_weight or NearestRounding(recipe.weight_bits)) as simulation:
            return _progressive(calibration, simulation, walks, state, on_call, track)
    with Simulation(denoiser, layers, None) as simulation:
        return calibrate_from_float(calibration, simulation, walks, track)


@torch.inference_mode()
def _progressive(
    calibration: Calibration,
    simulation: Simulation,
    walks: list[Walk],
    state: CalibrationState | None,
    on_call: OnCall | None,
    track: Track,
) -> StepScales:
    timesteps = calibration.denoiser.timesteps
    inputs = [next(walk) for walk in walks]
    rows: dict[float, dict[str, Quantizer]] = {}
    records = state.read() if state else []
    with track("calibrating", num_unet_calls(timesteps, len(walks))) as advance:
        for index, timestep in enumerate(timesteps):
            last = index == len(timesteps) - 1
            if on_call:
                on_call(index, inputs)
            if index < len(records):
                record = records[index]
                advance(len(walks) * _calls_of(index, timesteps))
            else:
                record = _calibrate_call(calibration, simulation, inputs, rows.get(timestep), timestep, last, advance)
                if state:
                    state.write(index, record)
            rows[timestep] = record.quantizers
            if not last:
                inputs = [walk.send(output.clone()) for walk, output in zip(walks, record.outputs, strict=True)]
    return calibration.table([rows[timestep] for timestep in calibration.timesteps])


def _calibrate_call(
    calibration: Calibration,
    simulation: Simulation,
    inputs: list[Inputs],
    row: dict[str, Quantizer] | None,
    timestep: float,
    last: bool,
    advance: Advance,
) -> CallRecord:
    """One call of the trajectory on every batch: find the step's row unless it has one, then run quantized."""
    step = calibration.timesteps.index(timestep)
    bits = calibration.bits[step]
    if row is None:
        histograms: Histograms = {}
        for batch in inputs:
            simulation.run(batch, Observe(histograms, step))
            advance(1)
        row = calibration.find_all(histograms, bits)
    outputs = []
    for batch in inputs if not last else ():
        outputs.append(simulation.run(batch, QuantizeSites(row, bits)))
        advance(1)
    return CallRecord(outputs, row)


def num_unet_calls(timesteps: Sequence[float], num_batches: int) -> int:
    """Denoiser calls of a progressive calibration: 2T-1 per batch, fewer where a timestep comes twice."""
    return num_batches * sum(_calls_of(index, timesteps) for index in range(len(timesteps)))


def _calls_of(index: int, timesteps: Sequence[float]) -> int:
    """Calls per batch at call `index`: observe where the timestep is new, advance unless it is the last."""
    return int(timesteps[index] not in timesteps[:index]) + int(index < len(timesteps) - 1)
