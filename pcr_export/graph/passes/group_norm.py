"""GroupNormalization of channels-last pictures from operators that stream through memory."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from pcr_export.graph.job import DOMAIN, Emitter, Job, attribute, replace_value, static_dim

CHANNEL_AXIS = 3


class LowerGroupNorm:
    """pcr.GroupNormalization(x, gamma, beta), with G [channels, groups] that averages and S [groups, channels] that spreads:

        mean = mean(x) G,    variance = max(mean(x^2) G - mean^2, 0)              float32 [batch, 1, 1, groups]
        scale = gamma * (1 / sqrt(variance + epsilon)) S,    y = x * scale + (beta - scale * mean S)

    Means are over height and width. Where x = Concat(x1, x2, ...) over channels, each part is scaled by itself and the parts are
    joined afterwards, so that SinkConcat can carry the copy behind the quantizer, where it moves a quarter of the bytes.
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
        assert x is not None
        assert gamma is not None
        channels = static_dim(gamma, 0)
        assert channels is not None
        average, spread = _group_matrices(channels, attribute(node, "num_groups"))
        g = emit.constant(average, f"group_average_{average.shape[0]}_{average.shape[1]}")
        s = emit.constant(spread, f"group_spread_{spread.shape[0]}_{spread.shape[1]}")
        epsilon = emit.constant(np.array(attribute(node, "epsilon"), np.float32), "epsilon")
        zero = emit.constant(np.array(0, np.float32), "no_variance")
        parts = _parts(x)
        means = _join(emit, [self._mean(emit, part, f"mean{i}") for i, part in enumerate(parts)], "means")
        squares = _join(emit, [self._mean_square(emit, part, i) for i, part in enumerate(parts)], "mean_squares")
        mean = emit("MatMul", [means, g], name="mean")
        power = emit("MatMul", [squares, g], name="power")
        variance = emit(
            "Max",
            [emit("Sub", [power, emit("Mul", [mean, mean], name="square")], name="difference"), zero],
            name="variance",
        )
        deviation = emit("Sqrt", [emit("Add", [variance, epsilon], name="stabilised")], name="deviation")
        scale = emit("Mul", [emit("MatMul", [emit("Reciprocal", [deviation]), s], name="inverse"), gamma], name="scale")
        shift = emit(
            "Sub", [beta, emit("Mul", [scale, emit("MatMul", [mean, s], name="spread")], name="offset")], name="shift"
        )
        scales, shifts = _split(emit, scale, parts, "scales"), _split(emit, shift, parts, "shifts")
        normed = []
        for i, (part, a, b) in enumerate(zip(parts, scales, shifts, strict=True)):
            shape = None if part.shape is None else list(part.shape)
            scaled = emit("Mul", [part, a], name=f"scaled{i}", shape=shape)
            normed.append(emit("Add", [scaled, b], name=f"shifted{i}", shape=shape))
        return _join(emit, normed, "joined", shape=None if x.shape is None else list(x.shape))

    def _mean(self, emit: Emitter, x: ir.Value, name: str) -> ir.Value:
        return emit("ReduceMean", [x, emit.constant([1, 2], "height_width")], {"keepdims": 1}, name=name)

    def _mean_square(self, emit: Emitter, x: ir.Value, i: int) -> ir.Value:
        return self._mean(emit, emit("Mul", [x, x], name=f"squared{i}"), f"mean_square{i}")


def _parts(x: ir.Value) -> list[ir.Value]:
    """The tensors of which x is a concatenation over channels; x itself where it is none, or sizes are unknown."""
    producer = x.producer()
    if producer is None or producer.op_type != "Concat" or attribute(producer, "axis") != CHANNEL_AXIS:
        return [x]
    parts = [value for value in producer.inputs if value is not None]
    return parts if all(static_dim(value, CHANNEL_AXIS) is not None for value in parts) else [x]


def _join(emit: Emitter, values: list[ir.Value], name: str, shape: list[object] | None = None) -> ir.Value:
    return values[0] if len(values) == 1 else emit("Concat", values, {"axis": CHANNEL_AXIS}, name=name, shape=shape)


def _split(emit: Emitter, value: ir.Value, parts: list[ir.Value], name: str) -> list[ir.Value]:
    if len(parts) == 1:
        return [value]
    sizes = emit.constant([static_dim(part, CHANNEL_AXIS) or 0 for part in parts], "part_channels")
    return list(emit.many("Split", [value, sizes], len(parts), {"axis": CHANNEL_AXIS}, name=name))


def _group_matrices(channels: int, groups: int) -> tuple[np.ndarray, np.ndarray]:
    """G [channels, groups], columns that average a group, and S [groups, channels] of ones and zeros."""
    spread = np.repeat(np.eye(groups, dtype=np.float32), channels // groups, axis=1)
    return np.ascontiguousarray(spread.T) / np.float32(channels // groups), spread
