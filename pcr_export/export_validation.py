"""The artifact held against its simulation and the float network, and its latency beside the float graph's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from pcr_export.engines.onnxruntime import OnnxRuntimeEngine
from pcr_export.engines.session_memory import measure_memory
from pcr_export.export_job import Exported, Job
from pcr_export.graph.to_onnx import save_model
from pcr_export.qdiffbench.fidelity import Fidelity, measure_fidelity
from pcr_export.qdiffbench.painters import engine_call
from pcr_export.stages import Facts
from pcr_export.step_scales import StepScales, read_step_scales

FIDELITY_PROMPTS = 16
LATENCY_RUNS = 10


def validate_artifact(job: Job, exported: Exported) -> Facts:
    """Fidelity to the simulation at every step, and latency beside the float graph's, both on onnxruntime."""
    return exported.stages.run("validate", exported.key, [], lambda: _validate(job, exported))


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
    return {"fidelity": _fidelity_facts(fidelity), "engines": [_time_engines(job, exported, scales, conditions, seeds)]}


def _fidelity_facts(fidelity: Fidelity) -> Facts:
    finite = {site: value for site, value in fidelity.sites.items() if value != float("inf")}
    return {
        "artifact_vs_simulation_sqnr_db": _rounded(fidelity.overall),
        "per_step": [_rounded(value) for value in fidelity.per_call],
        "rounding_floor_sqnr_db": _rounded(fidelity.rounding_floor),
        "simulation_vs_fp32_sqnr_db": _rounded(fidelity.simulation),
        "simulation_vs_fp32_per_step": [_rounded(value) for value in fidelity.simulation_per_call],
        "sites": finite,
    }


def _rounded(value: float) -> float | None:
    return None if value == float("inf") else round(value, 2)


def _time_engines(
    job: Job, exported: Exported, scales: StepScales, conditions: Sequence[Any], seeds: Sequence[int]
) -> Facts:
    """Latency at an 8-bit step and, where there is one, at a relaxed step, and memory; the float graph's beside them."""
    inputs = {name: x.numpy() for name, x in next(job.denoiser.walk(conditions, seeds)).items()}
    threads = torch.get_num_threads()
    quantized, floating = job.folder / "unet" / "model.onnx", exported.stages.folder / "float" / "model.onnx"
    save_model(exported.float_graph(), floating)
    plain, relaxed = scales.timesteps[scales.bits == scales.bits.min()], scales.timesteps[scales.bits > 8]
    runs = [
        ("latency_ms", quantized, plain),
        ("float_latency_ms", floating, plain),
        ("relaxed_latency_ms", quantized, relaxed),
    ]
    latencies = {}
    with job.track("timing onnxruntime", len(runs) + 1) as advance:
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
