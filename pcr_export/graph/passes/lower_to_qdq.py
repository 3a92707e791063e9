"""Quantized layers as Q/DQ around the float16 operator: the dialect that TensorRT runs in INT8."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from pcr_export.errors import PcrExportError
from pcr_export.graph.job import Emitter, Job, attribute, replace_value
from pcr_export.graph.layer_lowering import LayerLowering
from pcr_export.step_scales import StepScales

LARGEST_HALF = 65504.0
LARGEST_WEIGHT, LARGEST_DIGIT = 127, 128
LARGEST_UNIT = -10  # exponent
FLOAT, HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16
TO_THE_END = np.iinfo(np.int64).max


def accumulator_unit(fan_in: int, reach: float = LARGEST_DIGIT) -> float:
    """c, the value of one integer step of a layer's product: float16 holds every sum of fan_in products.

    The largest power of two <= 2^-10 with fan_in * 127 * reach * c < 65504.

    Args:
        fan_in: products in one sum.
        reach: the largest magnitude of an activation in integer steps.
    """
    return 2.0 ** min(LARGEST_UNIT, math.ceil(math.log2(LARGEST_HALF / (fan_in * LARGEST_WEIGHT * reach))) - 1)


def largest_activation(scales: StepScales) -> float:
    """In integer steps: 128, and on relaxed steps a low digit of at most 128 finer steps on top."""
    bits = int(scales.bits[scales.bits > 8].min(initial=255))
    return LARGEST_DIGIT * (1 + 2.0 ** (8 - bits))


class LowerToQdq:
    """With this step's scale s and offset k = 128 - zero_point of the layer's site, integer weights Wq and their scales w:

        a = round(x / s) - k                                                     float32; TensorRT's quantizer has no zero point
        y = op(DQ(Q(a, 1), 1), DQ(Wq, c)) * (w / c * s) + (k * s * rowsum(Wq) * w + b)

    The sums c * Wq q fit float16 by the choice of c; c is equal for equal fan-in, so that TensorRT merges
    the products that read one tensor. A padded convolution has k = 0, since its zeros stand for x = 0.

    Where some step is relaxed, the digits lie behind one another on the batch axis, as many as `planes` has entries; r = 2^(bits - 8):

        digit 0 = clip(a, -128, 127),    digit 1 = (x / s - k - digit 0) * r,    y = (y of digit 0) + (y of the last digit) * f

    with f = 1 / r on a relaxed step and 0 on any other, where the last digit is digit 0. Sums pick the digit, not Where: in front
    of that TensorRT quantizes both digits and splits the kernel of a layer norm.
    """

    def apply(self, job: Job) -> int:
        """Lower every marked layer; returns how many."""
        return _Lowering(job).lower_all()


class _Lowering(LayerLowering):
    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self.reach = largest_activation(job.scales)

    def lower(self, node: ir.Node) -> None:
        x, layer, old = node.inputs[0], attribute(node, "layer"), node.outputs[0]
        assert x is not None
        assert node.graph is not None
        emit = Emitter(self.job, node, prefix=layer)
        site = self.job.scales.layers[layer]
        scale, offset = self.job.scale_of[site], self.job.offset_of.get(site)
        q = self.share(("q", x, scale, offset), lambda: self._quantize(emit, x, site))
        integers, weight_scale = self.weights.integers(node)
        unit = accumulator_unit(math.prod(integers.shape[1:]), self.reach)
        y = self._product(emit, node, q, integers, unit)
        if self.job.planes is not None:
            y = self._join_digits(emit, x, y)
        column = (-1, 1, 1) if node.op_type == "Conv" else (-1,)  # of one number per output channel
        ratio = emit.constant((weight_scale / np.float32(unit)).reshape(column), f"{layer}.weight_ratio")
        multiplier = emit("Cast", [emit("Mul", [ratio, scale], name="ratio")], {"to": int(HALF)}, name="multiplier")
        y = emit("Mul", [y, multiplier], name="scaled")
        bias = _bias(node, column)
        if offset is not None:
            sums = integers.reshape(len(integers), -1).sum(axis=1, dtype=np.int64) * weight_scale
            moved = self._offset_bias(emit, site, sums.astype(np.float32).reshape(column), bias)
            y = emit("Add", [y, moved], name="biased")
        elif bias is not None:
            y = emit("Add", [y, emit.constant(bias.astype(np.float16), f"{layer}.bias")], name="biased")
        y.shape, y.type = old.shape, old.type
        replace_value(old, y)
        node.graph.remove(node, safe=True)

    def _quantize(self, emit: Emitter, x: ir.Value, site: str) -> ir.Value:
        """float16, of x's shape; with planes [planes * batch, ...]."""
        self.quantizers += 1
        scale, offset = self.job.scale_of[site], self.job.offset_of.get(site)
        steps = emit("Div", [emit("Cast", [x], {"to": int(FLOAT)}, name="float"), scale], name="steps")
        if self.job.planes is not None:
            a = self._digits(emit, x, steps, offset)
        elif offset is not None:
            a = emit("Sub", [emit("Round", [steps], name="rounded"), offset], name="centred")
        else:
            a = steps
        zero = emit.constant(np.array(0, np.int8), "zero")
        q = emit("QuantizeLinear", [a, emit.constant(np.array(1, np.float32), "one"), zero], name="q")
        return emit("DequantizeLinear", [q, emit.constant(np.array(1, np.float16), "half_one"), zero], name="dq")

    def _digits(self, emit: Emitter, x: ir.Value, steps: ir.Value, offset: ir.Value | None) -> ir.Value:
        """float32 [planes * batch, ...]: what the quantizer rounds."""
        assert x.shape is not None
        if len(x.shape) < 2:
            raise PcrExportError(
                f"{emit.prefix} reads a vector without a batch axis, which relaxed steps need: leave it out with --skip"
            )
        rounded = emit("Round", [steps], name="rounded")
        if offset is not None:
            rounded, steps = (emit("Sub", [each, offset], name="centred") for each in (rounded, steps))
        lowest, highest = (
            emit.constant(np.array(value, np.float32), f"limit_{value}")
            for value in (-LARGEST_DIGIT, LARGEST_DIGIT - 1)
        )
        high = emit("Clip", [rounded, lowest, highest], name="high")
        first, second = self._digit_weights(len(x.shape))
        low = emit("Mul", [emit("Sub", [steps, high], name="rest"), second], name="low")
        digits = emit("Add", [emit("Mul", [high, first], name="high_alone"), low], name="digits")
        return emit("Reshape", [digits, self._flat_shape(emit, x)], {"allowzero": 1}, name="planes")

    def _digit_weights(self, rank: int) -> tuple[ir.Value, ir.Value]:
        """float32 [planes, 1, ..., 1] with `rank` ones: (1, 0) of the high digit and (0, r) of what it leaves."""

        def make(name: str, weigh: Callable[[Emitter, ir.Value], ir.Value]) -> ir.Value:
            emit = self.job.behind_step()
            emit.prefix = f"planes/rank{rank}"
            is_low = emit("Cast", [self.job.planes], {"to": int(FLOAT)}, name="is_low")
            return emit("Reshape", [weigh(emit, is_low), emit.constant([-1] + [1] * rank, "column")], name=name)

        def is_high(emit: Emitter, is_low: ir.Value) -> ir.Value:
            return emit("Sub", [emit.constant(np.array(1, np.float32), "one"), is_low], name="is_high")

        def fine(emit: Emitter, is_low: ir.Value) -> ir.Value:
            return emit("Div", [is_low, self.job.fineness], name="fine")

        return (
            self.share(("first", rank), lambda: make("first", is_high)),
            self.share(("second", rank), lambda: make("second", fine)),
        )

    def _flat_shape(self, emit: Emitter, x: ir.Value) -> ir.Value:
        """int64 [rank]: (-1, x.shape[1:])."""
        return self.share(
            ("flat shape", *_dims(x)),
            lambda: emit(
                "Concat",
                [emit.constant([-1], "any"), emit("Shape", [x], {"start": 1}, name="tail")],
                {"axis": 0},
                name="flat_shape",
            ),
        )

    def _product(self, emit: Emitter, node: ir.Node, q: ir.Value, integers: np.ndarray, unit: float) -> ir.Value:
        layer, is_conv = attribute(node, "layer"), node.op_type == "Conv"
        stored = integers if is_conv else integers.T
        scale = emit.constant(np.array(unit, np.float16), f"unit_{unit}")
        weight = emit("DequantizeLinear", [self.job.initializer(stored, f"{layer}.weight_q"), scale], name="weight_dq")
        kept = {name: found.value for name, found in node.attributes.items() if name != "layer"} if is_conv else {}
        return emit("Conv" if is_conv else "MatMul", [q, weight], kept, name="product")

    def _join_digits(self, emit: Emitter, x: ir.Value, y: ir.Value) -> ir.Value:
        """[planes * batch, ...] -> [batch, ...]: the first digit's rows plus a share of the last one's.

        The reshape changes nothing; without it TensorRT does not see that the batch is x's again, and refuses ranges of sizes.
        """
        zero = emit.constant([0], "any_zero")
        batch = self.share(("batch", *_dims(x)[:1]), lambda: emit("Shape", [x], {"start": 0, "end": 1}, name="batch"))
        last = self.share(("last", *_dims(x)[:1]), lambda: emit("Neg", [batch], name="last"))
        high = emit("Slice", [y, zero, batch, zero], name="high_part")
        low = emit("Slice", [y, last, emit.constant([TO_THE_END], "end"), zero], name="low_part")
        both = emit("Add", [high, emit("Mul", [low, self.job.low_digit], name="low_share")], name="both_digits")
        sizes = emit("Concat", [batch, emit("Shape", [y], {"start": 1}, name="sizes")], {"axis": 0}, name="shape")
        return emit("Reshape", [both, sizes], name="batch_again")

    def _offset_bias(self, emit: Emitter, site: str, sums: np.ndarray, bias: np.ndarray | None) -> ir.Value:
        """float16: what the offset k adds to every output, and the bias: k * s * rowsum(Wq) * w + b."""
        scale, offset = self.job.scale_of[site], self.job.offset_of[site]
        moved = self.share(("moved", scale, offset), lambda: emit("Mul", [scale, offset], name="moved"))
        added = emit("Mul", [moved, emit.constant(sums, f"{emit.prefix}.weight_sums")], name="offset_bias")
        if bias is not None:
            added = emit("Add", [added, emit.constant(bias, f"{emit.prefix}.bias")], name="whole_bias")
        return emit("Cast", [added], {"to": int(HALF)}, name="half_bias")


def _bias(node: ir.Node, column: tuple[int, ...]) -> np.ndarray | None:
    """float32, one number per output channel."""
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is None:
        return None
    assert bias.const_value is not None
    return bias.const_value.numpy().astype(np.float32).reshape(column)


def _dims(x: ir.Value) -> tuple[object, ...]:
    """Sizes where all are known or named, else the tensor itself: equal dims, equal sizes."""
    dims = [dim if isinstance(dim, int) else dim.value for dim in (x.shape or [])]
    return tuple(dims) if dims and None not in dims else (x,)
