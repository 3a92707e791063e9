"""Where a layer's integer weights come from: rounded to nearest on the spot, or learned before and read from files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from pcr_export.calibrate.weights.nearest import quantize_weight
from pcr_export.errors import PcrExportError
from pcr_export.read_files import check_regular
from pcr_export.write_files import write_bytes

# (layer, its float weight [out_channels, ...]) -> (int8 of the weight's shape, scale float32 [out_channels])
RoundWeight = Callable[[str, np.ndarray], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class NearestRounding:
    """Round to nearest with the clip of least squared error: `quantize_weight`."""

    bits: int
    kept: Mapping[str, int] = field(default_factory=dict)  # layers with other bits

    def __call__(self, layer: str, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As RoundWeight. Raises PcrExportError where the weight holds NaN or infinite values."""
        try:
            return quantize_weight(weight, self.kept.get(layer, self.bits))
        except ValueError as error:
            raise PcrExportError(f"layer {layer}: {error}: the model's weights are damaged") from error


NEAREST_8 = NearestRounding(8)


class LearnedRounding:
    """What `write_rounded` left in a folder, one file a block; a weight is read when it is asked for."""

    def __init__(self, folder: Path) -> None:
        self._file_of: dict[str, Path] = {}
        for path in sorted(folder.glob("block_*.safetensors")):
            with _reading(path) as file:
                self._file_of |= {name.removesuffix(".q"): path for name in file.keys() if name.endswith(".q")}  # noqa: SIM118 (safe_open is no mapping)

    def __call__(self, layer: str, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As RoundWeight. Raises PcrExportError where nothing was learned for the layer, or for one of another shape."""
        path = self._file_of.get(layer)
        if path is None:
            raise PcrExportError(f"layer {layer} has no learned weight: learn them again with --no-resume")
        with _reading(path) as file:
            there = set(file.keys())
            q, scale = (file.get_tensor(name) if name in there else None for name in (f"{layer}.q", f"{layer}.scale"))
        if (
            q is None
            or scale is None
            or (q.dtype, q.shape) != (np.int8, weight.shape)
            or not _is_scale(scale, len(weight))
        ):
            raise PcrExportError(
                f"{path} holds no int8 weight of shape {list(weight.shape)} with positive scales for {layer}: "
                "learn them again with --no-resume"
            )
        return q, scale


def _is_scale(scale: np.ndarray, count: int) -> bool:
    """Whether it is float32 [count], finite and positive."""
    return (scale.dtype, scale.shape) == (np.float32, (count,)) and bool((np.isfinite(scale) & (scale > 0)).all())


def write_rounded(rounded: Mapping[str, tuple[np.ndarray, np.ndarray]], path: Path) -> None:
    """Write layers' int8 weights and float32 scales as safetensors, through a temporary name."""
    tensors: dict[str, np.ndarray] = {}
    for layer, (q, scale) in rounded.items():
        tensors |= {f"{layer}.q": np.ascontiguousarray(q), f"{layer}.scale": np.ascontiguousarray(scale)}
    write_bytes(path, save(tensors))


def _reading(path: Path) -> safe_open:
    check_regular(path, advice="delete that file and run again")
    try:
        return safe_open(path, "numpy")
    except (SafetensorError, OSError) as error:
        raise PcrExportError(
            f"the learned weights {path} are damaged ({error}): delete that file and run again"
        ) from error
