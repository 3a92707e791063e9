"""Split shortcuts (Q-Diffusion, arXiv 2302.04304, section 4.2): a scale for each half of a concatenation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pcr_export.calibrate.layer_inputs import on_input
from pcr_export.models.denoiser import Denoiser, Inputs
from pcr_export.sites import Layer

CONCATENATIONS = (torch.cat, torch.concat, torch.concatenate)


class SplitConv(nn.Module):
    """A 1x1 convolution of a concatenation as two:  conv([a, b]) = deep(a) + shortcut(b)."""

    def __init__(self, conv: nn.Conv2d, channels: int) -> None:
        """Split `conv` after its first `channels` input channels. Its weight is copied; it stays as it is."""
        super().__init__()
        self.sizes = (channels, conv.in_channels - channels)
        self.deep, self.shortcut = (nn.Conv2d(size, conv.out_channels, 1, bias=False) for size in self.sizes)
        for half, weight in zip((self.deep, self.shortcut), conv.weight.split(self.sizes, dim=1), strict=True):
            half.weight = nn.Parameter(weight.detach().clone())
        self.deep.bias = conv.bias

    def forward(self, input: Tensor) -> Tensor:
        """float32 [batch, channels, height, width]; named as Conv2d's, so that it is called as that was."""
        deep, shortcut = input.split(self.sizes, dim=1)
        output: Tensor = self.deep(deep) + self.shortcut(shortcut)
        return output


def split_shortcuts(denoiser: Denoiser, inputs: Inputs, layers: Sequence[Layer]) -> int:
    """Replace every quantized 1x1 convolution that reads a concatenation of two by its halves; returns how many.

    In a UNet those are the decoder's conv_shortcut: [deep feature, skip of the encoder]. The network of `denoiser` is changed.
    """
    convs = {
        layer.name: module
        for layer in layers
        if layer.site is not None and isinstance(module := denoiser.network.get_submodule(layer.name), nn.Conv2d)
    }
    boundaries = _concat_boundaries(denoiser, inputs, convs)
    for name, channels in boundaries.items():
        denoiser.network.set_submodule(name, SplitConv(convs[name], channels))
    return len(boundaries)


class _NoteConcats(TorchFunctionMode):
    """While active, keeps the tensors made by torch.cat of two along the channels, with the channels of the first."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[Tensor, int]] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if func in CONCATENATIONS:
            named = {**dict(zip(("tensors", "dim"), args, strict=False)), **(kwargs or {})}
            parts, axis = named["tensors"], named.get("dim", named.get("axis", 0))
            if len(parts) == 2 and axis in (1, -3) and output.ndim == 4:
                self.made.append((output, parts[0].shape[1]))
        return output


@torch.inference_mode()
def _concat_boundaries(denoiser: Denoiser, inputs: Inputs, convs: Mapping[str, nn.Conv2d]) -> dict[str, int]:
    """The plain 1x1 convolutions that read a concatenation of two, with the channels of its first part."""
    boundaries: dict[str, int] = {}
    notes = _NoteConcats()

    def visit(name: str, x: Tensor) -> None:
        for tensor, channels in notes.made:
            if tensor is x:
                boundaries[name] = channels

    handles = [
        on_input(conv, partial(visit, name))
        for name, conv in convs.items()
        if conv.kernel_size == conv.stride == (1, 1) and conv.padding == (0, 0)
    ]
    try:
        with notes:
            denoiser(inputs)
    finally:
        for handle in handles:
            handle.remove()
    return boundaries
