"""INT8 beside FP16 on one GPU: which is faster, said aloud."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from pcr_export.engines.latency import Latency
from pcr_export.engines.tensorrt_runner import TensorRtEngine

Feed = Mapping[str, np.ndarray]


def time_engines(
    int8: Path, fp16: Path | None, feeds: Sequence[Feed], runs: int, *, relaxed_share: float = 0.0
) -> dict[str, Any]:
    """Time the engines on this machine's GPU.

    Args:
        int8: the quantized engine.
        fp16: that of the network without quantization, of the same inputs; None where there is none.
        feeds: inputs of an 8-bit step and, where there is one, of a relaxed step.
        runs: calls per figure.
        relaxed_share: of the calibrated steps that are relaxed, 0..1.

    Returns:
        As `timing_facts`.

    Raises:
        PcrExportError: as `TensorRtEngine`.
    """
    with TensorRtEngine(int8) as engine:
        latencies = [engine.latency(feed, runs) for feed in feeds]
    other = None
    if fp16 is not None:
        with TensorRtEngine(fp16) as engine:
            other = engine.latency(feeds[0], runs)
    relaxed = latencies[1] if len(latencies) > 1 else None
    return timing_facts(latencies[0], relaxed, other, relaxed_share=relaxed_share)


def timing_facts(
    int8: Latency, relaxed: Latency | None, fp16: Latency | None, *, relaxed_share: float = 0.0
) -> dict[str, Any]:
    """What the figures say: plain JSON, milliseconds of one call.

    `mean_ms` is the quantized engine's mean over the calibrated steps, of which `relaxed_share` are relaxed; `speedup` is how
    many times as fast as FP16 that is. `warning` is there where it is slower.
    """
    mean = int8.p50 if relaxed is None else (1 - relaxed_share) * int8.p50 + relaxed_share * relaxed.p50
    facts: dict[str, Any] = {"int8_ms": asdict(int8), "mean_ms": mean}
    if relaxed is not None:
        facts["relaxed_ms"] = asdict(relaxed)
    if fp16 is not None:
        facts |= {"fp16_ms": asdict(fp16), "speedup": fp16.p50 / mean}
        if mean > fp16.p50:
            facts["warning"] = (
                f"INT8 is slower than FP16 on this GPU ({mean:.2f} ms against {fp16.p50:.2f} ms): deploy FP16, "
                "or compare at the batch and the size that you will run"
            )
    return facts
