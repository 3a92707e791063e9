"""The step, from the timestep."""

from __future__ import annotations

import numpy as np

from pcr_export.graph.job import Emitter, Job

INT64 = 7  # TensorProto.DataType


class FindStep:
    """step = ReduceSum(timestep < midpoints), the number of midpoints above the timestep: the nearest calibrated step."""

    def apply(self, job: Job) -> int:
        """Emit in front of the graph's first node; returns the number of steps."""
        steps = job.scales.timesteps
        emit = Emitter(job, next(iter(job.graph)), prefix="step")
        emit.module = None
        timestep = next(value for value in job.graph.inputs if value.name == job.timestep)
        middle = (steps[:-1] + steps[1:]) / 2 if len(steps) > 1 else np.array([-np.inf])
        below = emit("Less", [timestep, emit.constant(middle.astype(np.float32), "step/midpoints")])
        counts = emit("Cast", [below], {"to": INT64}, name="counts")
        job.step = emit("ReduceSum", [counts], {"keepdims": 0}, name="index")
        return len(steps)
