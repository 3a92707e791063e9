"""A network with the weights of its files: a tensor that they lack is named, one that it has no place for is said."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from torch import nn

from pcr_export.errors import PcrExportError, PcrExportWarning

OLDER_BUFFERS = ("position_ids",)  # that older releases saved: they hold no weights


def read_weights(network_class: Any, source: str | Path, name: object = None, **options: Any) -> nn.Module:
    """`network_class.from_pretrained(source, **options)` of diffusers or transformers, from safetensors.

    Both libraries give a network whose files lack a tensor without a word: transformers with random values in its place.

    Args:
        name: what the source is called in messages; None: as it is.

    Raises:
        PcrExportError: tensors are missing: how many, and the first one.
    """
    network: nn.Module
    name = source if name is None else name
    network, found = network_class.from_pretrained(source, use_safetensors=True, output_loading_info=True, **options)
    missing = sorted(found["missing_keys"])
    unused = sorted(name for name in found["unexpected_keys"] if not name.endswith(OLDER_BUFFERS))
    if missing:
        raise PcrExportError(
            f"{name}: its weights lack tensors of a {network_class.__name__} ({len(missing)}, such as {missing[0]}): fetch it again"
        )
    if unused:
        warnings.warn(
            f"{name}: a {network_class.__name__} has no place for tensors of it ({len(unused)}, such as {unused[0]}): they are left out",
            PcrExportWarning,
            stacklevel=2,
        )
    return network
