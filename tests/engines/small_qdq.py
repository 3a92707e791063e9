"""A small quantized graph as the job writes it: FP16 around INT8, node names by module path, weights beside the file."""

from pathlib import Path

import numpy as np
import onnx_ir as ir

C = 2.0**-10  # scale of the integer weights
CHANNELS = 32

GRAPH = f"""<ir_version: 10, opset_import: ["" : 23]>
small (float[batch, {CHANNELS}, height, width] sample, float timestep, float16 one, int8 zero, float16 c,
       int8[{CHANNELS}, {CHANNELS}, 3, 3] conv1_weight, PROJ_WEIGHT) => (float[batch, {CHANNELS}, height, width] out_sample)
{{
  half = Cast<to = 10>(sample)
  conv1_q = QuantizeLinear(half, one, zero)
  conv1_dq = DequantizeLinear(conv1_q, one, zero)
  conv1_w = DequantizeLinear(conv1_weight, c)
  conv1_product = Conv<pads = [1, 1, 1, 1], kernel_shape = [3, 3]>(conv1_dq, conv1_w)
  step = Cast<to = 10>(timestep)
  scaled = Mul(conv1_product, step)
  active = Relu(scaled)
  PROJ
  out_sample = Cast<to = 1>(proj_product)
}}"""
QUANTIZED_PROJ = """
  proj_q = QuantizeLinear(active, one, zero)
  proj_dq = DequantizeLinear(proj_q, one, zero)
  proj_w = DequantizeLinear(proj_weight, c)
  proj_product = Conv<kernel_shape = [1, 1]>(proj_dq, proj_w)"""
FLOAT_PROJ = "proj_product = Conv<kernel_shape = [1, 1]>(active, proj_weight)"
NAMES = {
    "conv1_q": "conv1/q#1",
    "conv1_w": "conv1/weight_dq#2",
    "conv1_product": "conv1/product#3",
    "proj_q": "mid.proj/q#4",
    "proj_w": "mid.proj/weight_dq#5",
    "proj_product": "mid.proj/product#6",
}
LAYERS = ("conv1", "mid.proj")


def save_small_graph(path: Path, *, float_proj: bool = False) -> Path:
    """Write the graph with two convolutions, the second in INT8 or in FP16, and its weights as external data."""
    proj, kind = (FLOAT_PROJ, "float16") if float_proj else (QUANTIZED_PROJ, "int8")
    weight = f"{kind}[{CHANNELS}, {CHANNELS}, 1, 1] proj_weight"
    model = ir.from_onnx_text(GRAPH.replace("PROJ_WEIGHT", weight).replace("PROJ", proj))
    rng = np.random.default_rng(0)
    arrays = {
        "one": np.float16(1),
        "zero": np.int8(0),
        "c": np.float16(C),
        "conv1_weight": rng.integers(-127, 128, (CHANNELS, CHANNELS, 3, 3)).astype(np.int8),
        "proj_weight": rng.integers(-127, 128, (CHANNELS, CHANNELS, 1, 1)).astype(
            np.float16 if float_proj else np.int8
        ),
    }
    for value in model.graph.inputs[2:]:
        value.const_value = ir.tensor(np.asarray(arrays[str(value.name)]), name=value.name)
    constants = model.graph.inputs[2:]
    del model.graph.inputs[2:]
    for value in constants:
        model.graph.register_initializer(value)
    for node in model.graph:
        node.name = NAMES.get(str(node.outputs[0].name), node.outputs[0].name)
    path.parent.mkdir(parents=True, exist_ok=True)
    ir.save(model, path, external_data=path.name + "_data", size_threshold_bytes=256)
    return path
