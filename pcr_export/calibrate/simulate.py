"""The arithmetic of the quantized graph in torch: integer-valued weights and activations on the denoiser's own network.

A quantized layer computes  y = op(q - zero_point, Wq) * (scale * w) + b.  Both operands are integers held in float32, so the sums
are those of the integer kernel, exactly, while they stay below 2^24; what is left are the roundings that the graph makes, too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import TracebackType

import torch
from torch import Tensor, nn

from pcr_export.calibrate.layer_inputs import on_input
from pcr_export.calibrate.ranges import Quantizer, quantize
from pcr_export.calibrate.weights.rounding import RoundWeight
from pcr_export.models.denoiser import Denoiser, Inputs
from pcr_export.sites import Layer
from pcr_export.step_scales import StepScales

Visit = Callable[[str, Tensor], tuple[Tensor, float]]  # (site, activation) -> (what the layer reads, in units of, this)


class _Layer:
    """One layer of the simulation: its integer weight in place, its float weight and bias set aside.

    The parameter itself is exchanged, not its data: another module may have the same one.
    """

    def __init__(self, name: str, site: str, module: nn.Module, round_weight: RoundWeight | None, visit: Visit) -> None:
        self._module, self._site, self._visit = module, site, visit
        self._weight = module.get_parameter("weight")
        self._bias = module._parameters["bias"]
        self._unit = 1.0
        integers, self._weight_scale = _rounded(name, self._weight.data, round_weight)
        module._parameters["weight"] = nn.Parameter(integers, requires_grad=False)
        module._parameters["bias"] = None
        self._handles = [on_input(module, self._before), module.register_forward_hook(self._after)]

    def restore(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._module._parameters["weight"] = self._weight
        self._module._parameters["bias"] = self._bias

    def _before(self, given: Tensor) -> Tensor:
        x, self._unit = self._visit(self._site, given)
        return x

    def _after(self, _module: nn.Module, _args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        shape = (1, -1, 1, 1) if isinstance(self._module, nn.Conv2d) else (-1,)
        output = output * (self._weight_scale * self._unit).reshape(shape)
        return output if self._bias is None else output.add_(self._bias.reshape(shape))


class Simulation:
    """`with Simulation(denoiser, layers, NearestRounding(8))`: the network's weights are quantized and every site can be visited.

    `round_weight` None leaves the weights float. On exit the network has its float weights and no hooks.
    """

    def __init__(self, denoiser: Denoiser, layers: Sequence[Layer], round_weight: RoundWeight | None) -> None:
        self._denoiser = denoiser
        self._names = {layer.name: layer.site for layer in layers if layer.site is not None}
        self._round_weight = round_weight
        self._visit: Visit = leave_float
        self._layers: list[_Layer] = []

    def __enter__(self) -> Simulation:
        try:
            for name, site in self._names.items():
                module = self._denoiser.network.get_submodule(name)
                self._layers.append(_Layer(name, site, module, self._round_weight, lambda *args: self._visit(*args)))
        except BaseException:  # which `with` would leave as it is
            self._restore()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _restore(self) -> None:
        for layer in self._layers:
            layer.restore()
        self._layers = []

    @torch.inference_mode()
    def run(self, inputs: Inputs, visit: Visit | None = None) -> Tensor:
        """One call of the network. `visit` sees each quantized layer's input; without it activations stay float."""
        self._visit = visit or leave_float
        return self._denoiser(inputs)


def leave_float(_site: str, x: Tensor) -> tuple[Tensor, float]:
    """A visit that quantizes nothing."""
    return x, 1.0


def _rounded(name: str, weight: Tensor, round_weight: RoundWeight | None) -> tuple[Tensor, Tensor]:
    """Integers in float32 of weight's shape, and float32 [out_channels]; without a rounding the weight itself, and ones."""
    if round_weight is None:
        return weight, torch.ones(len(weight), device=weight.device)
    q, scale = round_weight(name, weight.float().cpu().numpy())
    return torch.from_numpy(q).to(weight.device, torch.float32), torch.from_numpy(scale).to(weight.device)


class QuantizeSites:
    """A visit that quantizes every site with one step's quantizers."""

    def __init__(self, quantizers: Mapping[str, Quantizer], bits: int) -> None:
        self._quantizers = quantizers
        self._bits = bits

    def __call__(self, site: str, x: Tensor) -> tuple[Tensor, float]:
        """What the layer reads instead of `x`."""
        quantizer = self._quantizers[site]
        return quantize(x, quantizer.scale, quantizer.zero_point, self._bits), quantizer.scale


def quantizers_of_step(scales: StepScales, step: int) -> dict[str, Quantizer]:
    """One row of the table, by site."""
    return {
        site: Quantizer(float(scales.scale[step, i]), int(scales.zero_point[step, i]))
        for i, site in enumerate(scales.sites)
    }


def simulated_call(simulation: Simulation, scales: StepScales, timestep: str) -> Callable[[Inputs], Tensor]:
    """The quantized network as a function of its inputs, with the step found from `timestep` as the graph finds it."""

    def call(inputs: Inputs) -> Tensor:
        step = scales.nearest_step(float(inputs[timestep]))
        return simulation.run(inputs, QuantizeSites(quantizers_of_step(scales, step), int(scales.bits[step])))

    return call
