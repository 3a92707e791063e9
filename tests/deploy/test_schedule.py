"""One warning for each schedule that was not calibrated, none for the one that was."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from pcr_export.deploy.schedule import ScheduleWatch
from pcr_export.errors import PcrExportError, ScheduleWarning
from pcr_export.step_scales import StepScales, write_step_scales

CALIBRATED = (951.0, 701.0, 451.0, 201.0)


def write_scales(folder: Path, timesteps: Sequence[float] = CALIBRATED) -> None:
    scales = StepScales(
        scale=np.ones((4, 1), np.float32),
        zero_point=np.full((4, 1), 128, np.uint8),
        bits=np.full(4, 8, np.uint8),
        timesteps=np.array(timesteps, np.float32),
        sites=("conv",),
        layers={"conv": "conv"},
    )
    write_step_scales(scales, folder / "step_scales.safetensors")


def warnings_of(watch: ScheduleWatch, *timesteps: float) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for timestep in timesteps:
            watch.see(timestep)
    assert all(warning.category is ScheduleWarning for warning in caught)
    return [str(warning.message) for warning in caught]


def test_each_new_schedule_is_warned_of_once(tmp_path: Path) -> None:
    write_scales(tmp_path)
    watch = ScheduleWatch(tmp_path)
    assert warnings_of(watch, *CALIBRATED, *CALIBRATED) == []
    assert warnings_of(watch, 451.0, 201.0) == []  # the end of it, as image-to-image walks it
    assert warnings_of(watch, 951.3, 700.6) == []  # the same schedule, rounded
    other = (951.0, 800.0, 600.0, 600.0, 451.0)
    (line,) = warnings_of(watch, *other)
    assert line.startswith(
        "timestep 800 is none of the 4 calibrated ones, so this schedule runs with the scales of the "
    )
    assert "(here 701)" in line
    assert "\n" not in line
    assert warnings_of(watch, *other, *CALIBRATED, *other) == []
    assert len(warnings_of(watch, 951.0, 800.0, 500.0, 300.0)) == 1  # another one, which shares a timestep with it


@pytest.mark.parametrize(
    ("calibrated", "other"),
    [
        ((1.0, 0.75, 0.5, 0.25), (1.0, 0.8, 0.6, 0.4, 0.2)),  # of flow matching
        ((1.1, 0.35, -0.4, -1.2), (1.1, 0.5, -0.1, -0.7, -1.2)),  # logarithms of sigma, as EDM schedulers give
    ],
)
def test_times_that_are_no_counts_have_a_rounding_of_their_own_scale(
    calibrated: tuple[float, ...], other: tuple[float, ...], tmp_path: Path
) -> None:
    write_scales(tmp_path, calibrated)
    watch = ScheduleWatch(tmp_path)
    assert warnings_of(watch, *calibrated, *(float(np.float32(each)) for each in calibrated)) == []
    assert len(warnings_of(watch, *other)) == 1


def test_a_schedule_that_does_not_quite_descend_is_one_schedule(tmp_path: Path) -> None:
    """DPM2 ancestral rounds the timestep of a whole step, but not that of the half step before it."""
    write_scales(tmp_path)
    other = (951.0, 785.95, 786.0, 427.49, 427.6, 58.9, 59.0)
    assert len(warnings_of(ScheduleWatch(tmp_path), *other)) == 1
    assert len(warnings_of(ScheduleWatch(tmp_path), *other[:3], *(timestep - 5 for timestep in other))) == 2


def test_a_float_graph_has_no_calibrated_schedule(tmp_path: Path) -> None:
    assert warnings_of(ScheduleWatch(tmp_path), 5.0) == []


def test_damaged_step_scales_are_named(tmp_path: Path) -> None:
    (tmp_path / "step_scales.safetensors").write_bytes(b"{}")
    with pytest.raises(PcrExportError, match=r"step_scales\.safetensors is no readable table .*: export again"):
        ScheduleWatch(tmp_path)
