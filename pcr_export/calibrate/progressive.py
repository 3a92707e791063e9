"""PCR's progressive calibration (arXiv 2311.06322, section 3.2) and the two baselines that it is measured against."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pcr_export.calibrate.ranges import ActivationHistogram, Quantizer, find_quantizer
from pcr_export.calibrate.simulate import QuantizeSites, Simulation
from pcr_export.calibrate.state import CalibrationState, CallRecord
from pcr_export.errors import PcrExportError
from pcr_export.models.denoiser import Denoiser, Inputs, Walk
from pcr_export.progress import Advance, Track, silent
from pcr_export.recipe import Recipe
from pcr_export.relaxed_steps import parse_relaxed_steps
from pcr_export.sites import Layer
from pcr_export.step_scales import StepScales

Histograms = dict[str, ActivationHistogram]


class _Observe:
    """A visit that counts the activations of every site and leaves them as they are."""

    def __init__(self, histograms: Histograms) -> None:
        self._histograms = histograms
        self._seen: set[str] = set()

    def __call__(self, site: str, x: Tensor) -> tuple[Tensor, float]:
        if site not in self._seen:  # further layers read the same tensor
            self._seen.add(site)
            _count(self._histograms.setdefault(site, ActivationHistogram()), site, x)
        return x, 1.0


def _count(histogram: ActivationHistogram, site: str, x: Tensor) -> None:
    try:
        histogram.update(x)
    except ValueError as error:
        raise PcrExportError(
            f"site {site}: {error}: the model overflows on a calibration prompt or its weights are damaged"
        ) from error


class _Calibration:
    """Settings that every step of one calibration shares."""

    def __init__(self, denoiser: Denoiser, layers: Sequence[Layer], recipe: Recipe) -> None:
        self.denoiser = denoiser
        self.recipe = recipe
        self.readers = {layer.name: layer.site for layer in layers if layer.site is not None}
        self.affine = {layer.site: layer.affine and recipe.affine for layer in layers if layer.site is not None}
        self.timesteps = list(dict.fromkeys(denoiser.timesteps))  # of the table: a repeated timestep has one row
        if self.timesteps != sorted(self.timesteps, reverse=True):
            raise PcrExportError("the scheduler's timesteps do not descend: use another scheduler")
        relaxed = parse_relaxed_steps(recipe.relax, len(self.timesteps))
        self.bits = [recipe.relax_bits if step in relaxed else 8 for step in range(len(self.timesteps))]

    def find(self, site: str, histogram: ActivationHistogram, bits: int) -> Quantizer:
        return find_quantizer(
            histogram, ranges=self.recipe.ranges, affine=self.affine[site], bits=bits, percentile=self.recipe.percentile
        )

    def find_all(self, histograms: Histograms, bits: int) -> dict[str, Quantizer]:
        return {site: self.find(site, histograms[site], bits) for site in self.affine}

    def table(self, rows: Sequence[dict[str, Quantizer]]) -> StepScales:
        sites = tuple(self.affine)
        return StepScales(
            scale=np.array([[row[site].scale for site in sites] for row in rows], dtype=np.float32),
            zero_point=np.array([[row[site].zero_point for site in sites] for row in rows], dtype=np.uint8),
            bits=np.array(self.bits, dtype=np.uint8),
            timesteps=np.array(self.timesteps, dtype=np.float32),
            sites=sites,
            layers=self.readers,
        )


def calibrate(
    denoiser: Denoiser,
    layers: Sequence[Layer],
    conditions: Sequence[Any],
    seeds: Sequence[int],
    recipe: Recipe,
    *,
    state: CalibrationState | None = None,
    track: Track = silent,
) -> StepScales:
    """Find the activation quantizers of every step and site, by `recipe.scheme`.

    "progressive": step t is observed while every step before it ran quantized, weights included. Where all conditions fit one batch
    (calib_size <= calib_batch) that takes one pass: each layer is observed on inputs whose upstream layers are already quantized, then
    quantized, in the same forward: T calls. Otherwise each batch is observed, then advanced with the row found from all of them: 2T-1
    calls per batch. "float-trajectory": per step, observed on the float model. "static": the same, one row for all steps.

    Args:
        conditions, seeds: the calibration set; any length, one seed each.
        state: where finished steps are kept and resumed from ("progressive" only).

    Raises:
        PcrExportError: an activation is NaN or infinite (the site is named), or the timesteps do not descend.
    """
    calibration = _Calibration(denoiser, layers, recipe)
    size = recipe.calib_batch
    batches = [(conditions[i : i + size], seeds[i : i + size]) for i in range(0, len(conditions), size)]
    walks = [denoiser.walk(*batch) for batch in batches]
    if recipe.scheme == "progressive":
        with Simulation(denoiser, layers, recipe.weight_bits) as simulation:
            return _progressive(calibration, simulation, walks, state, track)
    with Simulation(denoiser, layers, None) as simulation:
        return _from_float(calibration, simulation, walks, track)


@torch.inference_mode()
def _progressive(
    calibration: _Calibration, simulation: Simulation, walks: list[Walk], state: CalibrationState | None, track: Track
) -> StepScales:
    timesteps = calibration.denoiser.timesteps
    inputs = [next(walk) for walk in walks]
    rows: dict[float, dict[str, Quantizer]] = {}
    records = state.read() if state else []
    with track("calibrating", num_unet_calls(timesteps, len(walks))) as advance:
        for index, timestep in enumerate(timesteps):
            last = index == len(timesteps) - 1
            if index < len(records):
                record = records[index]
                advance(len(walks) * _calls_of(index, timesteps, len(walks)))
            else:
                record = _calibrate_call(calibration, simulation, inputs, rows.get(timestep), timestep, last, advance)
                if state:
                    state.write(index, record)
            rows[timestep] = record.quantizers
            if not last:
                inputs = [walk.send(output.clone()) for walk, output in zip(walks, record.outputs, strict=True)]
    return calibration.table([rows[timestep] for timestep in calibration.timesteps])


def _calibrate_call(
    calibration: _Calibration,
    simulation: Simulation,
    inputs: list[Inputs],
    row: dict[str, Quantizer] | None,
    timestep: float,
    last: bool,
    advance: Advance,
) -> CallRecord:
    """One call of the trajectory on every batch: find the step's row unless it has one, then run quantized."""
    bits = calibration.bits[calibration.timesteps.index(timestep)]
    if row is None and len(inputs) == 1:
        return _observe_and_quantize(calibration, simulation, inputs[0], bits, advance)
    if row is None:
        histograms: Histograms = {}
        for batch in inputs:
            simulation.run(batch, _Observe(histograms))
            advance(1)
        row = calibration.find_all(histograms, bits)
    outputs = []
    for batch in inputs if not last else ():
        outputs.append(simulation.run(batch, QuantizeSites(row, bits)))
        advance(1)
    return CallRecord(outputs, row)


def _observe_and_quantize(
    calibration: _Calibration, simulation: Simulation, inputs: Inputs, bits: int, advance: Advance
) -> CallRecord:
    """One pass: every site is observed behind already quantized layers, then quantized, in one forward."""
    row: dict[str, Quantizer] = {}

    def visit(site: str, x: Tensor) -> tuple[Tensor, float]:
        if site not in row:
            histogram = ActivationHistogram()
            _count(histogram, site, x)
            row[site] = calibration.find(site, histogram, bits)
        return QuantizeSites(row, bits)(site, x)

    output = simulation.run(inputs, visit)
    advance(1)
    return CallRecord([output], {site: row[site] for site in calibration.affine})


@torch.inference_mode()
def _from_float(calibration: _Calibration, simulation: Simulation, walks: Iterable[Walk], track: Track) -> StepScales:
    """Per-step histograms on the trajectories of the float model; "static" gives every step the quantizers of their sum."""
    static = calibration.recipe.scheme == "static"
    histograms: dict[float, Histograms] = {}
    walks = list(walks)
    with track("calibrating", len(walks) * len(calibration.denoiser.timesteps)) as advance:
        inputs = [next(walk) for walk in walks]
        for index, timestep in enumerate(calibration.denoiser.timesteps):
            step_histograms = histograms.setdefault(0.0 if static else timestep, {})
            outputs = []
            for batch in inputs:
                outputs.append(simulation.run(batch, _Observe(step_histograms)))
                advance(1)
            if index < len(calibration.denoiser.timesteps) - 1:
                inputs = [walk.send(output) for walk, output in zip(walks, outputs, strict=True)]
    return calibration.table(
        [
            calibration.find_all(histograms[0.0 if static else timestep], bits)
            for timestep, bits in zip(calibration.timesteps, calibration.bits, strict=True)
        ]
    )


def num_unet_calls(timesteps: Sequence[float], num_batches: int) -> int:
    """Denoiser calls of a progressive calibration: T in one pass, at most 2T-1 per batch otherwise."""
    return num_batches * sum(_calls_of(index, timesteps, num_batches) for index in range(len(timesteps)))


def _calls_of(index: int, timesteps: Sequence[float], num_batches: int) -> int:
    """Calls per batch at call `index`: observe where the timestep is new, advance unless it is the last."""
    new = timesteps[index] not in timesteps[:index]
    if num_batches == 1 and new:
        return 1
    return int(new) + int(index < len(timesteps) - 1)
