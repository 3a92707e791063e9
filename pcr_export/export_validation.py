"""The artifact held against its simulation and the float network, and its latency beside the float graph's."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pcr_export.engines.onnxruntime import OnnxRuntimeEngine
from pcr_export.engines.session_memory import measure_memory
from pcr_export.errors import PcrExportError
from pcr_export.export_job import Exported, Job
from pcr_export.graph.to_onnx import save_model
from pcr_export.qdiffbench.fidelity import Fidelity, asked_of_artifact, measure_fidelity
from pcr_export.qdiffbench.layer_fidelity import layer_fidelity
from pcr_export.qdiffbench.painters import engine_call
from pcr_export.stages import Facts
from pcr_export.step_scales import StepScales, read_step_scales

FIDELITY_PROMPTS = 16
LATENCY_RUNS = 10
MEASURES = "2"  # in the stage's key: another number, and every artifact is measured again
LEAST_TO_FP32_DB = 6.0  # of the simulation over all steps: it misses by half of what the network computes
WORST_LAYERS = 3  # that are named, to be left float


def validate_artifact(job: Job, exported: Exported) -> Facts:
    """Fidelity to the simulation at every step, and latency beside the float graph's, both on onnxruntime."""
    key = {**exported.key, "measures": MEASURES}
    shutil.rmtree(_float_folder(exported), ignore_errors=True)  # of a run that was killed, or of an older version
    return exported.stages.run("validate", key, [], lambda: _validate(job, exported))


def _validate(job: Job, exported: Exported) -> Facts:
    conditions, seeds = job.measured_batch(FIDELITY_PROMPTS)
    scales = read_step_scales(job.folder / "step_scales.safetensors")
    with OnnxRuntimeEngine(job.folder / "unet" / "model.onnx") as engine:
        fidelity = measure_fidelity(
            exported.denoiser,
            exported.layers,
            scales,
            engine_call(engine),
            conditions,
            seeds,
            round_weight=exported.rounding,
            track=job.track,
        )
    facts = _fidelity_facts(fidelity)
    if fidelity.simulation < LEAST_TO_FP32_DB:
        call = min(range(len(fidelity.simulation_per_call)), key=fidelity.simulation_per_call.__getitem__)
        batch = (conditions, seeds, call, exported.rounding)
        layers = layer_fidelity(exported.denoiser, exported.layers, scales, *batch)
        facts["worst_layers"] = dict(sorted(layers.items(), key=lambda item: item[1])[:WORST_LAYERS])
    return {"fidelity": facts, "engines": [_time_engines(job, exported, scales, conditions, seeds)]}


def _fidelity_facts(fidelity: Fidelity) -> Facts:
    finite = {site: value for site, value in fidelity.sites.items() if value != float("inf")}
    floors = [_rounded(value) for value in fidelity.rounding_floor_per_call]
    return {
        "artifact_vs_simulation_sqnr_db": _rounded(fidelity.overall),
        "per_step": [_rounded(value) for value in fidelity.per_call],
        "rounding_floor_sqnr_db": _rounded(fidelity.rounding_floor),
        "rounding_floor_per_step": floors,
        "asked_per_step": asked_of_artifact(floors),
        "simulation_vs_fp32_sqnr_db": _rounded(fidelity.simulation),
        "simulation_vs_fp32_per_step": [_rounded(value) for value in fidelity.simulation_per_call],
        "sites": finite,
    }


def refuse_bad_results(report: Mapping[str, Any], min_sqnr_db: float | None, place: Path) -> None:
    """Raise PcrExportError (exit code 3) for an artifact that computes something else than was calibrated, or for bad scales.

    Args:
        report: of the export; one without a validation is not refused.
        min_sqnr_db: asked of the artifact at every step; None: what rounding leaves, `asked_of_artifact`.
        place: report.json, for the message.
    """
    fidelity = report["fidelity"]
    if fidelity is None:
        return
    given, asked = fidelity["per_step"], fidelity["asked_per_step"]
    asked = asked if min_sqnr_db is None else [min_sqnr_db] * len(given)
    misses = [
        (ours - least, step, ours, least)
        for step, (ours, least) in enumerate(zip(given, asked, strict=True))
        if ours is not None and ours < least
    ]
    if misses:
        raise PcrExportError(_wrong_artifact(report, min(misses), place), exit_code=3)
    to_fp32 = fidelity["simulation_vs_fp32_sqnr_db"]
    if to_fp32 is not None and to_fp32 < LEAST_TO_FP32_DB:
        skip = " ".join(f"--skip {shlex.quote(name)}" for name in fidelity["worst_layers"])
        raise PcrExportError(
            f"quantization loses the network: the simulation is only {to_fp32} dB from FP32 ({LEAST_TO_FP32_DB:g} are asked), "
            f"and the artifact computes it faithfully; leave the layers float that lose most ({skip}), or use more bits: see {place}",
            exit_code=3,
        )


def _wrong_artifact(report: Mapping[str, Any], miss: tuple[float, int, float, float], place: Path) -> str:
    _, step, ours, least = miss
    floor = report["fidelity"]["rounding_floor_per_step"][step]
    rounding = "rounding explains no error" if floor is None else f"rounding explains an error at {floor} dB"
    sites = sorted((row["sqnr_db"], row["name"]) for row in report["sites"] if row["sqnr_db"] is not None)
    return (
        f"the artifact does not compute what was calibrated: at call {step} it is only {ours} dB from its simulation (floor {least}; "
        f"{rounding}), so the graph or onnxruntime is wrong, not the scales; worst sites: "
        f"{', '.join(name for _, name in sites[:3])}: please report it with {place}"
    )


def _rounded(value: float) -> float | None:
    return None if value == float("inf") else round(value, 2)


def _float_folder(exported: Exported) -> Path:
    return exported.stages.folder / "float"


@contextmanager
def _float_file(exported: Exported) -> Iterator[Path]:
    """The float graph as a file while it is timed. Raises PcrExportError where the disk has no room for it."""
    folder, graph = _float_folder(exported), exported.float_graph()
    needed = sum(
        value.const_value.nbytes for value in graph.graph.initializers.values() if value.const_value is not None
    )
    folder.mkdir(parents=True, exist_ok=True)
    try:
        free = shutil.disk_usage(folder).free
        if free < needed:
            raise PcrExportError(
                f"the float network, which the artifact is timed beside, takes {needed / 2**20:.0f} MiB on disk for a while, and "
                f"{free / 2**20:.0f} MiB are free in {folder}: make room, the same command goes on from here, or give --no-validate"
            )
        save_model(graph, folder / "model.onnx")
        yield folder / "model.onnx"
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _time_engines(
    job: Job, exported: Exported, scales: StepScales, conditions: Sequence[Any], seeds: Sequence[int]
) -> Facts:
    """Latency at an 8-bit step and, where there is one, at a relaxed step, and memory; the float graph's beside them."""
    inputs = {name: x.numpy() for name, x in next(job.denoiser.walk(conditions, seeds)).items()}
    threads = torch.get_num_threads()
    quantized = job.folder / "unet" / "model.onnx"
    plain, relaxed = scales.timesteps[scales.bits == scales.bits.min()], scales.timesteps[scales.bits > 8]
    latencies = {}
    with _float_file(exported) as floating, job.track("timing onnxruntime", 4) as advance:
        runs = [
            ("latency_ms", quantized, plain),
            ("float_latency_ms", floating, plain),
            ("relaxed_latency_ms", quantized, relaxed),
        ]
        for name, path, timesteps in runs:
            if len(timesteps):
                with OnnxRuntimeEngine(path, threads=threads) as engine:
                    latency = engine.latency({**inputs, job.denoiser.timestep: timesteps[0]}, LATENCY_RUNS)
                latencies[name] = asdict(latency)
            advance(1)
        step = relaxed[0] if len(relaxed) else plain[0]  # the one that takes more
        feed = {**inputs, job.denoiser.timestep: np.asarray(step)}
        memory = {
            "peak_memory_bytes": measure_memory(quantized, feed, threads),
            "float_peak_memory_bytes": measure_memory(floating, feed, threads),
        }
        advance(1)
    facts = {"backend": "onnxruntime", "target": "cpu", "built": True, "ran": True, "threads": threads}
    facts |= {**latencies, **memory}
    facts["batch"] = next(len(x) for x in inputs.values() if x.ndim)
    facts["speedup"] = round(latencies["float_latency_ms"]["p50"] / latencies["latency_ms"]["p50"], 3)
    return facts
