"""One call of a network, watched: the layers in their order, what each reads, and how data flows from the noisy input to the output."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pcr_export.calibrate.layer_inputs import on_input
from pcr_export.errors import PcrExportError
from pcr_export.models.denoiser import Denoiser, Inputs, noisy_input

Place = tuple[int, int]
PRODUCTS = (
    "linear",
    "mm",
    "mv",
    "matmul",
    "einsum",
    "conv",
    "attention",
    "lstm",
    "gru",
    "rnn",
)  # parts of aten's names


def quantizable(network: nn.Module) -> dict[str, nn.Linear | nn.Conv2d]:
    """Module path -> module, of every Linear and Conv2d."""
    return {name: m for name, m in network.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}


@dataclass(frozen=True, kw_only=True)
class Trace:
    """What one call of a network did. Layers are named by module path."""

    output: Tensor
    calls: Sequence[str]  # layers in the order of their calls, one for each call
    tensor_of: Mapping[str, int]  # layer -> the number of the tensor that it read
    first: frozenset[str]  # layers that read the noisy input with no other layer before them
    last: frozenset[str]  # layers whose output reaches the network's with no other layer behind them
    unread: frozenset[str]  # called layers of which nothing reaches the network's output
    shared: frozenset[str]  # layers whose weight is also read outside of their own calls
    own_way: frozenset[str]  # layers that compute something else than their class does


@dataclass(frozen=True)
class _Flow:
    """Where a tensor comes from. Layers are bits."""

    raw: bool = False  # it holds the noisy input, with no layer between
    behind: int = 0  # every layer that it depends on
    ends: int = 0  # of those the ones with no layer between

    def __or__(self, other: _Flow) -> _Flow:
        return _Flow(self.raw or other.raw, self.behind | other.behind, self.ends | other.ends)


NOWHERE = _Flow()


@torch.inference_mode()
def trace_network(denoiser: Denoiser, inputs: Inputs) -> Trace:
    """Call the network once and watch. Raises PcrExportError where the call returns no tensor."""
    watch = _Watch(denoiser.network)
    watch.start_from(inputs[noisy_input(denoiser, inputs)])
    with ExitStack() as hooks:
        for name, module in quantizable(denoiser.network).items():
            hooks.enter_context(on_input(module, watch.entering(name)))
            hooks.enter_context(module.register_forward_hook(watch.leaving(name)))
        with watch:
            output = denoiser(inputs)
    if not isinstance(output, Tensor):
        raise PcrExportError(
            f"the denoiser's call returns {type(output).__name__}: return the network's output, a tensor"
        )
    return watch.trace(output)


@dataclass
class _Layers:
    """The layers met so far, a bit each: Linears and convolutions by module path, other products by their weight's."""

    bits: dict[str, int] = field(default_factory=dict)
    reads: dict[str, _Flow] = field(default_factory=dict)
    on_path: int = 0  # the layers that the noisy input reaches

    def read(self, name: str, flow: _Flow) -> _Flow:
        """A layer reads something that comes from `flow`; returns where its output comes from."""
        bit = self.bits.setdefault(name, 1 << len(self.bits))
        self.reads[name] = self.reads.get(name, NOWHERE) | flow
        if flow.raw or flow.behind & self.on_path:
            self.on_path |= bit
        return _Flow(behind=flow.behind | bit, ends=bit)

    def first(self) -> list[str]:
        """Those that read the noisy input with no other layer between."""
        return [name for name, flow in self.reads.items() if flow.raw and not flow.behind & self.on_path]

    def last(self, output: _Flow) -> list[str]:
        """Those that end at the output, but for those that another of them reads (a chain of residuals)."""
        ends = [name for name, bit in self.bits.items() if bit & output.ends & self.on_path]
        read = 0
        for name in ends:
            read |= self.reads[name].behind
        return [name for name in ends if not self.bits[name] & read]


class _Watch(TorchDispatchMode):
    """While active, follows every operator; its hooks tell when a layer begins and ends."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self._modules = quantizable(network)
        self._layers = _Layers()
        self._flows: dict[int, _Flow] = {}  # by storage: views and what is changed in place share it
        self._changes: dict[int, int] = {}  # by storage: how often it was changed in place
        self._owners = _weights_of_layers(self._modules)
        self._matrices = {_place(p): name for name, p in network.named_parameters() if is_matrix(p)}
        self._inside: list[str] = []
        self._calls: list[str] = []
        self._tensor_of: dict[str, int] = {}
        self._seen: dict[int, tuple[weakref.ref[Tensor], int, int]] = {}  # id -> the tensor, its changes, its number
        self._shared: set[str] = set()
        self._own_way: set[str] = set()
        self._reading: dict[str, Tensor] = {}

    def start_from(self, x: Tensor) -> None:
        self._flows[_storage(x)] = _Flow(raw=True)

    def entering(self, name: str) -> Callable[[Tensor], None]:
        def enter(x: Tensor) -> None:
            self._calls.append(name)
            self._tensor_of[name] = self._number(x)
            self._layers.read(name, self._flow([x]))
            self._inside.append(name)
            self._reading[name] = x

        return enter

    def leaving(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def leave(module: nn.Module, _args: Any, output: Any) -> None:
            x = self._reading.pop(name)
            if not _computes_as_its_class(module, x, output):
                self._own_way.add(name)
            self._inside.pop()
            self._mark(tree_leaves(output), self._layers.read(name, self._flow([x])))

        return leave

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        flow = self._flow(tensors)
        if not self._inside:
            flow = self._product(func, tensors, flow)
        for x in tensors:
            self._shared |= {name for name in self._owners.get(_place(x), ()) if not self._is_inside(_place(x))}
        made = tree_leaves(output)
        if func._schema.is_mutable:
            for x in made:
                if isinstance(x, Tensor):
                    self._changes[_storage(x)] = self._changes.get(_storage(x), 0) + 1
        self._mark(made, flow)
        return output

    def trace(self, output: Tensor) -> Trace:
        flow = self._flow([output])
        called = dict.fromkeys(self._calls)
        return Trace(
            output=output,
            calls=self._calls,
            tensor_of=self._tensor_of,
            first=frozenset(self._layers.first()),
            last=frozenset(self._layers.last(flow)),
            unread=frozenset(name for name in called if not self._layers.bits[name] & flow.behind),
            shared=frozenset(self._shared),
            own_way=frozenset(self._own_way),
        )

    def _product(self, func: Any, tensors: Sequence[Tensor], flow: _Flow) -> _Flow:
        """Where the product with a weight that no Linear or Conv2d computes comes from: it is a layer, too."""
        weights = [name for x in tensors if (name := self._matrices.get(_place(x))) is not None]
        name = func._schema.name.removeprefix("aten::")
        if not weights or not any(part in name for part in PRODUCTS):
            return flow
        return self._layers.read(weights[0], flow)

    def _is_inside(self, place: Place) -> bool:
        return any(name in self._inside for name in self._owners[place])

    def _flow(self, tensors: Iterable[Tensor]) -> _Flow:
        flow = NOWHERE
        for x in tensors:
            flow |= self._flows.get(_storage(x), NOWHERE)
        return flow

    def _mark(self, made: Iterable[Any], flow: _Flow) -> None:
        for x in made:
            if isinstance(x, Tensor):
                self._flows[_storage(x)] = flow

    def _number(self, x: Tensor) -> int:
        """Of the tensor: the same where another layer has read it and nothing has changed it since."""
        changes = self._changes.get(_storage(x), 0)
        reference, seen, number = self._seen.get(id(x), (None, -1, -1))  # ids are reused
        if reference is None or reference() is not x or seen != changes:
            number = len(self._calls)
            self._seen[id(x)] = (weakref.ref(x), changes, number)
        return number


def is_matrix(weight: Tensor) -> bool:
    """Whether a parameter has two axes of more than one number: no bias, no gain of a norm."""
    return sum(size > 1 for size in weight.shape) > 1


def _weights_of_layers(modules: Mapping[str, nn.Module]) -> dict[Place, list[str]]:
    """Where a weight lies -> the layers that have it."""
    owners: dict[Place, list[str]] = {}
    for name, module in modules.items():
        weight = module._parameters.get("weight")
        if weight is not None and weight.numel():
            owners.setdefault(_place(weight), []).append(name)
    return owners


def _computes_as_its_class(module: nn.Module, x: Tensor, output: Any) -> bool:
    """Whether a subclass of Linear or Conv2d that has a forward of its own gives what its class gives."""
    plain = type(module).forward in (nn.Linear.forward, nn.Conv2d.forward) and "forward" not in vars(module)
    weight = module._parameters.get("weight")
    if plain or weight is None or not isinstance(output, Tensor):
        return plain
    bias = module._parameters["bias"]
    if isinstance(module, nn.Conv2d):
        return torch.equal(output, module._conv_forward(x, weight, bias))
    return torch.equal(output, F.linear(x, weight, bias))


def _place(x: Tensor) -> Place:
    """Where a tensor begins: a transposed weight begins where the weight does."""
    return _storage(x), int(x.storage_offset())


def _storage(x: Tensor) -> int:
    """Which storage: tensors without content (of a fake or meta device) have one as well."""
    return int(x.untyped_storage()._cdata)
