"""A text's first token apart: in SDXL's text encoders it is tens of times larger than all others, and one scale serves them badly.

MixDQ (arXiv 2405.17873, section 4.1) keeps that token of cross-attention's to_k and to_v in float. Here its direction u leaves the input of
these layers, for every token by what lies in it, so that nothing depends on where the token stands or whether a prompt has it:

    linear(x) = rest(x - p u) + p (W u),    p = x . u,    |u| = 1
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pcr_export.calibrate.layer_inputs import on_input
from pcr_export.calibrate.layers import find_layers
from pcr_export.errors import PcrExportError
from pcr_export.models.denoiser import Denoiser, Inputs
from pcr_export.sites import Layer

STANDS_OUT = 2.0  # times the largest of the other tokens: beyond, one scale for all costs the others more than a bit


class Direction:
    """Takes a direction out of a tensor, once for all layers that read it: they share a site then, as they did before."""

    def __init__(self, u: Tensor) -> None:
        """`u`: float32 [width], of length 1."""
        self.u = u
        self._x: weakref.ref[Tensor] | None = None
        self._parts: tuple[Tensor, Tensor] | None = None

    def __deepcopy__(self, memo: Any) -> Direction:
        return self  # it holds no state but what `split` would compute again

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x - p u and p, for x float32 [batch, tokens, width]; p is [batch, tokens, 1]."""
        if self._parts is None or self._x is None or self._x() is not x:
            p = x @ self.u[:, None]
            self._x, self._parts = weakref.ref(x), (x - p * self.u, p)
        return self._parts


class ApartLinear(nn.Module):
    """A Linear whose input has one direction taken out:  rest(x - p u) + p (W u)."""

    def __init__(self, linear: nn.Linear, direction: Direction) -> None:
        super().__init__()
        self.rest = linear
        self.direction = direction
        self.image: Tensor
        self.register_buffer("image", linear.weight.detach() @ direction.u)

    def forward(self, input: Tensor) -> Tensor:
        """float32 [batch, tokens, width]; named as Linear's, so that it is called as that was."""
        rest, p = self.direction.split(input)
        output: Tensor = self.rest(rest) + p * self.image
        return output


def _stands_out(x: Tensor) -> bool:
    return x.ndim == 3 and x.shape[1] > 1 and bool(x[:, 0].abs().max() > STANDS_OUT * x[:, 1:].abs().max())


@torch.inference_mode()
def find_first_tokens(denoiser: Denoiser, inputs: Inputs, skip: Sequence[str]) -> dict[str, tuple[str, Tensor]]:
    """The quantized Linears that read an input of the network whose first token stands out: layer -> (site, direction float32 [width]).

    Args:
        inputs: of one call with a prompt. A text is one of them, [batch, tokens, width].
        skip: patterns of layers that stay float, as `find_layers` takes them.
    """
    texts = {id(x) for x in inputs.values() if _stands_out(x)}
    if not texts:
        return {}  # the network is not called for that
    found: dict[str, tuple[str, Tensor]] = {}

    def visit(layer: Layer, x: Tensor) -> None:
        if id(x) in texts:
            total = x[:, 0].sum(dim=0)  # one token of all prompts; zeros where a prompt has none
            found[layer.name] = (str(layer.site), total / total.norm())

    handles = [
        on_input(denoiser.network.get_submodule(layer.name), functools.partial(visit, layer))
        for layer in find_layers(denoiser, inputs, skip)
        if layer.site is not None and layer.op == "Linear"
    ]
    try:
        denoiser(inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found


def split_first_tokens(denoiser: Denoiser, inputs: Inputs, skip: Sequence[str]) -> int:
    """Replace every such Linear by an ApartLinear; returns how many. The network of `denoiser` is changed.

    Raises PcrExportError where no first token stands out.
    """
    found = find_first_tokens(denoiser, inputs, skip)
    if not found:
        raise PcrExportError(
            "--first-token apart: no layer reads tokens of which the first stands out: leave it at auto"
        )
    directions = {site: Direction(u) for site, u in found.values()}
    for name, (site, _) in found.items():
        linear = denoiser.network.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        denoiser.network.set_submodule(name, ApartLinear(linear, directions[site]))
    return len(found)
