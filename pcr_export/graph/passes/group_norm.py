"""GroupNormalization of channels-last pictures from operators that stream through memory."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from pcr_export.graph.job import DOMAIN, Emitter, Job, attribute, replace_value, static_dim


class LowerGroupNorm:
    """pcr.GroupNormalization(x, gamma, beta), with G [channels, groups] that averages and S [groups, channels] that spreads:

        d = x - mean(x) G S,    y = d * (gamma * (1 / sqrt(mean(d^2) G + epsilon)) S) + beta

    Means are over height and width. Two sweeps, so a large mean cancels nothing.
    """

    def apply(self, job: Job) -> int:
        """Lower; returns how many."""
        nodes = [node for node in job.graph if node.domain == DOMAIN and node.op_type == "GroupNormalization"]
        for node in nodes:
            replace_value(node.outputs[0], self._lower(node, Emitter(job, node)))
            job.graph.remove(node, safe=True)
        return len(nodes)

    def _lower(self, node: ir.Node, emit: Emitter) -> ir.Value:
        x, gamma, beta = node.inputs
        assert x is not None and gamma is not None
        channels = static_dim(gamma, 0)
        assert channels is not None
        average, spread = _group_matrices(channels, attribute(node, "num_groups"))
        g = emit.constant(average, f"group_average_{average.shape[0]}_{average.shape[1]}")
        s = emit.constant(spread, f"group_spread_{spread.shape[0]}_{spread.shape[1]}")
        epsilon = emit.constant(np.array(attribute(node, "epsilon"), np.float32), "epsilon")
        shape = None if x.shape is None else list(x.shape)
        mean = emit("MatMul", [emit("MatMul", [self._mean(x, emit, "mean"), g], name="group_mean"), s], name="means")
        d = emit("Sub", [x, mean], name="centred", shape=shape)
        square = self._mean(emit("Mul", [d, d], name="squares", shape=shape), emit, "square")
        deviation = emit("Sqrt", [emit("Add", [emit("MatMul", [square, g], name="variance"), epsilon])], name="deviation")
        inverse = emit("MatMul", [emit("Reciprocal", [deviation]), s], name="inverse")
        scale = emit("Mul", [inverse, gamma], name="scale")
        return emit("Add", [emit("Mul", [d, scale], name="scaled", shape=shape), beta], name="shifted", shape=shape)

    def _mean(self, x: ir.Value, emit: Emitter, name: str) -> ir.Value:
        return emit("ReduceMean", [x, emit.constant([1, 2], "height_width")], {"keepdims": 1}, name=name)


def _group_matrices(channels: int, groups: int) -> tuple[np.ndarray, np.ndarray]:
    """G [channels, groups], columns that average a group, and S [groups, channels] of ones and zeros."""
    spread = np.repeat(np.eye(groups, dtype=np.float32), channels // groups, axis=1)
    return np.ascontiguousarray(spread.T) / np.float32(channels // groups), spread
