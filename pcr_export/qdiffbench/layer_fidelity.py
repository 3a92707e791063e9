"""What quantizing each layer alone does to its own output at one call: which layers to leave float where quantization fails."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pcr_export.calibrate.ranges import Quantizer, quantize
from pcr_export.calibrate.simulate import quantizers_of_step
from pcr_export.calibrate.weights.rounding import RoundWeight
from pcr_export.models.denoiser import Denoiser, Inputs
from pcr_export.qdiffbench.fidelity import sqnr_db
from pcr_export.sites import Layer
from pcr_export.step_scales import StepScales


@torch.inference_mode()
def layer_fidelity(
    denoiser: Denoiser,
    layers: Sequence[Layer],
    scales: StepScales,
    conditions: Sequence[Any],
    seeds: Sequence[int],
    call: int,
    round_weight: RoundWeight,
) -> dict[str, float]:
    """Layer -> SQNR in dB of its output with its weight and its input quantized, on what it reads in the float network.

    Args:
        call: of the float trajectory, from 0; the calls before it are made, too.
    """
    walk = denoiser.walk(conditions, seeds)
    inputs = next(walk)
    for _ in range(call):
        inputs = walk.send(denoiser(inputs))
    return _measure(denoiser, layers, scales, inputs, round_weight)


def _measure(
    denoiser: Denoiser, layers: Sequence[Layer], scales: StepScales, inputs: Inputs, round_weight: RoundWeight
) -> dict[str, float]:
    step = scales.nearest_step(float(inputs[denoiser.timestep]))
    quantizers, bits = quantizers_of_step(scales, step), int(scales.bits[step])
    found: dict[str, float] = {}

    def compare(
        layer: Layer, module: nn.Module, args: tuple[Tensor, ...], named: Mapping[str, Tensor], y: Tensor
    ) -> None:
        x = args[0] if args else named["input"]
        assert layer.site is not None
        ours = _quantized_output(layer.name, module, x, quantizers[layer.site], bits, round_weight)
        noise = (y - ours).double().square().sum().item()
        found[layer.name] = sqnr_db(y.double().square().sum().item(), noise)

    handles = [
        denoiser.network.get_submodule(layer.name).register_forward_hook(partial(compare, layer), with_kwargs=True)
        for layer in layers
        if layer.site is not None
    ]
    try:
        denoiser(inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _quantized_output(
    name: str, module: nn.Module, x: Tensor, quantizer: Quantizer, bits: int, round_weight: RoundWeight
) -> Tensor:
    """op(q - zero_point, Wq) * (scale * w) + b."""
    weight = module.get_parameter("weight")
    integers, weight_scale = (torch.from_numpy(each) for each in round_weight(name, weight.float().cpu().numpy()))
    q, bias = quantize(x, quantizer.scale, quantizer.zero_point, bits), module._parameters["bias"]
    w, unit = integers.to(x.device, torch.float32), weight_scale.to(x.device) * quantizer.scale
    if isinstance(module, nn.Conv2d):
        y, shape = module._conv_forward(q, w, None), (1, -1, 1, 1)
        return y * unit.reshape(shape) + (0 if bias is None else bias.reshape(shape))
    return F.linear(q, w) * unit + (0 if bias is None else bias)
