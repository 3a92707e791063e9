"""Pictures as [batch, height, width, channels], the layout in which a convolution is one matrix product."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from pcr_export.graph.job import (
    DOMAIN,
    MICROSOFT,
    Emitter,
    Job,
    attribute,
    constant_array,
    remove_unread,
    replace_value,
)

TO_LAST, TO_FIRST = (0, 2, 3, 1), (0, 3, 1, 2)
AXIS_TO_LAST = (0, 3, 1, 2)  # axis of a channels-first tensor -> its place in the channels-last one
UNARY = {
    "QuickGelu",
    "Sigmoid",
    "Gelu",
    "Relu",
    "Tanh",
    "Cast",
    "Neg",
    "Exp",
    "Sqrt",
    "Erf",
    "LeakyRelu",
    "HardSigmoid",
    "Softplus",
}
BINARY = {"Add", "Sub", "Mul", "Div"}


class ChannelsLast:
    """T(x) = Transpose(x, 0231) is pushed from the convolutions through everything that allows it:

    1. pcr.Conv(x)            -> T^-1(pcr.Conv(T(x)))                  pcr.Conv is channels-last from here on
    2. f(x), f(x, y)          -> T^-1(f(T(x), T(y)))                   elementwise, with broadcasting
    3. GroupNormalization(x)  -> T^-1(pcr.GroupNormalization(T(x)))
    4. Concat, Split, Resize, Unsqueeze -> the same on the moved axis
    5. T(x)                   -> the channels-last x itself;  T^-1(T(x)) -> x

    A reader that is none of these (a float convolution, a reshape) gets one transpose.
    """

    def apply(self, job: Job) -> int:
        """Rewrite; returns how many nodes run channels-last."""
        return _Rewrite(job).run()


class _Rewrite:
    """The state of one sweep over the graph in topological order."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.last: dict[ir.Value, ir.Value] = {}  # channels-first value -> its channels-last twin
        self.done: list[ir.Node] = []

    def run(self) -> int:
        for node in list(self.job.graph):
            rewrite = self._rule(node)
            if rewrite is not None and rewrite(node, Emitter(self.job, node)):
                self.done.append(node)
        self._serve_other_readers()
        self.job.graph.remove(list(reversed(self.done)), safe=True)
        remove_unread(self.job.graph)
        return len(self.done)

    def _rule(self, node: ir.Node) -> Callable[[ir.Node, Emitter], bool] | None:
        if node.domain == DOMAIN:
            return self._conv if node.op_type == "Conv" else None
        if node.domain not in ("", MICROSOFT):
            return None
        if node.op_type in UNARY | BINARY:
            return self._elementwise
        rules = {
            "Conv": self._float_conv,
            "GroupNormalization": self._group_norm,
            "Concat": self._concat,
            "Split": self._split,
            "Resize": self._resize,
            "Transpose": self._transpose,
            "Unsqueeze": self._unsqueeze,
        }
        return rules.get(node.op_type)

    def _twin(self, value: ir.Value, emit: Emitter) -> ir.Value:
        """The channels-last form of a rank-4 value, transposed in front of its first reader where there is none yet."""
        if value not in self.last:
            self.last[value] = emit("Transpose", [value], {"perm": TO_LAST}, name="to_last", shape=_moved(value))
        return self.last[value]

    def _conv(self, node: ir.Node, emit: Emitter) -> bool:
        x = node.inputs[0]
        assert x is not None
        kept = {name: found.value for name, found in node.attributes.items()}
        new = emit("Conv", [self._twin(x, emit), *node.inputs[1:]], kept, domain=DOMAIN, shape=_moved(node.outputs[0]))
        self.last[node.outputs[0]] = new
        return True

    def _float_conv(self, node: ir.Node, emit: Emitter) -> bool:
        """A float convolution stays channels-first; what follows it does not."""
        output = node.outputs[0]
        if _rank(output) == 4 and not output.is_graph_output() and node.graph is not None:
            transpose = ir.node("Transpose", [output], {"perm": TO_LAST}, name=f"{node.name}/to_last")
            transpose.outputs[0].name = transpose.name
            transpose.outputs[0].shape = ir.Shape(_moved(output))
            node.graph.insert_after(node, transpose)
            self.last[output] = transpose.outputs[0]
        return False

    def _elementwise(self, node: ir.Node, emit: Emitter) -> bool:
        if _rank(node.outputs[0]) != 4 or not any(value in self.last for value in node.inputs):
            return False
        inputs = [self._operand(value, emit) for value in node.inputs]
        if any(value is None for value in inputs):
            return False
        self._emit_like(node, inputs, emit)
        return True

    def _operand(self, value: ir.Value | None, emit: Emitter) -> ir.Value | None:
        """An operand of an elementwise node in channels-last form; None where broadcasting does not allow it."""
        if value is None or value.shape is None:
            return None
        if value in self.last or _rank(value) == 4:
            return self._twin(value, emit)
        if all(dim == 1 for dim in value.shape):
            return value
        if _rank(value) == 3:  # [channels, height, width], broadcast over the batch
            return emit("Transpose", [value], {"perm": (1, 2, 0)}, name="to_last")
        return None

    def _group_norm(self, node: ir.Node, emit: Emitter) -> bool:
        x = node.inputs[0]
        if x is None or _rank(x) != 4:
            return False
        self.last[node.outputs[0]] = emit(
            "GroupNormalization",
            [self._twin(x, emit), *node.inputs[1:]],
            {"num_groups": attribute(node, "num_groups"), "epsilon": attribute(node, "epsilon", 1e-5)},
            domain=DOMAIN,
            shape=_moved(node.outputs[0]),
        )
        return True

    def _concat(self, node: ir.Node, emit: Emitter) -> bool:
        inputs = [value for value in node.inputs if value is not None]
        if _rank(node.outputs[0]) != 4 or not any(value in self.last for value in inputs):
            return False
        axis = AXIS_TO_LAST[attribute(node, "axis") % 4]
        twins = [self._twin(value, emit) for value in inputs]
        self.last[node.outputs[0]] = emit("Concat", twins, {"axis": axis}, shape=_moved(node.outputs[0]))
        return True

    def _split(self, node: ir.Node, emit: Emitter) -> bool:
        x = node.inputs[0]
        if x not in self.last or x is None:
            return False
        kept = {name: found.value for name, found in node.attributes.items()}
        kept["axis"] = AXIS_TO_LAST[attribute(node, "axis", 0) % 4]
        parts = emit.many("Split", [self.last[x], *node.inputs[1:]], len(node.outputs), kept)
        for old, new in zip(node.outputs, parts, strict=True):
            new.shape = ir.Shape(_moved(old)) if _rank(old) == 4 else None
            self.last[old] = new
        return True

    def _resize(self, node: ir.Node, emit: Emitter) -> bool:
        x = node.inputs[0]
        if x not in self.last or x is None or "axes" in node.attributes:
            return False
        roi, *sizes = (*node.inputs[1:], None, None)[:3]
        if roi is not None and roi.shape is not None and roi.shape[0] != 0:
            return False
        order = emit.constant(TO_LAST, "to_last_order")
        moved = [
            value if value is None else emit("Gather", [value, order], name=f"size{i}") for i, value in enumerate(sizes)
        ]
        kept = {name: found.value for name, found in node.attributes.items()}
        constant = sizes[0].const_value if sizes[0] is not None else None
        if constant is not None:
            moved[0] = emit.constant(constant.numpy()[list(TO_LAST)], f"{node.name}/scales")
        inputs = [self.last[x], None, *moved]
        while inputs[-1] is None:
            inputs.pop()
        self.last[node.outputs[0]] = emit("Resize", inputs, kept, shape=_moved(node.outputs[0]))
        return True

    def _transpose(self, node: ir.Node, emit: Emitter) -> bool:
        x, perm = node.inputs[0], tuple(attribute(node, "perm", ()))
        if x in self.last and x is not None and perm == TO_LAST:
            replace_value(node.outputs[0], self.last[x])
            return True
        if x is not None and x.producer() is not None and perm == TO_FIRST:
            self.last[node.outputs[0]] = x
            return True
        return False

    def _unsqueeze(self, node: ir.Node, emit: Emitter) -> bool:
        """[batch, channels] that becomes a picture of one pixel, as a time embedding does."""
        axes = constant_array(node.inputs[1])
        if node.inputs[0] is not None and axes is not None and axes.tolist() == [2, 3] and _rank(node.outputs[0]) == 4:
            inputs = [node.inputs[0], emit.constant([1, 2], "height_width")]
            self.last[node.outputs[0]] = emit("Unsqueeze", inputs, name="to_last", shape=_moved(node.outputs[0]))
        return False

    def _emit_like(self, node: ir.Node, inputs: list[ir.Value | None], emit: Emitter) -> None:
        kept = {name: found.value for name, found in node.attributes.items()}
        output = node.outputs[0]
        self.last[output] = emit(node.op_type, inputs, kept, domain=node.domain, shape=_moved(output))

    def _serve_other_readers(self) -> None:
        """Readers that stay channels-first read one transpose of the twin instead of the node that goes away."""
        done = set(self.done)
        for value, twin in self.last.items():
            if value.producer() not in done:
                continue
            others = [use for use in value.uses() if use.node not in done]
            if not others and not value.is_graph_output():
                continue
            producer = twin.producer()
            back = ir.node("Transpose", [twin], {"perm": TO_FIRST}, name=f"{twin.name}/to_first")
            back.outputs[0].name = back.name
            back.outputs[0].shape = value.shape
            assert producer is not None
            assert producer.graph is not None
            producer.graph.insert_after(producer, back)
            replace_value(value, back.outputs[0])


def _rank(value: ir.Value) -> int | None:
    return None if value.shape is None else len(value.shape)


def _moved(value: ir.Value) -> list[int | ir.SymbolicDim | None]:
    """The shape of a channels-first value, channels last."""
    shape = value.shape
    if shape is None or len(shape) != 4:
        return [None] * 4
    return [shape[axis] for axis in TO_LAST]
