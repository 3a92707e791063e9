"""Whether the timesteps that a sampler asks for are those that were calibrated: one warning for each schedule that is another."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np

from pcr_export.errors import ScheduleWarning
from pcr_export.step_scales import read_step_scales

ROUNDING = 0.5  # of a timestep of a thousand: schedulers differ in how they round the same schedule
COUNTED_FROM = 500.0  # timesteps of which the largest is smaller are no counts but times, such as 0..1 or log sigmas


class ScheduleWatch:
    """Sees the timesteps of one sampling after another.

    A schedule ends where a timestep is larger than the one before, by more than rounding. It is warned of once, at its first timestep
    that is neither calibrated nor part of a schedule that was sampled before. Part of the calibrated schedule, as image-to-image
    walks it, is none.
    """

    def __init__(self, folder: Path) -> None:
        """Read the calibrated timesteps of an exported folder; a graph beside which there are no step scales is a float one."""
        scales = folder / "step_scales.safetensors"
        self.calibrated = read_step_scales(scales).timesteps if scales.is_file() else None
        largest = 0.0 if self.calibrated is None else float(np.abs(self.calibrated).max())
        self.rounding = ROUNDING * min(1.0, largest / COUNTED_FROM)
        self.last = np.inf
        self.seen: set[float] = set()
        self.warned = False  # of the schedule that is being sampled

    def see(self, timestep: float) -> None:
        """Take note of a call, and warn with a ScheduleWarning where its schedule is a new one."""
        if self.calibrated is None:
            return
        self.warned = self.warned and timestep <= self.last + ROUNDING
        self.last = timestep
        if timestep in self.seen or np.abs(self.calibrated - np.float32(timestep)).min() <= self.rounding:
            return
        self.seen.add(timestep)
        if not self.warned:
            self.warned = True
            nearest = self.calibrated[np.abs(self.calibrated - np.float32(timestep)).argmin()]
            warnings.warn(
                f"timestep {timestep:g} is none of the {len(self.calibrated)} calibrated ones, so this schedule runs with the scales "
                f"of the nearest (here {nearest:g}): export with the scheduler and --steps that you sample with for the best images",
                ScheduleWarning,
                stacklevel=3,
            )
