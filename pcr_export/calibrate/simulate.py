"""The arithmetic of the quantized graph in torch: fake-quantized weights and activations on the denoiser's own network."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import TracebackType

import torch
from torch import Tensor, nn

from pcr_export.calibrate.ranges import Quantizer, quantize_dequantize
from pcr_export.calibrate.weights.nearest import quantize_weight
from pcr_export.errors import PcrExportError
from pcr_export.models.denoiser import Denoiser, Inputs
from pcr_export.sites import Layer
from pcr_export.step_scales import StepScales

Visit = Callable[[str, Tensor], Tensor]  # (site, activation) -> what the layer reads instead


class Simulation:
    """`with Simulation(denoiser, layers, 8)`: the network's weights are quantized and every site can be visited.

    `weight_bits` None leaves the weights float (to observe the float model). On exit the network has its float weights and no hooks.
    """

    def __init__(self, denoiser: Denoiser, layers: Sequence[Layer], weight_bits: int | None) -> None:
        self._denoiser = denoiser
        self._layers = [layer for layer in layers if layer.site is not None]
        self._weight_bits = weight_bits
        self._visit: Visit | None = None
        self._float_weights: dict[str, Tensor] = {}
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> Simulation:
        for layer in self._layers:
            module = self._denoiser.network.get_submodule(layer.name)
            if self._weight_bits is not None:
                weight: Tensor = module.get_parameter("weight").data
                self._float_weights[layer.name] = weight
                module.get_parameter("weight").data = _quantized_weight(layer.name, weight, self._weight_bits)
            self._handles.append(module.register_forward_pre_hook(self._hook(str(layer.site))))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        for name, weight in self._float_weights.items():
            self._denoiser.network.get_submodule(name).get_parameter("weight").data = weight
        self._float_weights, self._handles = {}, []

    def _hook(self, site: str) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
        def read_visited(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return args if self._visit is None else (self._visit(site, args[0]), *args[1:])

        return read_visited

    @torch.inference_mode()
    def run(self, inputs: Inputs, visit: Visit | None = None) -> Tensor:
        """One call of the network. `visit` sees each quantized layer's input; without it activations stay float."""
        self._visit = visit
        try:
            return self._denoiser(inputs)
        finally:
            self._visit = None


def _quantized_weight(name: str, weight: Tensor, bits: int) -> Tensor:
    try:
        q, scale = quantize_weight(weight.float().cpu().numpy(), bits)
    except ValueError as error:
        raise PcrExportError(f"layer {name}: {error}: the model's weights are damaged") from error
    dequantized = torch.from_numpy(q).float() * torch.from_numpy(scale).reshape(-1, *[1] * (q.ndim - 1))
    return dequantized.to(weight.device)


class QuantizeSites:
    """A visit that quantizes every site with one step's quantizers."""

    def __init__(self, quantizers: Mapping[str, Quantizer], bits: int) -> None:
        self._quantizers = quantizers
        self._bits = bits

    def __call__(self, site: str, x: Tensor) -> Tensor:
        """What the layer reads instead of `x`."""
        quantizer = self._quantizers[site]
        return quantize_dequantize(x, quantizer.scale, quantizer.zero_point, self._bits)


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
