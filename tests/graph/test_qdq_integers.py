"""The integers of TensorRT's dialect against the numpy oracle; and no sum leaves float16."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from test_integers import BITS, INTEGER, SIZE, TIMESTEPS, accumulate, quantize
from test_integers import zoo as integer_zoo  # noqa: F401 - the same fixture, whose float graph is lowered again here

from pcr_export.calibrate.weights.nearest import quantize_weight
from pcr_export.graph.passes.lower_to_qdq import LARGEST_HALF, accumulator_unit, largest_activation
from pcr_export.graph.quantize import quantize_onnx
from pcr_export.sites import Layer
from pcr_export.step_scales import StepScales

Zoo = tuple[torch.nn.Module, StepScales, Path]


@pytest.fixture(scope="module")
def zoo(integer_zoo: Zoo) -> Zoo:  # noqa: F811
    """The zoo with relaxed first and last steps, in TensorRT's dialect; its products are the outputs, as whole numbers."""
    network, scales, integer_path = integer_zoo
    path = integer_path.parent / "qdq.onnx"
    layers = [Layer(name=name, op="", site=site) for name, site in scales.layers.items()]
    quantize_onnx(integer_path.parent / "float.onnx", scales, layers, path, "tensorrt")
    read_products(path, integer_path.parent / "products.onnx")
    return network, scales, integer_path.parent / "products.onnx"


def read_products(path: Path, out: Path) -> None:
    """Cut the graph behind each layer's product, and let both of its operands be integers in float32, which holds the sums."""
    model = ir.load(path)
    products = [node.outputs[0] for node in model.graph if "/product#" in str(node.name)]
    one = ir.Value(name="whole", const_value=ir.tensor(np.array(1, np.float32), name="whole"))
    one.dtype, one.shape = ir.DataType.FLOAT, ir.Shape([])
    model.graph.register_initializer(one)
    for node in model.graph:
        if node.op_type == "DequantizeLinear":
            node.replace_input_with(1, one)
    model.graph.outputs.clear()
    for product in products:
        product.name = str(product.producer().name).split("/product#")[0]
        product.dtype = ir.DataType.FLOAT
        model.graph.outputs.append(product)
    ir.passes.common.RemoveUnusedNodesPass()(model)
    ir.save(model, out)


@pytest.fixture(scope="module")
def products(zoo: Zoo) -> dict[int, dict[str, np.ndarray]]:
    """Step -> layer -> its integer sums, the digits behind one another on the batch axis."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = (
        onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    )  # each product as it is written
    session = onnxruntime.InferenceSession(zoo[2], options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return {
        step: dict(
            zip(names, session.run(None, {"x": picture(), "timestep": np.array(timestep + 1, np.float32)}), strict=True)
        )
        for step, timestep in enumerate(TIMESTEPS)
    }


def picture() -> np.ndarray:
    """float32 values that float16 holds exactly."""
    x = torch.randn(3, 6, SIZE, SIZE, generator=torch.Generator().manual_seed(2)) + 0.5
    return x.half().float().numpy()


@pytest.mark.parametrize("step", range(3))
@pytest.mark.parametrize("name", INTEGER)
def test_integers_equal_the_oracle(zoo: Zoo, products: dict[int, dict[str, np.ndarray]], name: str, step: int) -> None:
    network, scales, _ = zoo
    x = picture()
    layer = network.get_submodule(name)
    seen = x if isinstance(layer, torch.nn.Conv2d) else x.reshape(*x.shape[:2], -1).swapaxes(1, 2)
    site = scales.sites.index(scales.layers[name])
    # TensorRT's quantizer is symmetric: the zero point's distance to the middle leaves the integers and enters the bias.
    offset = 128 - int(scales.zero_point[step, site])
    high, low = quantize(seen, scales, step, site)
    digits = [high - offset, *([low] if BITS[step] > 8 else [])]
    expected = np.concatenate([accumulate(network, name, each) for each in digits])
    np.testing.assert_array_equal(products[step][name], expected)


def test_weights_are_the_simulation_s(zoo: Zoo) -> None:
    network, _, path = zoo
    initializers = ir.load(path).graph.initializers
    for name in INTEGER:
        q, _ = quantize_weight(network.get_submodule(name).weight.detach().numpy())
        stored = initializers[f"{name}.weight_q"].const_value.numpy()
        np.testing.assert_array_equal(stored, q if q.ndim == 4 else q.T)


@pytest.mark.parametrize("bits", [8, 9, 10, 16])
def test_no_sum_leaves_float16(bits: int) -> None:
    """The worst case: every weight 127, every activation at its end, the low digit too."""
    scales = StepScales(
        scale=np.ones((2, 1), np.float32),
        zero_point=np.full((2, 1), 128, np.uint8),
        bits=np.array([bits, 8], np.uint8),
        timesteps=np.array([2.0, 1.0], np.float32),
        sites=("a",),
        layers={"a": "a"},
    )
    reach = largest_activation(scales)
    assert reach >= (128 if bits == 8 else 128 + 128 / 2 ** (bits - 8))
    for fan_in in [*range(1, 5000), 5120, 11520, 23040, 46080, 10**6]:
        unit = accumulator_unit(fan_in, reach)
        assert np.float16(unit) == unit
        assert fan_in * 127 * reach * unit < LARGEST_HALF
        assert unit == 2**-10 or fan_in * 127 * reach * 2 * unit >= LARGEST_HALF


def test_the_unit_is_a_thousandth_while_it_fits() -> None:
    assert accumulator_unit(4126) == 2**-10
    assert accumulator_unit(4127) == 2**-11
