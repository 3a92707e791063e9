"""A text's first token apart: in SDXL's text encoders it is tens of times larger than all others, and one scale serves them badly.

MixDQ (arXiv 2405.17873, section 4.1) keeps that token of cross-attention's to_k and to_v in float. Here its direction u leaves the input of
these layers, for every token by what lies in it, so that nothing depends on where the token stands or whether a prompt has it:

    linear(x) = rest(x - p u) + p (W u),    p = x . u,    |u| = 1
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

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

    def forward(self, x: Tensor) -> Tensor:
        """float32 [batch, tokens, width]."""
        rest, p = self.direction.split(x)
        output: Tensor = self.rest(rest) + p * self.image
        return output


@torch.inference_mode()
def find_first_tokens(denoiser: Denoiser, inputs: Inputs, layers: list[Layer]) -> dict[str, Tensor]:
    """The inputs that Linears read and whose first token stands out: site -> its direction, float32 [width].

    Args:
        inputs: of one call with a prompt. A text is one of them, [batch, tokens, width].
    """
    directions: dict[str, Tensor] = {}
    texts = {id(x) for x in inputs.values() if x.ndim == 3 and x.shape[1] > 1}

    def visit(site: str, x: Tensor) -> None:
        if id(x) in texts and x[:, 0].abs().max() > STANDS_OUT * x[:, 1:].abs().max():
            total = x[:, 0].sum(dim=0)  # one token of all prompts; zeros where a prompt has none
            directions[site] = total / total.norm()

    handles = [
        denoiser.network.get_submodule(layer.name).register_forward_pre_hook(
            lambda _module, args, site=layer.site: visit(site, args[0])
        )
        for layer in layers
        if layer.site is not None and layer.op == "Linear"
    ]
    try:
        denoiser(inputs)
    finally:
        for handle in handles:
            handle.remove()
    return directions


def split_first_tokens(denoiser: Denoiser, inputs: Inputs, layers: list[Layer]) -> int:
    """Replace every Linear that reads such a site by an ApartLinear; returns how many. The network of `denoiser` is changed.

    Raises PcrExportError where no first token stands out.
    """
    directions = {site: Direction(u) for site, u in find_first_tokens(denoiser, inputs, layers).items()}
    if not directions:
        raise PcrExportError(
            "--first-token apart: no layer reads tokens of which the first stands out: leave it at auto"
        )
    apart = [layer for layer in layers if layer.site in directions]
    for layer in apart:
        linear = denoiser.network.get_submodule(layer.name)
        assert isinstance(linear, nn.Linear)
        denoiser.network.set_submodule(layer.name, ApartLinear(linear, directions[str(layer.site)]))
    return len(apart)
