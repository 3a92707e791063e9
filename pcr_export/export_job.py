"""What one export is made of: the job as it was asked for, and what later stages need of what is done."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pcr_export.calibrate.weights.rounding import RoundWeight
from pcr_export.engine_settings import EngineSettings
from pcr_export.errors import PcrExportError
from pcr_export.models.content_hash import seed_text
from pcr_export.models.denoiser import Denoiser, noise_levels
from pcr_export.progress import Track, silent
from pcr_export.prompts import prompt_seeds
from pcr_export.recipe import Recipe
from pcr_export.relaxed_steps import parse_relaxed_steps, searched_mean_bits
from pcr_export.sites import Layer
from pcr_export.stages import Facts, Key, Stages

if TYPE_CHECKING:
    import onnx_ir as ir

MEASURED_PIXELS = 2**18  # prompts that something is measured on, times height and width


@dataclass(frozen=True, kw_only=True)
class Job:
    """One export: what, how and where to. Raises PcrExportError where a relaxed step is none of the denoiser's."""

    denoiser: Denoiser
    recipe: Recipe
    conditions: Sequence[Any]  # the calibration set: prompts, or what the denoiser's walk takes
    folder: Path
    seeds: Sequence[int] | None = None  # one per condition; None: from the conditions' content and the recipe's seed
    weights_folder: Path | None = None  # where learned weights are kept; None: in `folder`
    engines: EngineSettings = field(default_factory=EngineSettings)
    walk_key: Key = field(default_factory=dict)  # hashes of what the walk depends on besides the network and the recipe
    float_graph: Callable[[], ir.Model] | None = None  # of the network, where it is traced already
    resume: bool = True
    validate: bool = True
    track: Track = silent
    log: Callable[[str], None] = field(default=lambda _line: None)

    def __post_init__(self) -> None:
        if searched_mean_bits(self.recipe.relax, self.recipe.relax_bits) is None:
            parse_relaxed_steps(
                self.recipe.relax, len(noise_levels(self.denoiser.timesteps))
            )  # before anything is calibrated

    def within_calib_size(self) -> Job:
        """The job with recipe.calib_size of its conditions, drawn as prompts are; all, in their order, where there are no more."""
        size, seeds = self.recipe.calib_size, self.noise_seeds()
        if len(self.conditions) <= size or len(seeds) != len(self.conditions):
            return self
        self.log(f"calibrating on {size} of {len(self.conditions)} conditions (calib_size)")
        chosen = random.Random(self.recipe.seed).sample(range(len(self.conditions)), size)
        return replace(self, conditions=[self.conditions[i] for i in chosen], seeds=[seeds[i] for i in chosen])

    def noise_seeds(self) -> Sequence[int]:
        """One seed per condition. Raises PcrExportError where they are not as many, or a condition's content can't be told."""
        if self.seeds is None:
            return prompt_seeds([seed_text(condition) for condition in self.conditions], self.recipe.seed)
        if len(self.seeds) != len(self.conditions):
            raise PcrExportError(f"{len(self.seeds)} seeds for {len(self.conditions)} conditions: give one for each")
        return self.seeds

    def measured_batch(self, most: int, least: int = 1) -> tuple[Sequence[Any], Sequence[int]]:
        """The first conditions and their seeds: `most`, or as many as MEASURED_PIXELS allow, but `least`."""
        count = max(least, min(most, MEASURED_PIXELS // (self.recipe.height * self.recipe.width)))
        return self.conditions[:count], self.noise_seeds()[:count]

    def judging_batch(self, count: int) -> tuple[Sequence[Any], Sequence[int]]:
        """The last `count` conditions with other noise than `noise_seeds`: new samples even where the first conditions are the same."""
        conditions = self.conditions[-count:]
        return conditions, prompt_seeds([seed_text(condition) for condition in conditions], self.recipe.seed + 1)


@dataclass(frozen=True, kw_only=True)
class Exported:
    """An export so far: what later stages and the report need."""

    denoiser: Denoiser  # what was quantized: the job's, its network rewritten where the recipe tells to
    layers: list[Layer]
    rounding: RoundWeight
    stages: Stages
    key: Key  # of the quantized graph
    weights: Facts  # {"layers", "seconds"} of learning their rounding
    calibration: Facts
    relaxed: Facts  # which steps, and where they were searched the errors of that choice
    sensitivities: dict[str, float]  # by layer, where layers that stay float were searched
    graph: Facts
    engines: list[Facts]  # of TensorRT
    float_graph: Callable[[], ir.Model]  # traced where it is first needed
    warnings: list[str]  # of what may not be as it was meant
    parts: Facts = field(
        default_factory=dict
    )  # by text encoder and half of the VAE, where their weights are stored smaller
