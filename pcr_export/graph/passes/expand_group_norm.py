"""Group norms as sums and one multiply-add, which fuses with whatever follows."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from pcr_export.graph.job import Emitter, Job, attribute, replace_value

FLOAT, HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16


class ExpandGroupNorm:
    """GroupNormalization(x, gamma, beta) of a float16 picture, with means over height, width and the channels of a group:

        a = gamma / sqrt(max(mean(x^2) - mean(x)^2, 0) + epsilon),    y = x * a + (beta - mean(x) * a)        in float32

    TensorRT's own kernel for a group norm takes constant scalars behind it only: SiLU and a quantizer whose scale is read at run time
    start another kernel. Behind the multiply-add they don't (of an SDXL resnet's 5 kernels up to the convolution 4 are left).
    """

    def apply(self, job: Job) -> int:
        """Expand; returns how many."""
        nodes = [node for node in job.graph if node.domain == "" and node.op_type == "GroupNormalization"]
        nodes = [node for node in nodes if _is_picture(node)]
        for node in nodes:
            replace_value(node.outputs[0], self._expand(node, Emitter(job, node)))
            job.graph.remove(node, safe=True)
        return len(nodes)

    def _expand(self, node: ir.Node, emit: Emitter) -> ir.Value:
        x = node.inputs[0]
        assert x is not None
        groups = attribute(node, "num_groups")
        gamma, beta = (self._by_group(emit, value, groups, name) for value, name in _weights(node))
        wide = emit("Cast", [x], {"to": int(FLOAT)}, name="float")
        mean = self._group_mean(emit, wide, groups, "mean")
        power = self._group_mean(emit, emit("Mul", [wide, wide], name="square"), groups, "power")
        variance = emit("Sub", [power, emit("Mul", [mean, mean], name="mean_square")], name="variance")
        variance = emit("Max", [variance, emit.constant(np.array(0, np.float32), "zero")], name="positive")
        epsilon = emit.constant(np.array(attribute(node, "epsilon", 1e-5), np.float32), "epsilon")
        deviation = emit("Sqrt", [emit("Add", [variance, epsilon], name="sum")], name="deviation")
        a = emit("Div", [gamma, deviation], name="a")
        b = emit("Sub", [beta, emit("Mul", [mean, a], name="moved")], name="b")
        column = emit.constant([0, -1, 1, 1], "by_channel")
        factor, shift = (
            emit("Reshape", [each, column], name=f"{name}_by_channel") for each, name in ((a, "a"), (b, "b"))
        )
        y = emit("Add", [emit("Mul", [wide, factor], name="scaled"), shift], name="shifted")
        old = node.outputs[0]
        half = emit("Cast", [y], {"to": int(HALF)}, name="half")
        half.shape, half.type = old.shape, old.type
        return half

    def _by_group(self, emit: Emitter, weight: ir.Value | None, groups: int, name: str) -> ir.Value:
        """float32 [1, groups, channels of a group], which the builder computes once."""
        wide = emit("Cast", [weight], {"to": int(FLOAT)}, name=f"{name}_float")
        return emit("Reshape", [wide, emit.constant([1, groups, -1], f"weights_{groups}")], name=name)

    def _group_mean(self, emit: Emitter, x: ir.Value, groups: int, name: str) -> ir.Value:
        """float32 [batch, groups, 1]."""
        by_channel = emit(
            "ReduceMean", [x, emit.constant([2, 3], "height_width")], {"keepdims": 0}, name=f"{name}_by_channel"
        )
        by_group = emit(
            "Reshape", [by_channel, emit.constant([0, groups, -1], f"groups_{groups}")], name=f"{name}_by_group"
        )
        return emit("ReduceMean", [by_group, emit.constant([2], "channels")], {"keepdims": 1}, name=name)


def _is_picture(node: ir.Node) -> bool:
    x = node.inputs[0]
    return x is not None and x.dtype == HALF and x.shape is not None and len(x.shape) == 4


def _weights(node: ir.Node) -> list[tuple[ir.Value | None, str]]:
    return list(zip(node.inputs[1:], ("gamma", "beta"), strict=True))
