"""One block of a network with what it was called with: its layers' errors, and their rounding by GPTQ or AdaRound."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from pcr_export.calibrate.layer_inputs import on_input
from pcr_export.calibrate.weights.adaround import AdaRoundSettings, SoftRounding, learn_rounding
from pcr_export.calibrate.weights.block_inputs import BlockCall, read_block_call
from pcr_export.calibrate.weights.gptq import gptq, output_error
from pcr_export.calibrate.weights.nearest import quantize_weight
from pcr_export.sites import Layer

Rounded = dict[
    str, tuple[np.ndarray, np.ndarray]
]  # layer -> (int8 of the weight's shape, scale float32 [out_channels])
SAMPLES_PER_CALL = 32
START_SHARPNESS = 0.7  # of AdaRound: GPTQ's rounding is a good one, and can still be left
WINDOW_ELEMENTS = 2**26  # of a convolution's unfolded input, at a time


@dataclass(frozen=True)
class Block:
    """A float module, those of its layers that are quantized, and its arguments over many samples. Nothing in the module is changed."""

    name: str  # module path; the layers lie below it, or are it
    module: nn.Module
    layers: Sequence[Layer]
    call: BlockCall

    def weight(self, layer: str) -> np.ndarray:
        """float32 [out_channels, ...]."""
        weight = self.layer_module(layer).get_parameter("weight")
        array: np.ndarray = weight.detach().float().numpy()
        return array

    def gptq(self, bits: Mapping[str, int]) -> Rounded:
        """Every layer by GPTQ, with the Hessian of its inputs at all steps."""
        found = {layer: gptq(self.weight(layer), self.hessians[layer], bits[layer]) for layer in bits}
        return {layer: (each.q, each.scale) for layer, each in found.items()}

    def adaround(
        self,
        bits: Mapping[str, int],
        settings: AdaRoundSettings,
        *,
        seed: int,
        from_gptq: bool = True,
        advance: Callable[[int], None] = lambda _count: None,
    ) -> Rounded:
        """All layers together by AdaRound: the block's output comes nearer to the float block's.

        `from_gptq` starts where GPTQ ended, otherwise from the weight itself, as published.
        """
        scales, roundings = {}, {}
        for layer, width in bits.items():
            weight = self.weight(layer)
            if from_gptq:
                found = gptq(weight, self.hessians[layer], width)
                steps, scales[layer] = found.compensated, found.scale
            else:
                scales[layer] = quantize_weight(weight, width)[1]
                steps = weight / _column(scales[layer], weight)
            sharpness = START_SHARPNESS if from_gptq else 0.0
            scale = torch.from_numpy(scales[layer])
            roundings[layer] = SoftRounding(torch.from_numpy(steps), scale, width, sharpness)
        targets = self.outputs({})

        def loss(weights: Mapping[str, Tensor], indices: Tensor) -> Tensor:
            errors = (self.run(weights, self.call.rows(indices)) - targets[indices]).square()
            channels = errors.shape[1] if errors.ndim == 4 else errors.shape[-1]
            return errors.mean() * channels

        learn_rounding(roundings, loss, self.call.num_samples, settings, seed, advance)
        return {layer: (rounding.harden(), scales[layer]) for layer, rounding in roundings.items()}

    def relative_error(self, layer: str, q: np.ndarray, scale: np.ndarray) -> float:
        """The squared error of the layer's output, bias left out, relative to the output's energy, over all samples."""
        weight, hessian = self.weight(layer), self.hessians[layer]
        return output_error(q * _column(scale, weight) - weight, hessian) / max(output_error(weight, hessian), 1e-30)

    @torch.no_grad()
    def outputs(self, weights: Mapping[str, Tensor]) -> Tensor:
        """The block's output for all samples, with these weights in the place of the layers' own; float32 [samples, ...]."""
        parts = range(0, self.call.num_samples, SAMPLES_PER_CALL)
        return torch.cat([self.run(weights, self.call.rows(slice(i, i + SAMPLES_PER_CALL))) for i in parts])

    def layer_module(self, layer: str) -> nn.Module:
        """The Linear or Conv2d of a layer."""
        return self.module.get_submodule(self._path[layer])

    def dequantized(self, layer: str, q: np.ndarray, scale: np.ndarray) -> Tensor:
        """The float32 weight that a layer's integers and scales stand for."""
        return torch.from_numpy(q * _column(scale, self.weight(layer)))

    def run(self, weights: Mapping[str, Tensor], call: BlockCall) -> Tensor:
        """The output for one call, with these weights in the place of the layers' own."""
        named = {".".join(filter(None, (self._path[layer], "weight"))): weight for layer, weight in weights.items()}
        output: Tensor = functional_call(self.module, named, tuple(call.args), dict(call.kwargs), tie_weights=False)
        return output

    @cached_property
    def _path(self) -> dict[str, str]:
        """Layer -> its path within the module."""
        return {layer.name: layer.name.removeprefix(self.name).removeprefix(".") for layer in self.layers}

    @cached_property
    def hessians(self) -> dict[str, Tensor]:
        """Layer -> sum of x x^T over its inputs, float32 [fan_in, fan_in]; layers of one site and one window share it."""
        sums: dict[tuple[object, ...], Tensor] = {}
        counted: set[tuple[object, ...]] = set()

        def count(layer: str, module: nn.Module, x: Tensor) -> None:
            key = self._hessian_key(layer)
            if key not in counted:
                counted.add(key)
                for rows in _input_rows(module, x):
                    sums[key] = sums[key].addmm_(rows.T, rows) if key in sums else rows.T @ rows

        with torch.no_grad(), ExitStack() as hooks:
            for layer, path in self._path.items():
                module = self.module.get_submodule(path)
                hooks.enter_context(on_input(module, partial(count, layer, module)))
            for start in range(0, self.call.num_samples, SAMPLES_PER_CALL):
                counted.clear()
                self.run({}, self.call.rows(slice(start, start + SAMPLES_PER_CALL)))
        return {layer: sums[self._hessian_key(layer)] for layer in self._path}

    def _hessian_key(self, layer: str) -> tuple[object, ...]:
        module = self.layer_module(layer)
        site = next(each.site for each in self.layers if each.name == layer)
        window = (module.kernel_size, module.stride, module.padding) if isinstance(module, nn.Conv2d) else ()
        return (site, *window)


def read_block(network: nn.Module, name: str, layers: Sequence[Layer], folder: Path) -> Block:
    """The block `name` of the float network with those of `layers` that are quantized in it, and the inputs recorded in `folder`."""
    inside = [layer for layer in layers if layer.site and f"{layer.name}.".startswith(f"{name}.")]
    return Block(name, network.get_submodule(name), inside, read_block_call(folder, name))


def _column(scale: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """A number per output channel, in the shape that multiplies the weight."""
    return scale.reshape(-1, *[1] * (weight.ndim - 1))


def _input_rows(module: nn.Module, x: Tensor) -> list[Tensor]:
    """What each output number of a layer is a product with: float32 [products, fan_in], in parts."""
    if not isinstance(module, nn.Conv2d):
        return [x.reshape(-1, x.shape[-1])]
    fan_in = module.in_channels * module.kernel_size[0] * module.kernel_size[1]
    size = max(1, WINDOW_ELEMENTS // (fan_in * x.shape[-2] * x.shape[-1]))
    assert not isinstance(module.padding, str)
    unfold = partial(F.unfold, kernel_size=module.kernel_size, padding=module.padding, stride=module.stride)
    return [unfold(part).transpose(1, 2).reshape(-1, fan_in) for part in x.split(size)]
