"""This step's row of the tables, for a quantizer of scale 1 behind float16 data."""

from __future__ import annotations

import numpy as np

from pcr_export.graph.job import Job
from pcr_export.graph.passes.gather_scales import gather_row
from pcr_export.step_scales import ZERO_POINT_SYMMETRIC


class GatherQdqScales:
    """What LowerToQdq reads, by site, each [1]:

    scale s float32;    offset k = 128 - zero_point float32, where a step's is not 0
    """

    def apply(self, job: Job) -> int:
        """Emit behind the step; returns the number of affine sites."""
        scales = job.scales
        offset = (ZERO_POINT_SYMMETRIC - scales.zero_point.astype(np.int16)).astype(np.float32)
        affine = {site for site, column in zip(scales.sites, offset.T, strict=True) if column.any()}
        job.scale_of = gather_row(job, scales.scale, "scale")
        rows = gather_row(job, offset, "offset") if affine else {}
        job.offset_of = {site: rows[site] for site in affine}
        return len(affine)
