"""Latency: how long one call of an engine takes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

WARM_UP = 2  # calls before the clock starts


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Milliseconds of one call."""

    p50: float
    p95: float


def measure_latency(call: Callable[[], object], runs: int) -> Latency:
    """Wall time of `runs` calls, each of which returns when its work is done, after WARM_UP others."""
    for _ in range(WARM_UP):
        call()
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        call()
        times.append(1000 * (time.perf_counter() - start))
    p50, p95 = np.percentile(times, [50, 95])
    return Latency(p50=float(p50), p95=float(p95))
