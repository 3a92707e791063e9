"""Memory of an onnxruntime session, measured."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest

from pcr_export.engines.session_memory import measure_memory
from pcr_export.errors import PcrExportError

SIDE = 8192
MIB = 2**20
OUTER = """
<ir_version: 10, opset_import: ["" : 21]>
outer (float[n] x) => (float y)
{
    one = Constant <value_ints = [1]> ()
    zero = Constant <value_ints = [0]> ()
    column = Unsqueeze (x, one)
    row = Unsqueeze (x, zero)
    products = MatMul (column, row)
    y = ReduceSum <keepdims = 0> (products)
}
"""


@pytest.fixture
def outer_product(tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx"
    onnx.save(onnx.parser.parse_model(OUTER), path)
    return path


def test_memory_is_that_of_the_largest_tensor(outer_product: Path) -> None:
    small, large = (measure_memory(outer_product, {"x": np.ones(n, np.float32)}, 1) for n in (2, SIDE))
    assert small < 64 * MIB
    assert 256 * MIB < large - small < 300 * MIB  # 8192 x 8192 float32


def test_a_process_that_fails_is_one_line(outer_product: Path) -> None:
    with pytest.raises(PcrExportError, match=r"the memory of model\.onnx can't be measured .*: is there enough"):
        measure_memory(outer_product, {"unknown": np.ones(2, np.float32)}, 1)
