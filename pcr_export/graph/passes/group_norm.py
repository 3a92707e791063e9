"""GroupNormalization of channels-last pictures from operators that stream through memory."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from pcr_export.graph.job import DOMAIN, Emitter, Job, attribute, replace_value, static_dim

CHANNEL_AXIS = 3
WIDEST_MATRIX = 256  # channels; [channels, channels] stays below the sizes that a cache forgets


class LowerGroupNorm:
    """pcr.GroupNormalization(x, gamma, beta), where P averages the channels of each group:

        mean = P mean(x),    variance + epsilon = max(P mean(x^2) - mean^2 + epsilon, epsilon)     [batch, 1, 1, channels]
        scale = gamma / sqrt(variance + epsilon),    y = x * scale + (beta - scale * mean)

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
        groups = attribute(node, "num_groups")
        epsilon = emit.constant(np.array(attribute(node, "epsilon"), np.float32), "epsilon")
        parts = _parts(x)
        means = _join(emit, [self._mean(emit, part, f"mean{i}") for i, part in enumerate(parts)], "means")
        squares = _join(emit, [self._mean_square(emit, part, i) for i, part in enumerate(parts)], "mean_squares")
        mean, power = (
            _average(emit, each, groups, gamma, name) for each, name in ((means, "mean"), (squares, "power"))
        )
        variance = emit(
            "Sub", [emit("Add", [power, epsilon]), emit("Mul", [mean, mean], name="square")], name="difference"
        )
        deviation = emit("Sqrt", [emit("Max", [variance, epsilon], name="variance")], name="deviation")
        scale = emit("Div", [gamma, deviation], name="scale")
        shift = emit("Sub", [beta, emit("Mul", [scale, mean], name="offset")], name="shift")
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


def _average(emit: Emitter, values: ir.Value, groups: int, gamma: ir.Value, name: str) -> ir.Value:
    """Each channel's value replaced by its group's mean: by one small matrix, or by two thin ones where that would be large."""
    channels = static_dim(gamma, 0)
    assert channels is not None
    spread = np.repeat(np.eye(groups, dtype=np.float32), channels // groups, axis=1)  # [groups, channels]
    average = np.ascontiguousarray(spread.T) / np.float32(channels // groups)
    label = f"{channels}_{groups}"
    if channels <= WIDEST_MATRIX:
        return emit("MatMul", [values, emit.constant(average @ spread, f"group_mean_{label}")], name=name)
    mean = emit("MatMul", [values, emit.constant(average, f"group_average_{label}")], name=f"{name}_of_groups")
    return emit("MatMul", [mean, emit.constant(spread, f"group_spread_{label}")], name=name)
