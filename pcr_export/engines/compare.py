"""An exported folder's UNet in all its forms on the same inputs, through Polygraphy: how far each is from the one before."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, TypedDict

import numpy as np
from msgspec import Meta

from pcr_export.engines.engine_folder import engine_targets, find_engine, float_engine, tensorrt_onnx
from pcr_export.engines.engine_record import read_engine_record, write_engine_record
from pcr_export.engines.polygraphy_runs import (
    G_LOGGER,
    Comparator,
    EngineRunner,
    RunResults,
    SeededInputs,
    measure_distance,
    onnx_runner,
)
from pcr_export.engines.tensorrt_runner import NO_GPU, TensorRtEngine
from pcr_export.engines.timing import time_engines
from pcr_export.errors import PcrExportError
from pcr_export.manifest import update_manifest
from pcr_export.progress import Track, silent
from pcr_export.read_files import read_json
from pcr_export.step_scales import StepScales, read_step_scales

ONNXRUNTIME, DIALECT = "onnxruntime's dialect", "TensorRT's dialect"
NOT_RUN = "built, not run: no GPU here"
MOST_ELEMENTS = 2**28  # of a channel of an input
SIZES = {"batch": 2, "height": 64, "width": 64}  # where neither an engine nor the UNet's configuration tells


Side = Annotated[int, Meta(ge=1, le=2**14)]


class OwnSize(TypedDict, total=False):
    """What is read of unet/config.json."""

    sample_size: Side | Annotated[list[Side], Meta(min_length=2, max_length=2)] | None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """`what` against `against` in one step; figures are None, and `note` says why, where there are none.

    sqnr_db = 10 log10(energy of `against` / energy of the difference), infinite where both are equal.
    """

    what: str
    against: str
    timestep: float | None = None
    bits: int | None = None  # of the step's activations
    sqnr_db: float | None = None
    max_abs: float | None = None
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class FolderComparison:
    """Every comparison of a folder and, per target, what `timing_facts` says."""

    rows: list[Comparison]
    timings: dict[str, dict[str, Any]]


def compare_folder(
    folder: Path,
    targets: Sequence[str] = (),
    *,
    runs: int = 20,
    threads: int | None = None,
    seed: int = 0,
    track: Track = silent,
) -> FolderComparison:
    """Run both dialects on onnxruntime and, where there is a GPU, the engines; an engine that runs is recorded as such.

    Args:
        folder: what an export wrote, with TensorRT's dialect.
        targets: of the engines to run, such as "sm89"; none: every one that is there.
        runs: calls per latency.
        threads: of onnxruntime; None for its choice.
        seed: of the inputs: standard normal, integers 0 and 1, at the middle 8-bit step and the middle relaxed step.

    Raises:
        PcrExportError: the folder has no TensorRT dialect or no such engine, or is damaged. An engine that can't run is no error:
            its row says why.
    """
    onnx_path = tensorrt_onnx(folder)
    if not onnx_path.is_file():
        raise PcrExportError(f"{folder} has no unet/tensorrt/model.onnx: export again with --backend tensorrt-rtx")
    engines = {target: find_engine(folder, target) for target in targets or engine_targets(folder)}
    scales = read_step_scales(folder / "step_scales.safetensors")
    steps = steps_to_compare(scales)
    inputs = SeededInputs(_sizes(folder, list(engines.values())), scales.timesteps[steps], seed)
    dialects = {ONNXRUNTIME: folder / "unet" / "model.onnx", DIALECT: onnx_path}
    timings = {}
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL), track("comparing", len(dialects) + len(engines)) as advance:
        results = RunResults()
        for name, path in dialects.items():
            results.extend(Comparator.run([onnx_runner(name, path, threads)], data_loader=inputs))
            advance(1)
        rows = _distances(results, DIALECT, ONNXRUNTIME, scales, steps)
        for target, path in engines.items():
            name, share = f"engine {target}", float((scales.bits > 8).mean())
            try:
                results.extend(_run_engine(name, path, onnx_path, inputs))
                update_manifest(folder, path.with_suffix(".json"))
                rows += _distances(results, name, DIALECT, scales, steps)
                timings[target] = time_engines(path, float_engine(path), list(inputs), runs, relaxed_share=share)
            except PcrExportError as error:
                note = NOT_RUN if str(error) == NO_GPU else str(error)
                rows.append(Comparison(what=name, against=DIALECT, note=note))
            advance(1)
    return FolderComparison(rows=rows, timings=timings)


def steps_to_compare(scales: StepScales) -> list[int]:
    """The middle one of the 8-bit steps and the middle one of the relaxed steps, where there are such."""
    kinds = [np.flatnonzero(scales.bits == 8), np.flatnonzero(scales.bits > 8)]
    return [int(steps[len(steps) // 2]) for steps in kinds if len(steps)]


def table_rows(comparison: FolderComparison) -> list[tuple[str, ...]]:
    """The comparison as the words of a table: what, against what, step, figures or the reason why there are none."""
    table: list[tuple[str, ...]] = []
    for row in comparison.rows:
        step = "" if row.timestep is None else f"timestep {row.timestep:g}, {row.bits} bit"
        figures = row.note if row.sqnr_db is None else f"{row.sqnr_db:.1f} dB, max abs {row.max_abs:.2g}"
        table.append((row.what, row.against, step, figures))
    for target, facts in comparison.timings.items():
        for key, label in (("int8_ms", "8-bit step"), ("relaxed_ms", "relaxed step"), ("fp16_ms", "FP16 engine")):
            if key in facts:
                table.append(
                    (f"engine {target}", "", label, f"{facts[key]['p50']:.2f} ms, p95 {facts[key]['p95']:.2f} ms")
                )
        if "speedup" in facts:
            table.append((f"engine {target}", "FP16 engine", "mean step", f"{facts['speedup']:.2f} times as fast"))
        if "warning" in facts:
            table.append((f"engine {target}", "FP16 engine", "", facts["warning"]))
    return table


def _run_engine(name: str, path: Path, onnx_path: Path, inputs: SeededInputs) -> RunResults:
    """Run the engine and write down that it ran."""
    results = Comparator.run([EngineRunner(name, TensorRtEngine(path, onnx_path), inputs)], data_loader=inputs)
    record = path.with_suffix(".json")
    write_engine_record(record, replace(read_engine_record(record), ran=True))
    return results


def _distances(
    results: RunResults, what: str, against: str, scales: StepScales, steps: Sequence[int]
) -> list[Comparison]:
    names = [name for name, _ in results]
    pair = (names.index(against), names.index(what))
    (accuracy,) = Comparator.compare_accuracy(results, comparisons=[pair], compare_func=measure_distance)
    rows = []
    for step, outputs in zip(steps, accuracy[against, what], strict=True):
        (distance,) = outputs.values()
        rows.append(
            Comparison(
                what=what,
                against=against,
                timestep=float(scales.timesteps[step]),
                bits=int(scales.bits[step]),
                sqnr_db=distance.sqnr_db,
                max_abs=distance.max_abs,
            )
        )
    return rows


def _sizes(folder: Path, engines: Sequence[Path]) -> dict[str, int]:
    """Of the symbolic axes: what the first engine is best at, else the UNet's own size."""
    if engines:
        record = read_engine_record(engines[0].with_suffix(".json"))
        sizes = {name: best for name, (_, best, _) in record.axes.items()}
        if not 1 <= math.prod(sizes.values()) <= MOST_ELEMENTS or min(sizes.values(), default=1) < 1:
            raise PcrExportError(f"{engines[0]} takes inputs of {sizes}, which no GPU holds: build the engine again")
        return sizes
    config = folder / "unet" / "config.json"
    size = read_json(config, OwnSize, advice="export again").get("sample_size") if config.exists() else None
    if size is None:
        return SIZES
    height, width = (size, size) if isinstance(size, int) else size
    return {**SIZES, "height": height, "width": width}
