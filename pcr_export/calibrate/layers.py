"""Find the layers of a denoiser, the sites that they read, and the reason why a layer stays float."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.utils import parametrize

from pcr_export.calibrate.trace_network import Trace, is_matrix, quantizable, trace_network
from pcr_export.errors import PcrExportError
from pcr_export.models.denoiser import Denoiser, Inputs
from pcr_export.recipe import SKIPPED_BY_DEFAULT, split_skip
from pcr_export.sites import Layer

FIRST, LAST = (
    SKIPPED_BY_DEFAULT  # as patterns they mean, besides that name, the first and the last layers whatever their names are
)
STANDS_FIRST, STANDS_LAST = "first layer of the network", "last layer of the network"
TABLE_SHARE = 0.01  # of a network's weights, beyond which an embedding or another parameter is listed
TABLES = (nn.Embedding, nn.EmbeddingBag)


def find_layers(denoiser: Denoiser, inputs: Inputs, skip: Sequence[str], trace: Trace | None = None) -> list[Layer]:
    """Every Linear and Conv2d of the denoiser in the order of its forward pass, and whatever else holds weights, which stays float.

    Layers that read the same tensor share one site, named after the first of them. `skip` are module path patterns (fnmatch);
    of the default ones, conv_in also means the layers that read the noisy input, conv_out those that make the output.

    Args:
        inputs: of one call of the network, which is made unless `trace`, what `trace_network` saw of such a call, is given.

    Raises PcrExportError where nothing is left to quantize.
    """
    modules = quantizable(denoiser.network)
    trace = trace or trace_network(denoiser, inputs)
    calls = Counter(trace.calls)
    order = [*calls, *(name for name in modules if name not in calls)]
    reasons = {name: _reason_for_float(name, modules[name], calls[name], skip, trace) for name in order}
    layers = [_layer(name, modules[name], trace.tensor_of.get(name), reasons[name]) for name in order]
    if not any(layer.site for layer in layers):
        told = ", ".join(f"{name}: {reason}" for name, reason in list(reasons.items())[:3])
        raise PcrExportError(
            f"the model has no Linear or Conv2d left to quantize ({told or 'it has none'}): check --skip"
        )
    return [*_name_sites(layers), *_other_weights(denoiser.network)]


def check_skip(network: nn.Module, skip: Sequence[str]) -> None:
    """Raise PcrExportError for a pattern, other than the default ones, that is the name of no Linear or Conv2d."""
    names = list(quantizable(network))
    paths = [name for name, _ in network.named_modules() if name]
    for pattern in split_skip(skip)[0]:
        if pattern in SKIPPED_BY_DEFAULT or any(fnmatchcase(name, pattern) for name in names):
            continue
        if any(name.startswith(f"{pattern}.") for name in names):
            raise PcrExportError(f"--skip {pattern} is the path of a block: write {pattern}.* for all layers in it")
        close = difflib.get_close_matches(pattern, [*names, *paths], n=3, cutoff=0.5) or names[:3]
        raise PcrExportError(f"--skip {pattern} matches no Linear or Conv2d: near it are {', '.join(close)}")


def skip_warnings(layers: Sequence[Layer], skip: Sequence[str]) -> list[str]:
    """A line for each default pattern that kept no layer float."""
    kept = {layer.reason for layer in layers}
    return [
        f"no layer was found to be the {reason}, nor is one named {pattern}: if 8 bits hurt it, name it with skip"
        for pattern, reason in ((FIRST, STANDS_FIRST), (LAST, STANDS_LAST))
        if pattern in skip and not kept & {_by_name(pattern), reason}
    ]


def _by_name(pattern: str) -> str:
    return f"skipped by name ({pattern})"


def _reason_for_float(name: str, module: nn.Module, num_calls: int, skip: Sequence[str], trace: Trace) -> str | None:
    for pattern in skip:
        if fnmatchcase(name, pattern):
            return _by_name(pattern)
    if "weight" not in module._parameters or parametrize.is_parametrized(module):
        return "its weight is computed in every call (weight norm or the like): fold it into a plain weight first"
    if name in trace.shared:
        return "its weight is also read outside of its own call"
    if num_calls == 0:
        return "not called by the forward pass"
    if num_calls > 1:
        return f"called {num_calls} times per step: one scale cannot serve different inputs"
    if name in trace.unread:
        return "its output does not reach the network's output"
    if name in trace.own_way:
        return f"{type(module).__name__} computes in a way of its own"
    if FIRST in skip and name in trace.first:
        return STANDS_FIRST
    if LAST in skip and name in trace.last:
        return STANDS_LAST
    return _form_without_integers(module) if isinstance(module, nn.Conv2d) else None


def _form_without_integers(module: nn.Conv2d) -> str | None:
    if module.groups != 1:
        return f"grouped convolution ({module.groups} groups)"
    if module.padding_mode != "zeros" or isinstance(module.padding, str):
        return f"padding '{module.padding if isinstance(module.padding, str) else module.padding_mode}'"
    if module.dilation != (1, 1):
        return f"dilated convolution {module.dilation}"
    return None


def _other_weights(network: nn.Module) -> list[Layer]:
    """What holds weights and is neither Linear nor Conv2d. Norms and biases are no matrices; small tables are left out."""
    least = TABLE_SHARE * sum(weight.numel() for weight in network.parameters())
    layers = []
    for path, module in network.named_modules():
        own = {name: w for name, w in module.named_parameters(recurse=False) if is_matrix(w)}
        if isinstance(module, nn.Linear | nn.Conv2d) or not own or _is_part_of_a_weight(path):
            continue
        if type(module).__module__.startswith("torch.nn."):
            if not isinstance(module, TABLES) or sum(w.numel() for w in own.values()) >= least:
                layers.append(_float(path, type(module).__name__))
        else:
            names = [".".join(filter(None, (path, name))) for name, weight in own.items() if weight.numel() >= least]
            layers += [_float(name, "Parameter") for name in names]
    return layers


def _is_part_of_a_weight(path: str) -> bool:
    return "parametrizations" in path.split(".")  # of a Linear or Conv2d, which is listed itself


def _float(name: str, op: str) -> Layer:
    return Layer(name=name, op=op, site=None, reason=f"{op} is not quantized")


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
