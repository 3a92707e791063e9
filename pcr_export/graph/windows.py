"""Which pixels lie under each window of a convolution, as indices that a Gather follows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from pcr_export.graph.job import Emitter, attribute, static_dim


@dataclass(frozen=True)
class Window:
    """A convolution's geometry; each pair is (height, width)."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    pad_before: tuple[int, int]
    pad_after: tuple[int, int]
    upsample: int  # the picture is enlarged by this factor, pixels repeated, before the windows are laid

    @staticmethod
    def of(conv: ir.Node) -> Window:
        """The geometry of a pcr.Conv node."""
        weight = conv.inputs[1]
        assert weight is not None
        height, width = static_dim(weight, 2), static_dim(weight, 3)
        assert height is not None
        assert width is not None
        pads = attribute(conv, "pads", (0, 0, 0, 0))
        return Window(
            kernel=(height, width),
            stride=tuple(attribute(conv, "strides", (1, 1))),
            dilation=tuple(attribute(conv, "dilations", (1, 1))),
            pad_before=(pads[0], pads[1]),
            pad_after=(pads[2], pads[3]),
            upsample=attribute(conv, "upsample", 1),
        )

    @property
    def is_pixel(self) -> bool:
        """A 1x1 window on every pixel: no gathering."""
        whole = self.kernel == (1, 1) and self.stride == (1, 1) and self.upsample == 1
        return whole and self.pad_before == (0, 0) and self.pad_after == (0, 0)


def emit_window_indices(emit: Emitter, x: ir.Value, window: Window) -> ir.Value:
    """Indices int64 [out_height, out_width, kernel_height * kernel_width] into the flattened pixels of x, in the graph.

    x is [batch, height, width, channels]. A place outside the picture gets the index height * width.
    """
    prefix, emit.prefix = emit.prefix, f"{emit.prefix}/indices"
    sizes = emit("Shape", [x], {"start": 1, "end": 3}, name="size")
    height, width = emit.many("Split", [sizes], 2, {"axis": 0, "num_outputs": 2}, name="height_width")
    count = emit("Mul", [height, width], name="count")
    row_inside, row = _emit_places(emit, height, window, 0)
    column_inside, column = _emit_places(emit, width, window, 1)
    rows = emit("Where", [row_inside, emit("Mul", [row, width], name="row_starts"), count], name="rows")
    columns = emit("Where", [column_inside, column, count], name="columns")
    rows = emit("Unsqueeze", [rows, emit.constant([1, 3], "rows_axes")], name="rows_4d")
    columns = emit("Unsqueeze", [columns, emit.constant([0, 2], "columns_axes")], name="columns_4d")
    indices = emit("Min", [emit("Add", [rows, columns], name="places"), count], name="clipped")
    indices = emit("Reshape", [indices, emit.constant([0, 0, -1], "merge_kernel")], name="merged")
    emit.prefix = prefix
    return indices


def _emit_places(emit: Emitter, size: ir.Value, window: Window, axis: int) -> tuple[ir.Value, ir.Value]:
    """(inside, place), both [out_size, kernel_size]: whether each tap lies inside the axis, and on which source pixel."""
    name = ("row", "column")[axis]
    kernel, stride, dilation = window.kernel[axis], window.stride[axis], window.dilation[axis]
    full = size
    if window.upsample != 1:
        full = emit("Mul", [size, emit.constant([window.upsample], "upsample")], name=f"{name}_full")
    reach = window.pad_before[axis] + window.pad_after[axis] - dilation * (kernel - 1) - 1
    last = emit("Add", [full, emit.constant([reach], "reach")], name=f"{name}_last")
    if stride != 1:
        last = emit("Div", [last, emit.constant([stride], "stride")], name=f"{name}_steps")
    count_out = emit(
        "Squeeze", [emit("Add", [last, emit.constant([1], "one")], name=f"{name}_count")], name=f"{name}_outputs"
    )
    scalar = [emit.constant(np.array(value, np.int64), f"scalar_{value}") for value in (0, 1)]
    starts = emit("Range", [scalar[0], count_out, scalar[1]], name=f"{name}_starts")
    if stride != 1:
        starts = emit("Mul", [starts, emit.constant([stride], "stride")], name=f"{name}_strided")
    taps = emit.constant(np.arange(kernel, dtype=np.int64) * dilation - window.pad_before[axis], f"{name}_taps")
    places = emit(
        "Add",
        [emit("Unsqueeze", [starts, emit.constant([1], "one")], name=f"{name}_column"), taps],
        name=f"{name}_places",
    )
    inside = emit(
        "And",
        [
            emit("GreaterOrEqual", [places, emit.constant([0], "zero")], name=f"{name}_after"),
            emit("Less", [places, full], name=f"{name}_before"),
        ],
        name=f"{name}_inside",
    )
    if window.upsample != 1:
        places = emit("Div", [places, emit.constant([window.upsample], "upsample")], name=f"{name}_source")
    return inside, places
