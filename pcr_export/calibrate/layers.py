"""Find the layers of a denoiser, the sites that they read, and the reason why a layer stays float."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from pcr_export.errors import PcrExportError
from pcr_export.models.denoiser import Denoiser, Inputs
from pcr_export.sites import Layer


@torch.inference_mode()
def find_layers(denoiser: Denoiser, inputs: Inputs, skip: Sequence[str]) -> list[Layer]:
    """Every Linear and Conv2d of the denoiser in the order of its forward pass, found by one call of the network on `inputs`.

    Layers that read the same tensor share one site, named after the first of them. `skip` are module path patterns (fnmatch).
    Raises PcrExportError where nothing is left to quantize.
    """
    modules = {name: m for name, m in denoiser.network.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    calls, sites = _trace(denoiser, inputs, modules)
    order = [*dict.fromkeys(calls), *(name for name in modules if name not in calls)]
    reasons = {name: _reason_for_float(name, modules[name], Counter(calls)[name], skip) for name in order}
    layers = [_layer(name, modules[name], sites.get(name), reasons[name]) for name in order]
    if not any(layer.site for layer in layers):
        raise PcrExportError("the model has no Linear or Conv2d left to quantize: check --skip")
    return _name_sites(layers)


def _trace(denoiser: Denoiser, inputs: Inputs, modules: Mapping[str, nn.Module]) -> tuple[list[str], dict[str, int]]:
    """The layers called, in order, and for each the number of the tensor that it read."""
    calls: list[str] = []
    tensor_of: dict[str, int] = {}
    seen: dict[int, tuple[weakref.ref[Tensor], int]] = {}  # id of a tensor -> (the tensor, its number); ids are reused

    def visit(name: str, x: Tensor) -> None:
        calls.append(name)
        reference, number = seen.get(id(x), (None, -1))
        if reference is None or reference() is not x:
            number = len(calls)
            seen[id(x)] = (weakref.ref(x), number)
        tensor_of[name] = number

    handles = [
        m.register_forward_pre_hook(lambda _module, args, name=name: visit(name, args[0]))
        for name, m in modules.items()
    ]
    try:
        denoiser(inputs)
    finally:
        for handle in handles:
            handle.remove()
    return calls, tensor_of


def _reason_for_float(name: str, module: nn.Module, num_calls: int, skip: Sequence[str]) -> str | None:
    for pattern in skip:
        if fnmatchcase(name, pattern):
            return f"skipped by name ({pattern})"
    if num_calls == 0:
        return "not called by the forward pass"
    if num_calls > 1:
        return f"called {num_calls} times per step: one scale cannot serve different inputs"
    if isinstance(module, nn.Conv2d):
        if module.groups != 1:
            return f"grouped convolution ({module.groups} groups)"
        if module.padding_mode != "zeros" or isinstance(module.padding, str):
            return f"padding '{module.padding if isinstance(module.padding, str) else module.padding_mode}'"
        if module.dilation != (1, 1):
            return f"dilated convolution {module.dilation}"
    return None


def _layer(name: str, module: nn.Module, tensor: int | None, reason: str | None) -> Layer:
    padded = isinstance(module, nn.Conv2d) and module.padding != (0, 0)
    op = "Conv2d" if isinstance(module, nn.Conv2d) else "Linear"
    return Layer(name=name, op=op, site=None if reason else str(tensor), affine=not padded, reason=reason)


def _name_sites(layers: list[Layer]) -> list[Layer]:
    """Name each site after its first quantized layer; it is affine only where every layer that reads it can be."""
    names: dict[str, str] = {}
    affine: dict[str, bool] = {}
    for layer in layers:
        if layer.site is not None:
            names.setdefault(layer.site, layer.name)
            affine[layer.site] = affine.get(layer.site, True) and layer.affine
    return [x if x.site is None else replace(x, affine=affine[x.site], site=names[x.site]) for x in layers]
