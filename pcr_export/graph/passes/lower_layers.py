"""Quantized layers as integer matrix products: the dialect that onnxruntime's CPU kernels run fast."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from pcr_export.graph.job import MICROSOFT, Emitter, Job, attribute, replace_value, static_dim
from pcr_export.graph.layer_lowering import LayerLowering
from pcr_export.graph.windows import Window, emit_window_indices

ZERO_OF_LOW_DIGIT = 128


class LowerLayers:
    """With this step's scale s and zero point z of the layer's site, integer weights Wq, their scales w and bias b:

        q = QuantizeLinear(x, s, z)                                   uint8
        y = MatMulIntegerToFloat(q, Wq, s, w, z, b) = (q - z) Wq * (s * w) + b

    A convolution multiplies the windows of q, gathered by indices: Gather(Pad(q, z), windows) [batch, height, width, k * k * in].
    In the relaxed form (attribute `digits` = 2) a second digit, r = 2^(bits - 8) times finer, runs through the same weights:

        l = QuantizeLinear(x / s - (q - z), 1 / r, 128);    y = (q - z) Wq (s w) + b + (l - 128) Wq (s / r * w)

    One quantizer serves every reader of a tensor with the same scale and zero point; so do the windows.
    """

    def apply(self, job: Job) -> int:
        """Lower every marked layer in the graph and its branches; returns how many nodes."""
        return _Lowering(job).lower_all()


class _Lowering(LayerLowering):
    def lower(self, node: ir.Node) -> None:
        emit = Emitter(self.job, node, prefix=_label(node))
        x, layer = node.inputs[0], attribute(node, "layer")
        assert x is not None
        assert node.graph is not None
        site = self.job.scales.layers[layer]
        scale, zero = self.job.scale_of[site], self.job.zero_of[site]
        q = self._shared(node, ("q", x, scale, zero), lambda: self._quantize(emit, x, scale, zero))
        y = self._product(emit, node, q, scale, zero, bias=True)
        if attribute(node, "digits", 1) == 2:
            y = emit("Add", [y, self._low_product(emit, node, q, scale, zero)], name="both_digits")
        replace_value(node.outputs[0], y)
        node.graph.remove(node, safe=True)

    def _quantize(self, emit: Emitter, x: ir.Value, scale: ir.Value, zero: ir.Value) -> ir.Value:
        self.quantizers += attribute(emit.anchor, "digits", 1) == 1
        return _by_parts(emit, x, "q", lambda part, name: emit("QuantizeLinear", [part, scale, zero], name=name))

    def _low_product(self, emit: Emitter, node: ir.Node, q: ir.Value, scale: ir.Value, zero: ir.Value) -> ir.Value:
        x = node.inputs[0]
        assert x is not None
        assert self.job.fineness is not None
        middle = emit.constant(np.array([ZERO_OF_LOW_DIGIT], np.uint8), "low_digit_zero")
        low = self._shared(node, ("low", x, scale, zero), lambda: self._quantize_low(emit, x, q, scale, zero))
        fine = self._shared(
            node, ("fine scale", scale), lambda: emit("Mul", [scale, self.job.fineness], name="fine_scale", shape=[1])
        )
        return self._product(emit, node, low, fine, middle, bias=False)

    def _quantize_low(self, emit: Emitter, x: ir.Value, q: ir.Value, scale: ir.Value, zero: ir.Value) -> ir.Value:
        one = emit.constant(np.array([1], np.float32), "one")
        middle = emit.constant(np.array([ZERO_OF_LOW_DIGIT], np.uint8), "low_digit_zero")
        high = emit("DequantizeLinear", [q, one, zero], name="high")
        rest = emit("Sub", [emit("Div", [x, scale], name="steps"), high], name="rest")
        shape = None if x.shape is None else list(x.shape)
        return emit("QuantizeLinear", [rest, self.job.fineness, middle], name="low", shape=shape)

    def _product(
        self, emit: Emitter, node: ir.Node, q: ir.Value, scale: ir.Value, zero: ir.Value, *, bias: bool
    ) -> ir.Value:
        weight = self.weights.of(node)
        if node.op_type == "Conv":
            q = self._windows(emit, node, q, zero)
        inputs = [q, weight.q, scale, weight.scale, zero, None, weight.bias if bias else None]
        while inputs[-1] is None:
            inputs.pop()
        shape = node.outputs[0].shape
        return emit(
            "MatMulIntegerToFloat",
            inputs,
            domain=MICROSOFT,
            name="product" if bias else "low_product",
            shape=None if shape is None else list(shape),
        )

    def _windows(self, emit: Emitter, node: ir.Node, q: ir.Value, zero: ir.Value) -> ir.Value:
        """uint8 [batch, height, width, kernel * kernel * in]: the patch of q under each output pixel, zero points outside."""
        window = Window.of(node)
        if window.is_pixel:
            return q
        weight = node.inputs[1]
        assert weight is not None
        channels = static_dim(weight, 1)
        assert channels is not None
        indices = self._shared(
            node, ("indices", window, *_spatial_key(q)), lambda: emit_window_indices(emit, q, window)
        )

        def gather() -> ir.Value:
            flat = emit("Reshape", [q, emit.constant([0, -1, channels], "pixels")], name="pixels")
            pads = emit.constant([0, 0, 0, 0, 1, 0], "one_more_pixel")
            outside = self._shared(node, ("outside", zero), lambda: emit("Squeeze", [zero], name="outside"))
            padded = emit("Pad", [flat, pads, outside], name="padded")
            patches = emit("Gather", [padded, indices], {"axis": 1}, name="patches")
            fan_in = window.kernel[0] * window.kernel[1] * channels
            return emit("Reshape", [patches, emit.constant([0, 0, 0, fan_in], "windows")], name="windows")

        return self._shared(node, ("windows", window, q), gather)

    def _shared(self, node: ir.Node, key: tuple[object, ...], make: Callable[[], ir.Value]) -> ir.Value:
        """What was made for this key in the node's graph, or is made now."""
        return self.share((node.graph, *key), make)


def _by_parts(emit: Emitter, x: ir.Value, name: str, quantize: Callable[[ir.Value, str], ir.Value]) -> ir.Value:
    """quantize(x); where x is a concatenation, of its parts, so that bytes are concatenated instead of floats."""
    shape = None if x.shape is None else list(x.shape)
    producer = x.producer()
    if producer is None or producer.op_type != "Concat" or shape is None:
        q = quantize(x, name)
        q.shape = x.shape
        return q
    parts = [quantize(part, f"{name}{i}") for i, part in enumerate(producer.inputs) if part is not None]
    return emit("Concat", parts, {"axis": attribute(producer, "axis")}, name=f"{name}_joined", shape=shape)


def _label(node: ir.Node) -> str:
    start = attribute(node, "start")
    layer = attribute(node, "layer")
    return layer if start is None else f"{layer}.{start}"


def _spatial_key(x: ir.Value) -> tuple[object, ...]:
    """Height and width where they are known or named, else the tensor itself: equal keys, equal sizes."""
    dims = [] if x.shape is None else [dim if isinstance(dim, int) else dim.value for dim in list(x.shape)[1:3]]
    return tuple(dims) if dims and None not in dims else (x,)
