"""FP16 between the quantized layers, FP32 where FP16 would lose the timestep."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from pcr_export.errors import PcrExportError
from pcr_export.graph.job import DOMAIN, Emitter, Job

FLOAT, HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16
LARGEST_HALF = 65504.0
FLOAT_INPUTS = {"Resize": (1, 2)}  # operator -> inputs that ONNX wants in FP32 whatever the data's type


class ToHalf:
    """Every float32 tensor -> float16, but for

    1. graph inputs and outputs: Cast(input) where a float16 node reads it, output = Cast(half)
    2. what leads to a Sin or Cos: sin(999 f) needs more than 11 bits; its readers read Cast(sin)
    3. what leads to a difference that quantized layers alone read: of a large first token, x - p u leaves less than float16's rounding of x
    4. weight and bias of pcr.Linear and pcr.Conv, which are quantized from float32 later

    A node whose inputs had one type before has one type afterwards, concatenations of both kinds of embedding included.
    """

    def apply(self, job: Job) -> int:
        """Convert; returns how many nodes run in float16."""
        return _Conversion(job).run()


class _Conversion:
    """One sweep in topological order."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.precise = _precise_nodes(job.graph)
        self.half_of: dict[ir.Value, ir.Value] = {}  # a float32 value -> its float16 twin

    def run(self) -> int:
        count = 0
        for node in list(self.job.graph):
            if node in self.precise or not any(value.dtype == FLOAT for value in node.outputs):
                self._keep(node)
            else:
                self._convert(node)
                count += 1
        for output in list(self.job.graph.outputs):
            if output.dtype == HALF:
                self._cast_output(output)
        return count

    def _keep(self, node: ir.Node) -> None:
        """A node that stays float32 reads Cast(half) of what became float16."""
        for i, value in enumerate(node.inputs):
            if node in self.precise and value is not None and value.dtype == HALF:
                node.replace_input_with(i, self._cast(value, node, FLOAT, "float"))

    def _convert(self, node: ir.Node) -> None:
        kept: Sequence[int] = FLOAT_INPUTS.get(node.op_type, ())
        if node.domain == DOMAIN:
            kept = range(1, len(node.inputs))
        for i, value in enumerate(node.inputs):
            if value is not None and value.dtype == FLOAT and i not in kept:
                node.replace_input_with(i, self._half(value, node))
        to = node.attributes.get("to")
        if node.op_type == "Cast" and to is not None and to.value == FLOAT:
            node.attributes["to"] = ir.AttrInt64("to", HALF)
        elif not any(value is not None and value.dtype == HALF for value in node.inputs):
            return  # makes floats from integers or attributes: stays float32, its readers cast
        for output in node.outputs:
            if output.dtype == FLOAT:
                output.type = ir.TensorType(HALF)  # a clone of a model shares its types

    def _half(self, value: ir.Value, reader: ir.Node) -> ir.Value:
        if value not in self.half_of:
            if value.is_initializer():
                self.half_of[value] = self._half_constant(value)
            else:
                self.half_of[value] = self._cast(value, reader, HALF, "half")
        return self.half_of[value]

    def _cast(self, value: ir.Value, reader: ir.Node, dtype: ir.DataType, name: str) -> ir.Value:
        shape = None if value.shape is None else list(value.shape)
        cast = Emitter(self.job, reader, prefix=str(value.name))(
            "Cast", [value], {"to": int(dtype)}, name=name, shape=shape
        )
        cast.dtype = dtype
        return cast

    def _half_constant(self, value: ir.Value) -> ir.Value:
        assert value.const_value is not None
        array = value.const_value.numpy()
        if array.size and np.abs(array[np.isfinite(array)], dtype=np.float32).max(initial=0.0) > LARGEST_HALF:
            raise PcrExportError(
                f"{value.name} holds values beyond float16's {LARGEST_HALF:g}: export it for onnxruntime"
            )
        return self.job.constant(array.astype(np.float16), f"{value.name}.half")

    def _cast_output(self, output: ir.Value) -> None:
        """The output keeps its name and type; the node that made it writes float16 under another name."""
        producer = output.producer()
        assert producer is not None
        assert producer.graph is not None
        name, shape = output.name, output.shape
        output.name = f"{name}/half"
        cast = ir.node("Cast", [output], {"to": int(FLOAT)}, name=f"{name}/float")
        cast.outputs[0].name, cast.outputs[0].shape, cast.outputs[0].dtype = name, shape, FLOAT
        producer.graph.append(cast)
        output.replace_all_uses_with(cast.outputs[0], replace_graph_outputs=True)
        cast.replace_input_with(0, output)


def _is_difference_for_layers(node: ir.Node) -> bool:
    readers = node.outputs[0].uses()
    return node.op_type == "Sub" and bool(readers) and all(reader.domain == DOMAIN for reader, _ in readers)


def _precise_nodes(graph: ir.Graph) -> set[ir.Node]:
    """Sin and Cos, differences for quantized layers, and every node before them, up to the quantized layers."""
    seen: set[ir.Node] = set()
    waiting = [node for node in graph if node.op_type in ("Sin", "Cos") or _is_difference_for_layers(node)]
    while waiting:
        node = waiting.pop()
        if node not in seen and node.domain != DOMAIN:
            seen.add(node)
            producers = [value.producer() for value in node.inputs if value is not None]
            waiting.extend(producer for producer in producers if producer is not None)
    return seen
