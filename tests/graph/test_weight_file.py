"""External data: what is stored is what is read back, whatever the memory layout."""

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from pcr_export.graph.weight_file import ALIGNMENT, WeightFile, row_major

NIBBLES = np.random.default_rng(1).integers(-8, 8, (55, 100)).astype(ml_dtypes.int4)
MATRIX = np.random.default_rng(0).standard_normal((300, 400)).astype(np.float32)


@pytest.mark.parametrize(
    "array",
    [MATRIX, MATRIX.T, MATRIX[:, 7:200].T, MATRIX.T[:, ::3], MATRIX.reshape(3, 4, 100, 100).transpose(2, 3, 1, 0)],
    ids=["rows", "columns", "part of columns", "every third column", "four axes"],
)
def test_row_major_changes_the_layout_alone(array: np.ndarray) -> None:
    found = row_major(array)
    assert found.flags.c_contiguous
    np.testing.assert_array_equal(found, array)
    assert np.shares_memory(found, array) == array.flags.c_contiguous


def test_what_is_stored_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    arrays = {"rows": MATRIX, "columns": MATRIX.T, "small": np.arange(3), "bytes": MATRIX.T.astype(np.int8)}
    arrays |= {f"nibbles {i}": NIBBLES[:, : 99 + i].T for i in range(2)} | {"few": NIBBLES[:1, :3]}
    model = ir.Model(ir.Graph([], [], nodes=[], opset_imports={"": 23}, name="weights"), ir_version=10)
    with WeightFile(path) as weights:
        for name, array in arrays.items():
            value = ir.Value(name=name, shape=ir.Shape(array.shape), const_value=weights.store(array, name))
            model.graph.register_initializer(value)
        weights.commit(model)
    stored = ir.load(path).graph.initializers
    for name, array in arrays.items():
        tensor = stored[name].const_value
        assert tensor is not None
        np.testing.assert_array_equal(tensor.numpy(), array)
        assert name in ("small", "few") or (isinstance(tensor, ir.ExternalTensor) and tensor.offset % ALIGNMENT == 0)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.onnx", "model.onnx_data"]


def test_left_without_commit_nothing_stays(tmp_path: Path) -> None:
    with WeightFile(tmp_path / "model.onnx") as weights:
        weights.store(MATRIX, "rows")
    assert list(tmp_path.iterdir()) == []
