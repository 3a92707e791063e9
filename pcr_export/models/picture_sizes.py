"""Which picture sizes a UNet and its VAE can do. Plain arithmetic on their configurations, no heavy imports."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from pcr_export.errors import PcrExportError
from pcr_export.recipe import MOST_PIXELS

DIFFUSERS_UNIT = 8  # pixels: what every pipeline of diffusers asks for


def size_factor(unet_config: Mapping[str, Any], vae_scale_factor: int) -> int:
    """Pixels of which height and width have to be multiples.

    Args:
        unet_config: unet/config.json, or the UNet's `config`.
        vae_scale_factor: pixels per latent, of the pipeline.
    """
    return math.lcm(DIFFUSERS_UNIT, vae_scale_factor * latent_factor(unet_config))


def latent_factor(unet_config: Mapping[str, Any]) -> int:
    """Latents of which height and width have to be multiples: a UNet of n blocks halves them n - 1 times, and doubles as often."""
    return 2 ** (len(unet_config.get("block_out_channels") or (1,)) - 1)


def check_picture_size(height: int, width: int, unit: int) -> None:
    """Raise PcrExportError where `height` or `width` (pixels) is no multiple of `unit` (pixels, of `size_factor`)."""
    if height < unit or width < unit or height % unit or width % unit:
        raise PcrExportError(
            f"a {height}x{width} picture can't be made: give a height and a width that are multiples of {unit}"
        )
    if max(height, width) > MOST_PIXELS:
        raise PcrExportError(f"a {height}x{width} picture can't be made: give at most {MOST_PIXELS} pixels a side")
