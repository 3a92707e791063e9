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

    x is [batch, height, width, channels]. A map of the pixels' numbers gets a border of height * width, which stands for the
    outside; its rows and columns are then gathered tap by tap.
    """
    prefix, emit.prefix = emit.prefix, f"{emit.prefix}/indices"
    size = emit("Shape", [x], {"start": 1, "end": 3}, name="size")
    count = emit("ReduceProd", [size], {"keepdims": 0}, name="count")
    zero, one = (emit.constant(np.array(value, np.int64), f"scalar_{value}") for value in (0, 1))
    numbers = emit("Reshape", [emit("Range", [zero, count, one], name="pixels"), size], name="map")
    border = [-(-pad // window.upsample) for pad in (*window.pad_before, *window.pad_after)]
    bordered = emit("Pad", [numbers, emit.constant(border, "border"), count], name="bordered")
    rows = emit("Gather", [bordered, _emit_places(emit, size, window, 0, border[0])], {"axis": 0}, name="rows")
    taps = emit("Gather", [rows, _emit_places(emit, size, window, 1, border[1])], {"axis": 2}, name="taps")
    taps = emit("Transpose", [taps], {"perm": (0, 2, 1, 3)}, name="taps_last")
    indices = emit("Reshape", [taps, emit.constant([0, 0, -1], "merge_kernel")], name="merged")
    emit.prefix = prefix
    return indices


def _emit_places(emit: Emitter, size: ir.Value, window: Window, axis: int, border: int) -> ir.Value:
    """int64 [out_size, kernel_size]: where in the bordered map each tap of each window lies, along one axis.

    place = (stride * i + dilation * k - pad) // upsample + border,    made of non-negative terms
    """
    name = ("row", "column")[axis]
    kernel, stride, dilation = window.kernel[axis], window.stride[axis], window.dilation[axis]
    u, pad = window.upsample, window.pad_before[axis]
    reach = pad + window.pad_after[axis] - dilation * (kernel - 1)  # windows start before size * upsample + reach
    end = emit(
        "Gather", [size, emit.constant(np.array(axis, np.int64), f"scalar_{axis}")], {"axis": 0}, name=f"{name}_size"
    )
    if u != 1:
        end = emit("Mul", [end, emit.constant(np.array(u, np.int64), f"scalar_{u}")], name=f"{name}_full")
    if reach != 0:
        end = emit("Add", [end, emit.constant(np.array(reach, np.int64), f"scalar_{reach}")], name=f"{name}_end")
    first, step = (emit.constant(np.array(value, np.int64), f"scalar_{value}") for value in (0, stride))
    starts = emit("Unsqueeze", [emit("Range", [first, end, step], name=f"{name}_starts"), emit.constant([1], "axis_1")])
    taps = np.arange(kernel, dtype=np.int64) * dilation - pad + u * border
    places = emit("Add", [starts, emit.constant(taps, f"{name}_taps")], name=f"{name}_places")
    if u == 1:
        return places
    return emit("Div", [places, emit.constant(np.array(u, np.int64), f"scalar_{u}")], name=f"{name}_sources")
