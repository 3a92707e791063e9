import dataclasses

import numpy as np
import pytest
import torch
from calibrate.unusual_networks import unusual_denoiser
from class_conditional import class_conditional_denoiser
from torch import nn

from pcr_export.calibrate.layers import find_layers
from pcr_export.calibrate.ranges import Quantizer
from pcr_export.calibrate.simulate import QuantizeSites, Simulation
from pcr_export.calibrate.weights.nearest import quantize_weight
from pcr_export.calibrate.weights.rounding import NEAREST_8
from pcr_export.errors import PcrExportError
from pcr_export.qdiffbench.fidelity import sqnr_db
from pcr_export.sites import Layer


def test_simulation_restores_the_float_network():
    denoiser = class_conditional_denoiser()
    inputs = next(denoiser.walk([1, 2], [0, 1]))
    layers = find_layers(denoiser, inputs, ())
    before = denoiser(inputs)
    with Simulation(denoiser, layers, NEAREST_8) as simulation:
        quantized = simulation.run(inputs)
    assert not torch.equal(before, quantized)
    assert torch.equal(denoiser(inputs), before)


@pytest.mark.parametrize("bits", [8, 10])
@pytest.mark.parametrize("op", ["Linear", "Conv2d"])
def test_a_layer_equals_integer_arithmetic(op, bits):
    """The sums are exact integers; scaling them rounds three times."""
    torch.manual_seed(0)
    linear = op == "Linear"
    module = nn.Linear(40, 24) if linear else nn.Conv2d(40, 24, 1)
    x = torch.randn(9, 40) if linear else torch.randn(9, 40, 3, 2)
    denoiser = dataclasses.replace(
        class_conditional_denoiser(), network=nn.Sequential(module), call=lambda network, inputs: network(inputs["x"])
    )
    scale, zero_point = np.float32(0.03), 100
    with Simulation(denoiser, [Layer(name="0", op=op, site="0")], NEAREST_8) as simulation:
        simulated = simulation.run({"x": x}, QuantizeSites({"0": Quantizer(float(scale), zero_point)}, bits))

    q, weight_scale = quantize_weight(module.weight.detach().numpy())
    rows = x.numpy() if linear else x.permute(0, 2, 3, 1).reshape(-1, 40).numpy()
    a = rows / scale
    high = np.clip(np.rint(a) + zero_point, 0, 255) - zero_point
    low = np.clip(np.rint((a - high) * 4), -128, 127) if bits == 10 else np.zeros_like(high)
    weight = q.reshape(24, 40).T.astype(np.int64)
    integers = high.astype(np.int64) @ weight + (low.astype(np.int64) @ weight) / 4
    expected = integers * np.float64(scale) * weight_scale + module.bias.detach().numpy()
    result = simulated.numpy() if linear else simulated.permute(0, 2, 3, 1).reshape(-1, 24).numpy()
    np.testing.assert_allclose(result, expected, rtol=4 * 2**-24, atol=2**-22)


def test_every_site_is_visited_with_its_own_quantizer():
    denoiser = class_conditional_denoiser()
    inputs = next(denoiser.walk([1], [0]))
    layers = find_layers(denoiser, inputs, ())
    sites = {layer.site for layer in layers if layer.site}
    seen = set()

    def visit(site, x):
        seen.add(site)
        return QuantizeSites({site: Quantizer(0.1, 128)}, 8)(site, x)

    with Simulation(denoiser, layers, NEAREST_8) as simulation:
        simulation.run(inputs, visit)
    assert seen == sites


def test_damaged_weights_are_named():
    denoiser = class_conditional_denoiser()
    layers = find_layers(denoiser, next(denoiser.walk([1], [0])), ())
    denoiser.network.merge.weight.data[0, 0] = float("nan")
    with pytest.raises(PcrExportError, match="layer merge: weight holds NaN"), Simulation(denoiser, layers, NEAREST_8):
        pass


def test_tied_layers_called_by_name_compute_with_the_same_integers():
    """Neither tied weights nor a subclass nor a call by keyword changes what the integers give, and all is as it was afterwards."""
    denoiser = unusual_denoiser()
    inputs = next(denoiser.walk([0, 0], [0, 1]))
    layers = find_layers(denoiser, inputs, ())
    before, weight = denoiser(inputs), denoiser.network.one.weight
    with Simulation(denoiser, layers, NEAREST_8) as simulation:
        simulated = simulation.run(inputs)
    assert torch.equal(denoiser(inputs), before)
    assert denoiser.network.one.weight is denoiser.network.other.weight is weight
    assert sqnr_db(before.square().sum().item(), (simulated - before).square().sum().item()) > 30  # 8-bit weights alone


@pytest.mark.parametrize("where", ["entering", "inside"])
def test_an_error_leaves_the_float_network(where):
    denoiser = class_conditional_denoiser()
    inputs = next(denoiser.walk([1], [0]))
    layers = find_layers(denoiser, inputs, ())
    before = {name: tensor.clone() for name, tensor in denoiser.network.state_dict().items()}
    rounded = []

    def stop_at_the_third(name, weight):
        rounded.append(name)
        if len(rounded) == 3 and where == "entering":
            raise KeyboardInterrupt
        return NEAREST_8(name, weight)

    def stop(_site, _x):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), Simulation(denoiser, layers, stop_at_the_third) as simulation:
        simulation.run(inputs, stop)
    after = denoiser.network.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in denoiser.network.modules())
