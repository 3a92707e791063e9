"""The If must stand before every reader of the core, wherever those stood."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime

from pcr_export.graph.quantize import quantize_onnx
from pcr_export.step_scales import StepScales

GRAPH = """<ir_version: 10, opset_import: ["" : 23]>
side (float[batch, 4] x, float t) => (float[batch, 4] y)
<float[4, 4] a = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16},
 float[4, 4] b = {16, 15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1}> {
    first = MatMul(x, a)
    early = Relu(first)
    last = MatMul(first, b)
    y = Add(early, last)
}"""


def test_a_reader_before_the_last_layer_follows_the_if(tmp_path: Path) -> None:
    model = ir.from_onnx_text(GRAPH)
    for node, module in zip(model.graph, ("first", "", "last", ""), strict=True):
        if module:
            node.metadata_props["pcr.module"] = module
    ir.save(model, tmp_path / "float.onnx")
    scales = StepScales(
        scale=np.full((2, 2), [[0.01, 1.0]], np.float32),
        zero_point=np.full((2, 2), 128, np.uint8),
        bits=np.array([8, 12], np.uint8),
        timesteps=np.array([900.0, 100.0], np.float32),
        sites=("first", "last"),
        layers={"first": "first", "last": "last"},
    )
    assert quantize_onnx(tmp_path / "float.onnx", scales, [], tmp_path / "model.onnx").rewrites["BranchOnRelaxed"] == 2
    seen: set[ir.Node] = set()
    for node in ir.load(tmp_path / "model.onnx").graph:  # onnxruntime sorts for itself, but ONNX demands the order
        assert {value.producer() for value in node.inputs if value is not None} - {None} <= seen
        seen.add(node)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    x = np.array([[0.5, -0.25, 0.75, 1.0]], np.float32)
    reference = onnxruntime.InferenceSession(tmp_path / "float.onnx", providers=["CPUExecutionProvider"])
    for timestep, tolerance in ((900.0, 0.05), (100.0, 0.01)):
        inputs = {"x": x, "t": np.array(timestep, np.float32)}
        expected = reference.run(None, inputs)[0]
        np.testing.assert_allclose(session.run(None, inputs)[0], expected, rtol=tolerance)  # 8 and 12 bit activations
