"""Static Q/DQ as quantizers for TensorRT write it: the graph that people build today, as a yardstick for kernels and memory."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from pcr_export.graph.job import DOMAIN, Emitter, Job, attribute, replace_value
from pcr_export.graph.layer_weights import LayerWeights
from pcr_export.graph.passes import DIALECTS
from pcr_export.graph.passes.find_layers import FindLayers
from pcr_export.graph.passes.tidy import Tidy
from pcr_export.graph.passes.to_half import ToHalf

STATIC_QDQ = "static-qdq"


class LowerToStaticQdq:
    """y = op(DQ(Q(x, s), s), DQ(Wq, w)) + b with the first step's scale s per tensor, symmetric, and w per output channel."""

    def apply(self, job: Job) -> int:
        """Lower every marked layer; returns how many."""
        weights, shared = LayerWeights(job), dict[ir.Value, ir.Value]()
        nodes = [node for node in job.graph if node.domain == DOMAIN]
        for node in nodes:
            self._lower(job, weights, shared, node)
        job.quantizers = len(shared)
        return len(nodes)

    def _lower(self, job: Job, weights: LayerWeights, shared: dict[ir.Value, ir.Value], node: ir.Node) -> None:
        x, layer, is_conv = node.inputs[0], attribute(node, "layer"), node.op_type == "Conv"
        emit = Emitter(job, node, prefix=layer)
        if x not in shared:
            value = job.scales.scale[0, job.scales.sites.index(job.scales.layers[layer])]
            scale, zero = (
                emit.constant(np.array(v), n) for v, n in ((np.float16(value), "scale"), (np.int8(0), "zero"))
            )
            q = emit("QuantizeLinear", [x, scale, zero], name="q")
            shared[x] = emit("DequantizeLinear", [q, scale, zero], name="dq")
        integers, weight_scale = weights.integers(node)
        stored = job.initializer(integers if is_conv else integers.T, f"{layer}.weight_q")
        scales = emit.constant(weight_scale.astype(np.float16), f"{layer}.weight_scale")
        axis = {"axis": 0 if is_conv else 1}
        weight = emit("DequantizeLinear", [stored, scales], axis, name="weight_dq")
        kept = {name: found.value for name, found in node.attributes.items() if name != "layer"} if is_conv else {}
        y = emit("Conv" if is_conv else "MatMul", [shared[x], weight], kept, name="product")
        if len(node.inputs) > 2 and node.inputs[2] is not None:
            bias = node.inputs[2].const_value.numpy().astype(np.float16)
            y = emit("Add", [y, emit.constant(bias.reshape((-1, 1, 1) if is_conv else (-1,)), f"{layer}.bias")])
        y.shape, y.type = node.outputs[0].shape, node.outputs[0].type
        replace_value(node.outputs[0], y)
        job.graph.remove(node, safe=True)


DIALECTS[STATIC_QDQ] = (FindLayers, ToHalf, LowerToStaticQdq, Tidy)
