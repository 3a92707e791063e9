"""What every calibration shares: counting a site's activations, its quantizer, and the rows of the table."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from pcr_export.calibrate.ranges import ActivationHistogram, Quantizer, find_quantizer
from pcr_export.errors import PcrExportError
from pcr_export.models.denoiser import Denoiser, noise_levels
from pcr_export.recipe import Recipe
from pcr_export.relaxed_steps import parse_relaxed_steps
from pcr_export.sites import Layer
from pcr_export.step_scales import StepScales

Histograms = dict[str, ActivationHistogram]


class Observe:
    """A visit at one step that counts the activations of every site, `weight` times, and leaves them as they are."""

    def __init__(self, histograms: Histograms, step: int, weight: int = 1) -> None:
        self._histograms = histograms
        self._step = step
        self._weight = weight
        self._seen: set[str] = set()

    def __call__(self, site: str, x: Tensor) -> tuple[Tensor, float]:
        """Count `x` unless another layer has read the same tensor."""
        if site not in self._seen:
            self._seen.add(site)
            count_activations(
                self._histograms.setdefault(site, ActivationHistogram()), site, self._step, x, self._weight
            )
        return x, 1.0


def count_activations(histogram: ActivationHistogram, site: str, step: int, x: Tensor, weight: int = 1) -> None:
    """Count `x` in a site's histogram. Raises PcrExportError that names site and step where x is not finite."""
    try:
        histogram.update(x, weight)
    except ValueError as error:
        raise PcrExportError(
            f"site {site}, step {step}: {error}: the model overflows on a calibration prompt or its weights are damaged"
        ) from error


class Calibration:
    """Settings that every step of one calibration shares."""

    def __init__(self, denoiser: Denoiser, layers: Sequence[Layer], recipe: Recipe) -> None:
        self.denoiser = denoiser
        self.recipe = recipe
        self.readers = {layer.name: layer.site for layer in layers if layer.site is not None}
        self.affine = {layer.site: layer.affine and recipe.affine for layer in layers if layer.site is not None}
        self.convolutions = {layer.site for layer in layers if layer.site is not None and layer.op == "Conv2d"}
        self.timesteps = noise_levels(denoiser.timesteps)  # of the table's rows
        if denoiser.timesteps[0] < denoiser.timesteps[-1]:
            raise PcrExportError("the scheduler's timesteps do not descend: use another scheduler")
        relaxed = parse_relaxed_steps(recipe.relax, len(self.timesteps))
        self.bits = [
            recipe.relax_bits if step in relaxed else recipe.activation_bits for step in range(len(self.timesteps))
        ]

    def find(self, site: str, histogram: ActivationHistogram, bits: int) -> Quantizer:
        """The quantizer of one site by the recipe's range estimator."""
        return find_quantizer(
            histogram, ranges=self.recipe.ranges, affine=self.affine[site], bits=bits, percentile=self.recipe.percentile
        )

    def find_all(self, histograms: Histograms, bits: int) -> dict[str, Quantizer]:
        """A row of the table from a histogram per site."""
        return {site: self.find(site, histograms[site], bits) for site in self.affine}

    def table(self, rows: Sequence[dict[str, Quantizer]]) -> StepScales:
        """The table of one row per timestep, noisiest first."""
        sites = tuple(self.affine)
        return StepScales(
            scale=np.array([[row[site].scale for site in sites] for row in rows], dtype=np.float32),
            zero_point=np.array([[row[site].zero_point for site in sites] for row in rows], dtype=np.uint8),
            bits=np.array(self.bits, dtype=np.uint8),
            timesteps=np.array(self.timesteps, dtype=np.float32),
            sites=sites,
            layers=self.readers,
        )
