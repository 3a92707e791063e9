"""sha256 of a value's content: of a condition of a walk, or of a setting that JSON does not know."""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Mapping, Sequence, Set
from dataclasses import fields, is_dataclass
from pathlib import PurePath
from typing import Any

import numpy as np
import torch

from pcr_export.errors import PcrExportError


def hash_content(value: Any) -> str:
    """sha256 of a value: equal for equal types and bytes, whatever they would print as.

    Read are None, bool, int, float, complex, str, bytes, paths, tensors and numpy arrays (dtype, shape and every byte), sequences in
    their order, mappings and sets in none, and dataclasses by their fields. Raises PcrExportError for anything else.
    """
    return _digest(value).hex()


def seed_text(condition: Any) -> str:
    """What a condition's noise is drawn from: a prompt or a number as it is written, the hash of anything else."""
    plain = condition is None or type(condition) in (str, bool, int, float)
    return str(condition) if plain else hash_content(condition)


def _digest(value: Any) -> bytes:
    """sha256 over the type's name and the content's parts, each with its length in front."""
    digest = hashlib.sha256()
    kind = type(value)
    for part in (f"{kind.__module__}.{kind.__qualname__}".encode(), *_parts(value)):
        digest.update(struct.pack("<Q", len(part)))
        digest.update(part)
    return digest.digest()


def _parts(value: Any) -> Sequence[bytes]:
    if isinstance(value, torch.Tensor):
        return _tensor_parts(value)
    if isinstance(value, np.ndarray | np.generic):
        return _array_parts(np.asarray(value))
    if isinstance(value, float):
        return [b"nan" if math.isnan(value) else value.hex().encode()]
    if value is None or isinstance(value, bool | int | complex | PurePath):
        return [str(value).encode()]
    if isinstance(value, str):
        return [value.encode("utf-8", "surrogatepass")]
    if isinstance(value, bytes | bytearray):
        return [bytes(value)]
    if is_dataclass(value) and not isinstance(value, type):
        return [_digest((each.name, getattr(value, each.name))) for each in fields(value)]
    if isinstance(value, Mapping):
        return sorted(_digest(item) for item in value.items())
    if isinstance(value, Set):
        return sorted(map(_digest, value))
    if isinstance(value, Sequence):
        return [_digest(each) for each in value]
    raise PcrExportError(
        f"a {type(value).__qualname__} has no content that can be hashed: give conditions of text, numbers, tensors, arrays, "
        "or tuples, dicts and dataclasses of these"
    )


def _tensor_parts(tensor: torch.Tensor) -> Sequence[bytes]:
    plain = tensor.detach().cpu().contiguous()
    flat = plain.resolve_conj().resolve_neg().reshape(-1).view(torch.uint8)
    return [str(plain.dtype).encode(), str(tuple(plain.shape)).encode(), flat.numpy().tobytes()]


def _array_parts(array: np.ndarray) -> Sequence[bytes]:
    if array.dtype.hasobject:
        return [str(array.shape).encode(), *(_digest(each) for each in array.reshape(-1).tolist())]
    return [array.dtype.str.encode(), str(array.shape).encode(), array.tobytes()]
