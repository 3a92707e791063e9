"""StepScales: one activation scale per denoising step and site; its one file format, one writer and one reader."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from pcr_export.errors import PcrExportError
from pcr_export.read_files import check_regular, check_schema, parse_json
from pcr_export.write_files import write_bytes

FORMAT = 1
ZERO_POINT_SYMMETRIC = 128
MOST_STEPS = 10**4  # a page draws each
MOST_TABLE_BYTES = 2**26  # 1000 steps of 10 000 sites
_TENSORS = ("scale", "zero_point", "bits", "timesteps")


class Header(TypedDict):
    """What the file's header tells beside its tensors."""

    format: int
    sites: list[str]
    layers: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class StepScales:
    """The activation quantizers of a denoiser.

    At step t and site i an activation x is stored as the 8-bit integer

        q = clip(round(x / scale[t, i]) + zero_point[t, i], 0, 255)        round half to even

    and stands for (q - zero_point) * scale. A relaxed step (bits[t] > 8) adds a second digit on the grid
    scale / 2 ** (bits - 8):  lo = clip(round((x / scale - (q - zero_point)) * 2 ** (bits - 8)), -128, 127).
    """

    scale: np.ndarray  # float32 [num_steps, num_sites], unit: activation per integer step; step 0 = noisiest
    zero_point: np.ndarray  # uint8 [num_steps, num_sites]; 128 where the site is symmetric
    bits: np.ndarray  # uint8 [num_steps]; 8, or 9..16 on relaxed steps
    timesteps: np.ndarray  # float32 [num_steps], strictly descending
    sites: tuple[str, ...]  # module path of the first layer that reads the tensor
    layers: Mapping[str, str]  # module path of every quantized layer -> its site

    def __post_init__(self) -> None:
        shape = (len(self.timesteps), len(self.sites))
        for name, array, dtype, expected in (
            ("scale", self.scale, np.float32, shape),
            ("zero_point", self.zero_point, np.uint8, shape),
            ("bits", self.bits, np.uint8, shape[:1]),
            ("timesteps", self.timesteps, np.float32, shape[:1]),
        ):
            if array.dtype != dtype or array.shape != expected:
                raise ValueError(f"{name} must be {np.dtype(dtype)} {expected}, got {array.dtype} {array.shape}")
        if not 1 <= shape[0] <= MOST_STEPS:
            raise ValueError(f"a table has 1 to {MOST_STEPS} steps, got {shape[0]}")
        if not np.isfinite(self.timesteps).all():
            raise ValueError("every timestep must be finite")
        if not (np.isfinite(self.scale).all() and (self.scale > 0).all()):
            raise ValueError("every scale must be finite and positive")
        if not (np.diff(self.timesteps) < 0).all():
            raise ValueError("timesteps must be strictly descending (step 0 = noisiest)")
        if not ((self.bits >= 8) & (self.bits <= 16)).all():
            raise ValueError("bits must lie in 8..16")
        unknown = set(self.layers.values()) - set(self.sites)
        if unknown:
            raise ValueError(f"layers name sites that do not exist: {sorted(unknown)}")

    @property
    def num_steps(self) -> int:
        """Number of calibrated steps."""
        return len(self.timesteps)

    def deviation(self) -> np.ndarray:
        """log2(scale / geometric mean of the site over the steps), float64 [num_steps, num_sites]: what is drawn of the scales."""
        logarithms = np.log2(self.scale.astype(np.float64))
        return np.asarray(logarithms - logarithms.mean(0))

    def nearest_step(self, timestep: float) -> int:
        """The step whose calibrated timestep is nearest: the number of midpoints above `timestep`, as the graph counts it."""
        midpoints = (self.timesteps[:-1] + self.timesteps[1:]) / 2
        return int((np.float32(timestep) < midpoints).sum())


def write_step_scales(scales: StepScales, path: Path) -> None:
    """Write `scales` as safetensors, through a temporary name. Same scales, same bytes."""
    tensors = {name: np.ascontiguousarray(getattr(scales, name)) for name in _TENSORS}
    header = {"format": FORMAT, "sites": scales.sites, "layers": dict(scales.layers)}
    metadata = {"step_scales": json.dumps(header, sort_keys=True)}  # one key: safetensors orders several at random
    write_bytes(path, save(tensors, metadata))


def read_step_scales(path: Path) -> StepScales:
    """Read what `write_step_scales` wrote. Raises PcrExportError where the file is missing, damaged or of another format."""
    check_regular(path, most=MOST_TABLE_BYTES, advice="export again")
    try:
        with safe_open(path, "numpy") as file:
            header = parse_json((file.metadata() or {})["step_scales"])
            if header["format"] != FORMAT:
                raise PcrExportError(
                    f"{path} has scale format {header['format']}, this version reads {FORMAT}: export again"
                )
            check_schema(header, Header, path, advice="export again")
            return StepScales(
                **{name: file.get_tensor(name) for name in _TENSORS},
                sites=tuple(header["sites"]),
                layers=header["layers"],
            )
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise PcrExportError(f"{path} is no readable table of step scales ({error}): export again") from error
