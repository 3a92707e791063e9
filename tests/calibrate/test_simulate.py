import numpy as np
import pytest
import torch
from class_conditional import class_conditional_denoiser

from pcr_export.calibrate.layers import find_layers
from pcr_export.calibrate.ranges import Quantizer, quantize_dequantize
from pcr_export.calibrate.simulate import QuantizeSites, Simulation
from pcr_export.calibrate.weights.nearest import quantize_weight
from pcr_export.errors import PcrExportError


def test_simulation_restores_the_float_network():
    denoiser = class_conditional_denoiser()
    inputs = next(denoiser.walk([1, 2], [0, 1]))
    layers = find_layers(denoiser, inputs, ())
    before = denoiser(inputs)
    with Simulation(denoiser, layers, 8) as simulation:
        quantized = simulation.run(inputs)
    assert not torch.equal(before, quantized)
    assert torch.equal(denoiser(inputs), before)


@pytest.mark.parametrize("bits", [8, 10])
def test_a_linear_layer_equals_integer_arithmetic(bits):
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(9, 40, generator=generator), torch.randn(24, 40, generator=generator)
    scale, zero_point = np.float32(0.03), 100
    q, weight_scale = quantize_weight(weight.numpy())
    a = x.numpy() / scale
    high = np.clip(np.rint(a) + zero_point, 0, 255) - zero_point
    low = np.clip(np.rint((a - high) * 4), -128, 127) if bits == 10 else np.zeros_like(high)
    integers = high.astype(np.int64) @ q.T.astype(np.int64) + (low.astype(np.int64) @ q.T.astype(np.int64)) / 4
    expected = integers * (np.float64(scale) * weight_scale)
    simulated = (
        quantize_dequantize(x, float(scale), zero_point, bits).double()
        @ torch.from_numpy(q * weight_scale[:, None].astype(float)).T
    )
    np.testing.assert_allclose(simulated.numpy(), expected, rtol=0, atol=2e-5)  # float32 rounding of the activations


def test_every_site_is_visited_with_its_own_quantizer():
    denoiser = class_conditional_denoiser()
    inputs = next(denoiser.walk([1], [0]))
    layers = find_layers(denoiser, inputs, ())
    sites = {layer.site for layer in layers}
    seen = set()

    def visit(site, x):
        seen.add(site)
        return QuantizeSites({site: Quantizer(0.1, 128)}, 8)(site, x)

    with Simulation(denoiser, layers, 8) as simulation:
        simulation.run(inputs, visit)
    assert seen == sites


def test_damaged_weights_are_named():
    denoiser = class_conditional_denoiser()
    layers = find_layers(denoiser, next(denoiser.walk([1], [0])), ())
    denoiser.network.merge.weight.data[0, 0] = float("nan")
    with pytest.raises(PcrExportError, match="layer merge: weight holds NaN"), Simulation(denoiser, layers, 8):
        pass
