"""How a calibration set is cut into calls of the network: by the picture's size alone, so that the scales depend on no batch size.

A float product of 8 rows rounds otherwise than one of 2, and a quantized trajectory makes a difference of a rounding larger at every step.
So the same prompts always share a call. Only ModelOpt's min-mean has calls of another size: it averages over them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pcr_export.recipe import Recipe

PIXELS_PER_CALL = 2**16  # prompts of a call, times height and width: one prompt from 256 x 256 pixels on
MOST_PER_CALL = 16  # prompts

Batch = tuple[Sequence[Any], Sequence[int]]  # conditions and their seeds


def prompts_per_call(recipe: Recipe) -> int:
    """How many prompts share a call of the network while `recipe` is calibrated."""
    if recipe.reduce == "min-mean":
        return recipe.calib_batch
    return max(1, min(MOST_PER_CALL, PIXELS_PER_CALL // (recipe.height * recipe.width)))


def canonical_batches(conditions: Sequence[Any], seeds: Sequence[int], recipe: Recipe) -> list[Batch]:
    """The calibration set in its order, cut into batches of `prompts_per_call`; the last one holds the rest."""
    size = prompts_per_call(recipe)
    return [(conditions[i : i + size], seeds[i : i + size]) for i in range(0, len(conditions), size)]
