"""The integers of the artifact against a numpy oracle that knows nothing of windows, gathers or layouts."""

from pathlib import Path

import numpy as np
import pytest
import torch
from min_max import min_max_scales
from small_denoisers import LayerZoo, zoo_denoiser

from pcr_export.calibrate.weights.nearest import quantize_weight
from pcr_export.engines.onnxruntime import OnnxRuntimeEngine
from pcr_export.graph.quantize import quantize_onnx
from pcr_export.graph.to_onnx import export_float_onnx
from pcr_export.step_scales import StepScales

TIMESTEPS = (900.0, 500.0, 100.0)
BITS = (10, 8, 14)
FLOAT = "dilated"  # find_layers leaves it float
POOLED = "pooled"  # reads a mean, which torch and onnxruntime round differently: no oracle for its integers
INTEGER = [name for name, _ in LayerZoo().named_children() if name not in (FLOAT, POOLED)]
SIZE = 7  # odd, so that strides leave a rest


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> tuple[LayerZoo, StepScales, Path]:
    """The zoo with relaxed first and last steps, quantized."""
    folder = tmp_path_factory.mktemp("zoo")
    denoiser = zoo_denoiser()
    x = torch.randn(2, 6, SIZE, SIZE, generator=torch.Generator().manual_seed(1)) + 0.5
    inputs = {"x": x, "timestep": torch.tensor(500.0)}
    scales, layers = min_max_scales(denoiser, inputs, TIMESTEPS, bits=BITS, skip=())
    scales.scale[:] *= np.array([[0.9], [1.0], [1.3]], np.float32)  # saturates at step 0, and every step differs
    export_float_onnx(denoiser, inputs, folder / "float.onnx")
    quantize_onnx(folder / "float.onnx", scales, layers, folder / "model.onnx")
    return denoiser.network, scales, folder / "model.onnx"


def quantize(x: np.ndarray, scales: StepScales, step: int, site: int) -> tuple[np.ndarray, np.ndarray]:
    """(high, low) digits without their zero points, int64, as the docstring of StepScales has them."""
    s, z = scales.scale[step, site], int(scales.zero_point[step, site])
    high = np.clip(np.rint(x / s).astype(np.int64) + z, 0, 255) - z
    if scales.bits[step] == 8:
        return high, np.zeros_like(high)
    r = np.float32(2.0 ** (int(scales.bits[step]) - 8))
    return high, np.clip(np.rint((x / s - high.astype(np.float32)) * r), -128, 127).astype(np.int64)


def accumulate(network: LayerZoo, name: str, digits: np.ndarray) -> np.ndarray:
    """The exact integer product of one layer: float64 holds every sum."""
    layer = network.get_submodule(name)
    q, _ = quantize_weight(layer.weight.detach().numpy())
    x, weight = torch.from_numpy(digits.astype(np.float64)), torch.from_numpy(q.astype(np.float64))
    if name == "upsampled":
        x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    if isinstance(layer, torch.nn.Conv2d):
        return torch.nn.functional.conv2d(x, weight, None, layer.stride, layer.padding, layer.dilation).numpy()
    return torch.nn.functional.linear(x, weight).numpy()


def layer_output(flat: np.ndarray, network: LayerZoo, name: str, x: torch.Tensor) -> np.ndarray:
    """The part of the zoo's joined output that is this layer's, channels last but for convolutions."""
    shapes: dict[str, torch.Size] = {}
    handles = [
        module.register_forward_hook(lambda _m, _i, output, key=key: shapes.__setitem__(key, output.shape))
        for key, module in network.named_children()
    ]
    network(x, torch.tensor(0.0))
    for handle in handles:
        handle.remove()
    start = 0
    for key, shape in shapes.items():  # in the order of the calls but for `gated`, called first and joined last
        if key == "gated":
            continue
        if key == name:
            return flat[:, start : start + shape[1:].numel()].reshape(shape)
        start += shape[1:].numel()
    halves = flat[:, start:].reshape(len(flat), 2, *shapes["gated"][1:-1], -1)
    return np.concatenate([halves[:, 0], halves[:, 1]], axis=-1)


@pytest.mark.parametrize("step", range(3))
@pytest.mark.parametrize("name", INTEGER)
def test_integers_equal_the_oracle(zoo: tuple[LayerZoo, StepScales, Path], name: str, step: int) -> None:
    network, scales, path = zoo
    x = torch.randn(3, 6, SIZE, SIZE, generator=torch.Generator().manual_seed(2)) + 0.5
    with OnnxRuntimeEngine(path, threads=1) as engine:
        flat = engine.run({"x": x.numpy(), "timestep": np.float32(TIMESTEPS[step] + 1)})
    layer = network.get_submodule(name)
    y = layer_output(flat, network, name, x).astype(np.float64)
    seen = x.numpy() if isinstance(layer, torch.nn.Conv2d) else x.flatten(2).transpose(1, 2).numpy()
    site = scales.sites.index(scales.layers[name])
    high, low = quantize(seen, scales, step, site)
    _, w = quantize_weight(layer.weight.detach().numpy())
    axis = (1, -1, 1, 1) if isinstance(layer, torch.nn.Conv2d) else (-1,)
    bias = 0 if layer.bias is None else layer.bias.detach().numpy().astype(np.float64).reshape(axis)
    r = 2.0 ** (int(scales.bits[step]) - 8)
    unit = np.float64(scales.scale[step, site]) * w.astype(np.float64).reshape(axis) / r
    expected = accumulate(network, name, high) * r + accumulate(network, name, low)
    # Float rounding of y moves the quotient by at most 2^-22 of its size: the nearest integer is the accumulator itself.
    np.testing.assert_array_equal(np.rint((y - bias) / unit), expected)


def test_a_layer_without_scales_stays_float(zoo: tuple[LayerZoo, StepScales, Path]) -> None:
    network, scales, path = zoo
    x = torch.randn(2, 6, SIZE, SIZE, generator=torch.Generator().manual_seed(2))
    with OnnxRuntimeEngine(path, threads=1) as engine:
        flat = engine.run({"x": x.numpy(), "timestep": np.float32(500)})
    assert FLOAT not in scales.layers
    expected = network.dilated(x).detach().numpy()
    np.testing.assert_allclose(
        layer_output(flat, network, FLOAT, x), expected, atol=4 * 54 * 2**-24
    )  # sums of 54, in another order


def test_step_is_the_nearest_calibrated_one(zoo: tuple[LayerZoo, StepScales, Path]) -> None:
    _, scales, path = zoo
    x = np.random.default_rng(0).standard_normal((2, 6, SIZE, SIZE), np.float32)
    with OnnxRuntimeEngine(path, threads=1) as engine:
        at = [engine.run({"x": x, "timestep": np.float32(timestep)}) for timestep in TIMESTEPS]
        for timestep in (2000.0, 900.0, 700.5, 700.0, 699.5, 500.0, 300.0, 299.0, 0.0, -5.0):
            found = engine.run({"x": x, "timestep": np.float32(timestep)})
            np.testing.assert_array_equal(found, at[scales.nearest_step(timestep)])
    assert not np.array_equal(at[0], at[1])
