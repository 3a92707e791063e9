"""Whether the calls of a walk are at the timesteps that its denoiser names, and what is wrong where they are not."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pcr_export.errors import PcrExportError

MOST_SHOWN = 8


def check_walked(walked: Sequence[float], timesteps: Sequence[float]) -> None:
    """Raise PcrExportError unless the calls of a walk were at `timesteps`, compared in float32."""
    found, named = _float32(walked), _float32(timesteps)
    if found == named:
        return
    index = next((i for i, (a, b) in enumerate(zip(found, named, strict=False)) if a != b), min(len(found), len(named)))
    if index > 0 and found[: 2 * len(named)] == [t for t in named for _ in range(2)][: len(found)]:
        what = "the walk calls the network twice at each timestep: join both calls in one batch, as guidance does"
    elif index == len(found):
        what = (
            f"the walk ends after {len(found)} calls, the denoiser has {len(named)} timesteps: give those of the walk"
        )
    elif index == len(named):
        what = (
            f"the walk goes on after {len(named)} calls, as many as the denoiser has timesteps: give those of the walk"
        )
    else:
        what = (
            f"call {index} of the walk is at timestep {_shown(found[index : index + 1])}, where the denoiser has "
            f"{_shown(named[index : index + 1])}: give Denoiser(timesteps=...) as the walk has them"
        )
    raise PcrExportError(f"{what} (walk: {_shown(found)}; denoiser: {_shown(named)})")


def _float32(timesteps: Sequence[float]) -> list[float]:
    return [float(np.float32(each)) for each in timesteps]


def _shown(timesteps: Sequence[float]) -> str:
    more = ", ..." if len(timesteps) > MOST_SHOWN else ""
    return ", ".join(f"{each:g}" for each in timesteps[:MOST_SHOWN]) + more
