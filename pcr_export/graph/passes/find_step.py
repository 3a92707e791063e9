"""The step, and this step's row of the tables, from the timestep."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from pcr_export.graph.job import Emitter, Job


class FindStep:
    """step = ReduceSum(timestep < midpoints), the number of midpoints above the timestep: the nearest calibrated step.

    Then one Gather and one Split give each site its scale; zero points likewise where some site is affine:

        scale.<site> = Split(Gather(scale_table, step))        float32 [1]
    """

    def apply(self, job: Job) -> int:
        """Emit in front of the graph's first node; returns the number of sites."""
        scales = job.scales
        emit = Emitter(job, next(iter(job.graph)), prefix="step")
        emit.module = None
        timestep = next(value for value in job.graph.inputs if value.name == job.timestep)
        middle = (
            (scales.timesteps[:-1] + scales.timesteps[1:]) / 2
            if scales.num_steps > 1
            else np.array([-np.inf], np.float32)
        )
        below = emit("Less", [timestep, emit.constant(middle.astype(np.float32), "step/midpoints")])
        counts = emit("Cast", [below], {"to": 7}, name="counts")
        job.step = emit("ReduceSum", [counts], {"keepdims": 0}, name="index")
        job.scale_of = self._row(job, emit, scales.scale, "scale")
        job.zero_of = self._row(job, emit, scales.zero_point, "zero_point")
        return len(scales.sites)

    def _row(self, job: Job, emit: Emitter, table: np.ndarray, name: str) -> dict[str, ir.Value]:
        columns = np.unique(table, axis=1, return_inverse=True)
        distinct, which = columns[0], columns[1].reshape(-1)
        if distinct.shape[1] == 1 and (distinct == distinct[0, 0]).all():
            only = emit.constant(distinct[0], f"step/{name}")
            return dict.fromkeys(job.scales.sites, only)
        row = emit("Gather", [emit.constant(distinct, f"step/{name}_table"), job.step], {"axis": 0}, name=f"{name}_row")
        parts = emit.many("Split", [row], distinct.shape[1], {"axis": 0, "num_outputs": distinct.shape[1]}, name=name)
        return {site: parts[int(column)] for site, column in zip(job.scales.sites, which, strict=True)}
