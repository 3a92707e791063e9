"""The network that a recipe quantizes: the float network, or the same function in a form that is easier to quantize."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from pcr_export.calibrate.canonical_batches import prompts_per_call
from pcr_export.calibrate.first_token import split_first_tokens
from pcr_export.calibrate.layers import find_layers
from pcr_export.calibrate.smooth_quant import channel_peaks, smooth_linears
from pcr_export.calibrate.split_shortcut import split_shortcuts
from pcr_export.models.denoiser import Denoiser, Inputs
from pcr_export.progress import Track, silent
from pcr_export.recipe import Recipe


def rewrites_network(recipe: Recipe) -> bool:
    """Whether `rewrite_network` makes another network of it."""
    return recipe.first_token == "apart" or recipe.split_shortcut or recipe.smooth_quant is not None


def rewrite_network(
    denoiser: Denoiser,
    example: Inputs,
    conditions: Sequence[Any],
    seeds: Sequence[int],
    recipe: Recipe,
    *,
    track: Track = silent,
) -> Denoiser:
    """The denoiser with first tokens apart, shortcuts split and Linears smoothed as the recipe tells; else `denoiser` itself.

    Exact but for rounding. The network is a copy that shares the weights that stay as they are; its new modules have paths of their
    own, such as `up_blocks.0.resnets.0.conv_shortcut.deep` or `mid_block...to_q.linear`.

    Args:
        example: inputs of one call.
        conditions, seeds: the calibration set, whose float trajectories tell how far to smooth.
    """
    if not rewrites_network(recipe):
        return denoiser
    network = denoiser.network
    shared = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
    rewritten = replace(denoiser, network=copy.deepcopy(network, shared))
    if recipe.first_token == "apart":
        split_first_tokens(rewritten, example, recipe.skip)
    if recipe.split_shortcut:
        split_shortcuts(rewritten, example, find_layers(rewritten, example, recipe.skip))
    if recipe.smooth_quant is not None:
        layers = find_layers(rewritten, example, recipe.skip)
        peaks = channel_peaks(rewritten, layers, conditions, seeds, prompts_per_call(recipe), track)
        smooth_linears(rewritten, layers, peaks, recipe.smooth_quant)
    return rewritten
