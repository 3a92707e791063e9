"""The engine on a tiny graph, and what it refuses."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from pcr_export.engines.onnxruntime import OnnxRuntimeEngine
from pcr_export.errors import PcrExportError

GRAPH = """<ir_version: 10, opset_import: ["" : 23]>
add (float[batch, 2] x, float timestep) => (float[batch, 2] y) { y = Add(x, timestep) }"""
X = np.array([[1, 2], [3, 4]], np.float32)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    ir.save(ir.from_onnx_text(GRAPH), tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


def test_runs_with_a_timestep_of_rank_zero(path: Path) -> None:
    with OnnxRuntimeEngine(path, threads=1) as engine:
        np.testing.assert_array_equal(engine.run({"x": X, "timestep": np.float32(10)}), X + 10)


def test_latency_is_in_milliseconds(path: Path) -> None:
    with OnnxRuntimeEngine(path) as engine:
        latency = engine.latency({"x": X, "timestep": np.float32(1)}, runs=5)
    assert 0 < latency.p50 <= latency.p95 < 1000


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(PcrExportError, match=r"model.onnx is missing: export the model again"),
        OnnxRuntimeEngine(tmp_path / "model.onnx"),
    ):
        pass


@pytest.mark.parametrize("content", [b"", b"no graph at all"])
def test_a_broken_file_is_refused_in_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.onnx").write_bytes(content)
    with (
        pytest.raises(PcrExportError, match="export the model again") as caught,
        OnnxRuntimeEngine(tmp_path / "model.onnx"),
    ):
        pass
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("inputs", [{"x": X}, {"x": X, "timestep": np.float32(1), "extra": X}])
def test_missing_and_unknown_inputs_are_refused(path: Path, inputs: dict[str, np.ndarray]) -> None:
    with (
        OnnxRuntimeEngine(path) as engine,
        pytest.raises(PcrExportError, match=r"takes the inputs \['timestep', 'x'\]"),
    ):
        engine.run(inputs)


@pytest.mark.parametrize("x", [X.astype(np.float64), X[0], X[:, :1].repeat(3, 1)])
def test_a_wrong_type_or_shape_is_refused(path: Path, x: np.ndarray) -> None:
    with OnnxRuntimeEngine(path) as engine, pytest.raises(PcrExportError, match="does not run on these inputs"):
        engine.run({"x": x, "timestep": np.float32(1)})


def test_an_engine_outside_with_is_a_mistake(path: Path) -> None:
    with pytest.raises(RuntimeError, match="inside `with`"):
        OnnxRuntimeEngine(path).run({"x": X, "timestep": np.float32(1)})
