"""The lowered group norm against float64, where the variance is easily lost."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from pcr_export.graph.job import DOMAIN, Job
from pcr_export.graph.passes import group_norm
from pcr_export.graph.passes.group_norm import LowerGroupNorm
from pcr_export.graph.weight_file import WeightFile
from pcr_export.step_scales import StepScales

CHANNELS, GROUPS, EPSILON = 12, 3, 1e-5
SCALES = StepScales(
    scale=np.ones((1, 0), np.float32),
    zero_point=np.zeros((1, 0), np.uint8),
    bits=np.array([8], np.uint8),
    timesteps=np.array([1.0], np.float32),
    sites=(),
    layers={},
)


def run_lowered(folder: Path, parts: list[np.ndarray], gamma: np.ndarray, beta: np.ndarray) -> np.ndarray:
    """GroupNormalization of the parts, joined over channels, as onnxruntime computes its lowered form."""
    floats = ir.TensorType(ir.DataType.FLOAT)
    inputs = [ir.val(f"x{i}", ir.DataType.FLOAT, part.shape) for i, part in enumerate(parts)]
    constants = [ir.Value(name=n, const_value=ir.tensor(a, name=n)) for n, a in (("gamma", gamma), ("beta", beta))]
    for value, array in zip(constants, (gamma, beta), strict=True):
        value.shape, value.type = ir.Shape(array.shape), floats
    nodes = []
    x = inputs[0]
    if len(parts) > 1:
        nodes.append(ir.node("Concat", inputs, {"axis": 3}, name="join"))
        x = nodes[-1].outputs[0]
        x.name = "x"
    attributes = {"num_groups": GROUPS, "epsilon": EPSILON}
    nodes.append(ir.node("GroupNormalization", [x, *constants], attributes, domain=DOMAIN, name="norm"))
    y = nodes[-1].outputs[0]
    y.name, y.type, y.shape = "y", floats, ir.Shape([None] * 4)
    graph = ir.Graph(inputs, [y], nodes=nodes, initializers=constants, opset_imports={"": 23}, name="test")
    with WeightFile(folder / "model.onnx") as weights:
        assert LowerGroupNorm().apply(Job(graph=graph, scales=SCALES, timestep="t", weights=weights)) == 1
        weights.commit(ir.Model(graph, ir_version=10))
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    return session.run(None, {f"x{i}": part for i, part in enumerate(parts)})[0]


def expected(x: np.ndarray, gamma: np.ndarray, beta: np.ndarray) -> np.ndarray:
    """float64, from the definition."""
    groups = x.astype(np.float64).reshape(len(x), -1, GROUPS, x.shape[-1] // GROUPS)
    mean, variance = groups.mean(axis=(1, 3), keepdims=True), groups.var(axis=(1, 3), keepdims=True)
    return ((groups - mean) / np.sqrt(variance + EPSILON)).reshape(x.shape) * gamma + beta


@pytest.fixture(params=[group_norm.WIDEST_MATRIX, 0], ids=["one matrix", "two thin matrices"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group_norm, "WIDEST_MATRIX", request.param)


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("widths", [(12,), (5, 7)], ids=["whole", "joined from parts across a group"])
@pytest.mark.parametrize(
    ("mean", "tolerance"),
    [(0.0, 1e-5), (10.0, 1e-3)],  # E[x^2] - E[x]^2 loses mean^2 / variance of float32's 6e-8
)
def test_group_norm_is_that_of_the_definition(
    tmp_path: Path, widths: tuple[int, ...], mean: float, tolerance: float
) -> None:
    generator = np.random.default_rng(0)
    x = generator.standard_normal((2, 16, 16, CHANNELS), np.float32) + np.float32(mean)
    gamma, beta = generator.standard_normal((2, CHANNELS), np.float32)
    parts = [np.ascontiguousarray(part) for part in np.split(x, np.cumsum(widths)[:-1], axis=3)]
    np.testing.assert_allclose(run_lowered(tmp_path, parts, gamma, beta), expected(x, gamma, beta), atol=tolerance)


@pytest.mark.usefixtures("form")
def test_a_constant_picture_gives_beta_and_no_nan(tmp_path: Path) -> None:
    x = np.full((2, 16, 16, CHANNELS), 1234.5678, np.float32)
    gamma, beta = np.zeros(CHANNELS, np.float32), np.linspace(-1, 1, CHANNELS, dtype=np.float32)
    np.testing.assert_allclose(run_lowered(tmp_path, [x], gamma, beta), np.broadcast_to(beta, x.shape))
