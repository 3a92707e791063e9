"""Why TensorRT's dialect keeps INT8 weights: what the real TensorRT-RTX builder makes of packed 4-bit ones.

A release that takes one of these forms fails its test, and the dialect can then be half the size.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from engines.small_qdq import CHANNELS, save_small_graph
from engines.test_tensorrt import request_for

from pcr_export.engines.tensorrt import build_engine
from pcr_export.errors import PcrExportError

WEIGHT = "proj_weight"
Rewrite = Callable[[ir.Graph, np.ndarray], list[ir.Node]]


def constant(graph: ir.Graph, name: str, array: np.ndarray, dtype: ir.DataType | None = None) -> ir.Value:
    tensor = ir.Tensor(array, dtype=dtype, name=name)
    value = ir.val(name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
    graph.register_initializer(value)
    return value


def int4(graph: ir.Graph, integers: np.ndarray) -> ir.Value:
    return constant(graph, "packed", integers.astype(ir.DataType.INT4.numpy()), ir.DataType.INT4)


def by_cast(graph: ir.Graph, integers: np.ndarray) -> list[ir.Node]:
    return [ir.node("Cast", [int4(graph, integers)], attributes={"to": ir.DataType.INT8.value})]


def by_dequantizing(graph: ir.Graph, integers: np.ndarray) -> list[ir.Node]:
    one, zero = constant(graph, "one_f", np.float16(1)), constant(graph, "zero_i8", np.int8(0))
    floats = ir.node("DequantizeLinear", [int4(graph, integers), one])
    return [floats, ir.node("QuantizeLinear", [floats.outputs[0], one, zero])]


def by_arithmetic(graph: ir.Graph, integers: np.ndarray) -> list[ir.Node]:
    """Two weights in a byte, 16 high + low + 8, taken apart in float16, which holds them exactly: what a graph says without INT4."""
    high, low = integers[: CHANNELS // 2].astype(np.int32), integers[CHANNELS // 2 :].astype(np.int32)
    packed = constant(graph, "packed", (high * 16 + low + 8).astype(np.int8))
    one, sixteen, eight = (constant(graph, f"h{n}", np.float16(n)) for n in (1, 16, 8))
    byte = ir.node("DequantizeLinear", [packed, one])
    share = ir.node("Div", [byte.outputs[0], sixteen])
    highs = ir.node("Floor", [share.outputs[0]])
    multiple = ir.node("Mul", [highs.outputs[0], sixteen])
    rest = ir.node("Sub", [byte.outputs[0], multiple.outputs[0]])
    lows = ir.node("Sub", [rest.outputs[0], eight])
    joined = ir.node("Concat", [highs.outputs[0], lows.outputs[0]], attributes={"axis": 0})
    narrow = ir.node("QuantizeLinear", [joined.outputs[0], one, constant(graph, "zero_i8", np.int8(0))])
    return [byte, share, highs, multiple, rest, lows, joined, narrow]


def save_packed(path: Path, rewrite: Rewrite) -> Path:
    """The small graph, its second weight in 4 bits that `rewrite` makes INT8 again."""
    model = ir.load(save_small_graph(path))
    weight = model.graph.initializers[WEIGHT]
    assert weight.const_value is not None
    integers = np.clip(weight.const_value.numpy(), -8, 7).astype(np.int8)
    nodes = rewrite(model.graph, integers)
    weight.replace_all_uses_with(nodes[-1].outputs[0])
    del model.graph.initializers[WEIGHT]
    model.graph.insert_before(model.graph[0], nodes)
    folder = path.with_name("packed")
    folder.mkdir()
    ir.save(model, folder / path.name, external_data=path.name + "_data", size_threshold_bytes=256)
    return folder / path.name


@pytest.mark.parametrize("rewrite", [by_cast, by_dequantizing])
def test_int4_that_becomes_int8_is_refused(rewrite: Rewrite, tmp_path: Path) -> None:
    path = save_packed(tmp_path / "model.onnx", rewrite)
    with pytest.raises(PcrExportError) as refusal:
        build_engine(request_for(path, tmp_path))
    assert "INT4" in str(refusal.value).upper()


def test_arithmetic_is_not_folded_but_done_in_every_call(tmp_path: Path) -> None:
    plain = build_engine(request_for(save_small_graph(tmp_path / "plain.onnx"), tmp_path))
    packed = build_engine(request_for(save_packed(tmp_path / "model.onnx", by_arithmetic), tmp_path))
    assert packed.sites == plain.sites
    assert packed.kernels == plain.kernels + 1
    assert ("kgen", "Half, Int8", "Int8", 1) in packed.kernel_table  # which unpacks
    assert (packed.weight_bytes or 0) < (plain.weight_bytes or 0)
