"""This step's row of the tables of scales and zero points."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from pcr_export.graph.job import Job


class GatherScales:
    """One Gather and one Split give each site its scale; zero points likewise where some site is affine:

    scale.<site> = Split(Gather(scale_table, step))             float32 [1]
    zero_point.<site> = Split(Gather(zero_point_table, step))   uint8 [1]
    """

    def apply(self, job: Job) -> int:
        """Emit behind the step; returns the number of sites."""
        job.scale_of = gather_row(job, job.scales.scale, "scale")
        job.zero_of = gather_row(job, job.scales.zero_point, "zero_point")
        return len(job.scales.sites)


def gather_row(job: Job, table: np.ndarray, name: str) -> dict[str, ir.Value]:
    """The current step's row of table [num_steps, num_sites] by site, each of shape [1]; constants where no step differs."""
    emit = job.behind_step()
    if (table == table[:1]).all():
        pairs = zip(job.scales.sites, table[0], strict=True)
        return {site: emit.constant(np.array([value], table.dtype), f"step/{name}.{site}") for site, value in pairs}
    columns = np.unique(table, axis=1, return_inverse=True)
    distinct, which = columns[0], columns[1].reshape(-1)
    row = emit("Gather", [emit.constant(distinct, f"step/{name}_table"), job.step], {"axis": 0}, name=f"{name}_row")
    parts = emit.many("Split", [row], distinct.shape[1], {"axis": 0, "num_outputs": distinct.shape[1]}, name=name)
    return {site: parts[int(column)] for site, column in zip(job.scales.sites, which, strict=True)}
