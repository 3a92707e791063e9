"""What the passes share: the graph in work, the scales, and where constants and weights go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir

from pcr_export.calibrate.weights.rounding import NEAREST_8, RoundWeight
from pcr_export.graph.weight_file import WeightFile
from pcr_export.step_scales import StepScales

DOMAIN = "pcr"  # of the operators that exist only between two passes
MICROSOFT = "com.microsoft"
SHARED_BYTES = 2**20  # constants up to this size are shared by content
MODULE_KEY = "pcr.module"  # node metadata: the module path that the node comes from


@dataclass(kw_only=True)
class Job:
    """One quantizing job. The passes rewrite `graph` and count here what the report tells."""

    graph: ir.Graph
    scales: StepScales
    timestep: str  # name of the graph's rank-0 float32 input
    weights: WeightFile
    round_weight: RoundWeight = NEAREST_8  # gives the integers of the quantized layers
    quantizers: int = 0  # quantized tensors; a tensor read by several layers of one site counts once
    step: ir.Value | None = None  # int64 scalar, once FindStep has run
    scale_of: dict[str, ir.Value] = field(default_factory=dict)  # site -> this step's scale, float32 [1]
    zero_of: dict[str, ir.Value] = field(default_factory=dict)  # site -> this step's zero point, uint8 [1]
    offset_of: dict[str, ir.Value] = field(
        default_factory=dict
    )  # affine site -> this step's 128 - zero point, float32 [1]
    fineness: ir.Value | None = None  # this step's 2^(8 - bits), float32 [1], where some step is relaxed
    low_digit: ir.Value | None = None  # this step's 2^(8 - bits), 0 where it is not relaxed, float16 [1]
    planes: ir.Value | None = None  # int64 [1 or 2]: the digits of this step's activations, where they share an axis
    own: set[ir.Value] = field(default_factory=set)  # initializers that the passes made
    constants: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = field(default_factory=dict)

    def behind_step(self) -> Emitter:
        """Puts nodes behind the one that makes the step, in front of everything that could read them."""
        assert self.step is not None
        nodes = iter(self.graph)
        next(node for node in nodes if node is self.step.producer())
        emit = Emitter(self, next(nodes), prefix="step")
        emit.module = None
        return emit

    def constant(self, array: np.ndarray, name: str) -> ir.Value:
        """An initializer of the main graph with this content; equal small content, same initializer."""
        key = (str(array.dtype), array.shape, array.tobytes()) if array.nbytes <= SHARED_BYTES else None
        if key is not None and key in self.constants:
            return self.constants[key]
        value = self.initializer(array, name)
        if key is not None:
            self.constants[key] = value
        return value

    def initializer(self, array: np.ndarray, name: str) -> ir.Value:
        """A new initializer of the main graph under the first free name that starts with `name`."""
        unique, number = name, 1
        taken = {value.name for value in (*self.graph.inputs, *self.graph.outputs)}
        while unique in self.graph.initializers or unique in taken:
            number += 1
            unique = f"{name}.{number}"
        tensor = self.weights.store(array, unique)
        value = ir.Value(
            name=unique,
            shape=ir.Shape(array.shape),
            type=ir.TensorType(ir.DataType.from_numpy(array.dtype)),
            const_value=tensor,
        )
        self.graph.register_initializer(value)
        self.own.add(value)
        return value


class Pass(Protocol):
    """One rewrite of the graph. Its class docstring is the rewrite as an equation."""

    def apply(self, job: Job) -> int:
        """Rewrite `job.graph` in place; returns how many places were rewritten."""
        ...


class Emitter:
    """Puts new nodes in front of `anchor`, in whichever graph it stands; they inherit its module path."""

    def __init__(self, job: Job, anchor: ir.Node, prefix: str | None = None) -> None:
        self.job = job
        self.anchor = anchor
        self.prefix = prefix if prefix is not None else str(anchor.name)
        self.module = anchor.metadata_props.get(MODULE_KEY)

    def __call__(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, Any] | None = None,
        *,
        domain: str = "",
        name: str | None = None,
        shape: Sequence[Any] | None = None,
    ) -> ir.Value:
        """A node with one output; `shape` where a later pass needs it."""
        return self.many(op_type, inputs, 1, attributes, domain=domain, name=name, shape=shape)[0]

    def many(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        num_outputs: int,
        attributes: Mapping[str, Any] | None = None,
        *,
        domain: str = "",
        name: str | None = None,
        shape: Sequence[Any] | None = None,
    ) -> Sequence[ir.Value]:
        """A node with `num_outputs` outputs."""
        label = f"{self.prefix}/{name or op_type}"
        node = ir.node(op_type, inputs, attributes, domain=domain, num_outputs=num_outputs, name=label)
        for i, output in enumerate(node.outputs):
            output.name = label if num_outputs == 1 else f"{label}.{i}"
            output.shape = None if shape is None else ir.Shape(list(shape))
        if self.module is not None:
            node.metadata_props[MODULE_KEY] = self.module
        assert self.anchor.graph is not None
        self.anchor.graph.insert_before(self.anchor, node)
        return node.outputs

    def constant(self, values: np.ndarray | Sequence[int], name: str) -> ir.Value:
        """A constant; a plain sequence means int64."""
        array = values if isinstance(values, np.ndarray) else np.array(values, np.int64)
        return self.job.constant(array, name)


def replace_value(old: ir.Value, new: ir.Value) -> None:
    """Let every reader of `old` read `new`. A graph output keeps its name."""
    if old.is_graph_output():
        old.name, new.name = None, old.name
        new.shape, new.type = old.shape, old.type
    old.replace_all_uses_with(new, replace_graph_outputs=True)


def remove_unread(graph: ir.Graph) -> int:
    """Remove the graph's nodes that nothing reads; returns how many."""
    count = 0
    for node in reversed(list(graph)):
        if not any(value.uses() or value.is_graph_output() for value in node.outputs):
            graph.remove(node, safe=True)
            count += 1
    return count


def static_dim(value: ir.Value, axis: int) -> int | None:
    """The size of an axis where it is known."""
    if value.shape is None or axis >= len(value.shape):
        return None
    dim = value.shape[axis]
    return dim if isinstance(dim, int) else None


def attribute(node: ir.Node, name: str, default: Any = None) -> Any:
    """The value of a node's attribute, or `default`."""
    found = node.attributes.get(name)
    return default if found is None else found.value


def constant_array(value: ir.Value | None) -> np.ndarray | None:
    """The content of an initializer, or None for anything else."""
    if value is None or value.const_value is None or not value.is_initializer():
        return None
    return value.const_value.numpy()
