"""The expanded group norm against float64, where the variance is easily lost, and where it must not fire."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from pcr_export.graph.job import Job
from pcr_export.graph.passes.expand_group_norm import ExpandGroupNorm
from pcr_export.graph.quantize import NOTHING_QUANTIZED
from pcr_export.graph.weight_file import WeightFile

CHANNELS, GROUPS, EPSILON = 12, 3, 1e-5
HALF = ir.DataType.FLOAT16


def norm_graph(shape: tuple[int, ...], gamma: np.ndarray, beta: np.ndarray) -> ir.Graph:
    x = ir.val("x", HALF, shape)
    constants = [ir.Value(name=n, const_value=ir.tensor(a, name=n)) for n, a in (("gamma", gamma), ("beta", beta))]
    for value, array in zip(constants, (gamma, beta), strict=True):
        value.shape, value.type = ir.Shape(array.shape), ir.TensorType(HALF)
    attributes = {"num_groups": GROUPS, "epsilon": EPSILON}
    node = ir.node("GroupNormalization", [x, *constants], attributes, name="norm")
    y = node.outputs[0]
    y.name, y.type, y.shape = "y", ir.TensorType(HALF), ir.Shape(shape)
    return ir.Graph([x], [y], nodes=[node], initializers=constants, opset_imports={"": 23}, name="test")


def run_expanded(folder: Path, x: np.ndarray, gamma: np.ndarray, beta: np.ndarray) -> np.ndarray:
    graph = norm_graph(x.shape, gamma, beta)
    with WeightFile(folder / "model.onnx") as weights:
        assert ExpandGroupNorm().apply(Job(graph=graph, scales=NOTHING_QUANTIZED, timestep="t", weights=weights)) == 1
        weights.commit(ir.Model(graph, ir_version=10))
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


def expected(x: np.ndarray, gamma: np.ndarray, beta: np.ndarray) -> np.ndarray:
    """float64, from the definition."""
    groups = x.astype(np.float64).reshape(len(x), GROUPS, -1)
    normed = (groups - groups.mean(2, keepdims=True)) / np.sqrt(groups.var(2, keepdims=True) + EPSILON)
    return normed.reshape(x.shape) * gamma.reshape(-1, 1, 1).astype(np.float64) + beta.reshape(-1, 1, 1)


@pytest.mark.parametrize("mean", [0.0, 10.0])
def test_group_norm_is_that_of_the_definition(tmp_path: Path, mean: float) -> None:
    """To half a unit in the last place of float16, which is 2^-10 of values below 4, and what float32 loses of the variance."""
    generator = np.random.default_rng(0)
    x = (generator.standard_normal((2, CHANNELS, 16, 8)) + mean).astype(np.float16)
    gamma, beta = (generator.standard_normal(CHANNELS).astype(np.float16) for _ in range(2))
    np.testing.assert_allclose(run_expanded(tmp_path, x, gamma, beta), expected(x, gamma, beta), rtol=2**-10, atol=2e-3)


def test_a_constant_picture_gives_beta_and_no_nan(tmp_path: Path) -> None:
    x = np.full((2, CHANNELS, 16, 16), 1234.0, np.float16)
    gamma, beta = np.zeros(CHANNELS, np.float16), np.linspace(-1, 1, CHANNELS, dtype=np.float16)
    np.testing.assert_array_equal(
        run_expanded(tmp_path, x, gamma, beta), np.broadcast_to(beta.reshape(-1, 1, 1), x.shape)
    )


def test_weights_too_large_for_the_model_file_are_not_read_back(tmp_path: Path) -> None:
    """float16 weights that a pass before put into the data file, which is not there until the graph is whole."""
    channels = 3 * 2048
    x = np.random.default_rng(1).standard_normal((1, channels, 2, 2)).astype(np.float16)
    gamma, beta = np.full(channels, 2, np.float16), np.full(channels, 3, np.float16)
    graph = norm_graph(x.shape, gamma, beta)
    with WeightFile(tmp_path / "model.onnx") as weights:
        job = Job(graph=graph, scales=NOTHING_QUANTIZED, timestep="t", weights=weights)
        norm = graph.node(0)
        for i, array in ((1, gamma), (2, beta)):
            norm.replace_input_with(i, job.initializer(array, f"stored{i}"))
        assert isinstance(norm.inputs[1].const_value, ir.ExternalTensor)
        assert ExpandGroupNorm().apply(job) == 1
        for name in ("gamma", "beta"):
            del graph.initializers[name]
        weights.commit(ir.Model(graph, ir_version=10))
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(session.run(None, {"x": x})[0], expected(x, gamma, beta), rtol=2**-10, atol=2e-3)


def test_what_is_no_picture_stays(tmp_path: Path) -> None:
    ones = np.ones(CHANNELS, np.float16)
    graph = norm_graph((2, CHANNELS, 16), ones, ones)
    with WeightFile(tmp_path / "model.onnx") as weights:
        assert ExpandGroupNorm().apply(Job(graph=graph, scales=NOTHING_QUANTIZED, timestep="t", weights=weights)) == 0
    assert [node.op_type for node in graph] == ["GroupNormalization"]
