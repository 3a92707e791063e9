"""What a layer is about to read: one hook for every way to call it, by position or by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

Visit = Callable[[Tensor], Tensor | None]  # sees what a layer reads; a tensor that it returns is read instead


def on_input(module: nn.Module, visit: Visit) -> RemovableHandle:
    """Call `visit` with the first argument of every call of a Linear or a convolution, however that is called."""
    name = next(iter(inspect.signature(module.forward).parameters))

    def before(
        _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        given = name if name in kwargs else next(iter(kwargs), name)
        x = visit(args[0] if args else kwargs[given])
        if x is None:
            return None
        return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, given: x})

    return module.register_forward_pre_hook(before, with_kwargs=True)
