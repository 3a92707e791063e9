"""Which layers keep 8-bit weights: those whose rounding hurts their block's output most, by number or by mean bits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pcr_export.recipe import parse_keep

KEPT_BITS = 8
ROUNDING = 1e-9  # of a mean: 4.6 in a float is a little less than that


def choose_kept(sensitivities: Mapping[str, Mapping[str, Any]], keep: str, bits: int) -> dict[str, int]:
    """Layers that keep KEPT_BITS -> KEPT_BITS.

    Args:
        sensitivities: layer -> {error, weights}, what rounding it alone to `bits` does to its block's output, and its size.
        keep: "4" for the four with the largest errors, or "4.5bit": as many as a mean of 4.5 bits per weight has room for, the
            largest errors per weight first.
    """
    count, mean_bits = parse_keep(keep)
    if mean_bits is None:
        ranking = sorted(sensitivities, key=lambda layer: (-sensitivities[layer]["error"], layer))
        return dict.fromkeys(ranking[:count], KEPT_BITS)
    total = sum(each["weights"] for each in sensitivities.values())
    room = (mean_bits - bits) * total / (KEPT_BITS - bits) + ROUNDING * total
    kept = {}
    gains = {layer: each["error"] / each["weights"] for layer, each in sensitivities.items()}
    for layer in sorted(gains, key=lambda layer: (-gains[layer], layer)):
        if sensitivities[layer]["weights"] <= room:
            room -= sensitivities[layer]["weights"]
            kept[layer] = KEPT_BITS
    return kept
