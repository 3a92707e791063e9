"""The whole job on one screen: load -> calibrate -> graph -> engines -> package -> validate -> report."""

from __future__ import annotations

import functools
import resource
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pcr_export import __version__
from pcr_export.calibrate.canonical_batches import prompts_per_call
from pcr_export.calibrate.first_token import find_first_tokens
from pcr_export.calibrate.layers import check_skip, find_layers, skip_warnings
from pcr_export.calibrate.learn_weights import WeightLearning, learns_weights, weights_folder
from pcr_export.calibrate.progressive import calibrate, num_unet_calls
from pcr_export.calibrate.range_search import RangeSearch
from pcr_export.calibrate.rewrite_network import rewrite_network, rewrites_network
from pcr_export.calibrate.sensitive_layers import SensitivitySearch
from pcr_export.calibrate.state import CalibrationState
from pcr_export.calibrate.weights.rounding import NearestRounding, RoundWeight
from pcr_export.engine_settings import EngineSettings, Range
from pcr_export.engines.engine_folder import tensorrt_onnx
from pcr_export.engines.flavours import gpu_target
from pcr_export.errors import PcrExportError
from pcr_export.export_engines import EngineJob, check_engines, make_engines, measure_on_gpu
from pcr_export.export_job import Exported, Job
from pcr_export.export_results import after_forgetting_report, forget_results, publish, publish_recipe
from pcr_export.export_trial import lazy_float_graph, try_denoiser, try_tracing
from pcr_export.export_validation import refuse_bad_results, validate_artifact
from pcr_export.folder_lock import hold_folder
from pcr_export.graph.passes.find_layers import check_layers_have_nodes
from pcr_export.graph.quantize import quantize_onnx
from pcr_export.graph.weight_file import onnx_files
from pcr_export.manifest import write_manifest
from pcr_export.models.check_denoiser import EXAMPLE_CONDITIONS, check_timesteps
from pcr_export.models.content_hash import hash_content
from pcr_export.models.denoiser import Inputs
from pcr_export.models.hash_weights import hash_weights
from pcr_export.qdiffbench.relax_search import RelaxSearch
from pcr_export.recipe import recipe_key, split_skip
from pcr_export.relaxed_steps import format_steps, searched_mean_bits
from pcr_export.report import make_report
from pcr_export.sites import Layer
from pcr_export.stages import Facts, Key, Stages, hash_file, key_hash
from pcr_export.step_scales import StepScales, read_step_scales, write_step_scales
from pcr_export.write_files import json_text, open_new, refuse_linked_folders, temporary_beside

if TYPE_CHECKING:
    import onnx_ir as ir

SENSITIVITY_PROMPTS = 32
SKIP_PROMPTS = 8
RANGE_PROMPTS = 32
LEAST_RANGE_PROMPTS = 4  # also of large pictures: one prompt's final latents are chance
SKIP_SAMPLES = 64  # UNet inputs over all steps: each block runs once for each of them and of its layers


def export_denoiser(job: Job) -> dict[str, Any]:
    """Calibrate a denoiser, write its quantized ONNX and report. A pipeline of diffusers comes with more: `export_model`.

    Returns the report that was written to report.json. Raises PcrExportError (exit code 3) where the artifact is further from its
    simulation than rounding explains, or the simulation too far from FP32; what was computed stays.
    """
    check_engines(job.engines)  # before a folder is made
    check_skip(job.denoiser.network, job.recipe.skip)
    check_timesteps(job.denoiser, job.recipe.num_inference_steps)
    with hold_folder(job.folder):
        exported = quantize_denoiser(job)
        validation = validate_artifact(job, exported) if job.validate else {}
        report = finish(job, exported, validation)
        write_manifest(job.folder)
        return report


def quantize_denoiser(job: Job) -> Exported:
    """Calibrate and write step_scales.safetensors, recipe.json and unet/model.onnx; search the relaxed steps where they are to be."""
    folder, stages = job.folder, Stages(job.folder / ".stages", resume=job.resume, log=job.log)
    make_folder(folder)
    job, example, seen = try_denoiser(job)
    seeds = job.noise_seeds()
    axes = _engine_axes(job, example)
    scales_path, graph_path = folder / "step_scales.safetensors", folder / "unet" / "model.onnx"
    recipe = job.recipe  # as it was asked for
    job = _choose_first_token(job, example)
    rewrites = rewrites_network(job.recipe)
    float_graph = lazy_float_graph(job, example) if rewrites else try_tracing(job, example, stages)
    job, sensitivities = search_skipped_layers(job, example)
    job, ranges = search_ranges(replace(job, float_graph=float_graph), example)
    job, choice = search_relaxed_steps(job)
    calibration_key = _calibration_key(job)
    if rewrites:
        rewritten = rewrite_network(job.denoiser, example, job.conditions, seeds, job.recipe, track=job.track)
        job = replace(job, denoiser=rewritten, float_graph=None)
        float_graph = try_tracing(job, example, stages)
    layers = find_layers(job.denoiser, example, job.recipe.skip, None if rewrites else seen)
    warnings = skip_warnings(layers, job.recipe.skip)
    for line in warnings:
        job.log(line)
    rounding, weights = _round_weights(job, layers)
    find_scales = functools.partial(_calibrate, job, layers, rounding, float_graph, calibration_key, scales_path)
    calibration = stages.run("calibrate", calibration_key, [scales_path], find_scales)
    graph_key = {**calibration_key, "scales": hash_file(scales_path)}

    def lower(dialect: str, path: Path) -> Facts:
        return _quantize(job, layers, rounding, float_graph(), scales_path, path, dialect)

    def lower_first() -> Facts:
        forget_results(folder)
        tensorrt_onnx(folder).unlink(missing_ok=True)  # of older scales; engines built from it are refused from now on
        return lower("onnxruntime", graph_path)

    graph = stages.run("quantize", graph_key, onnx_files(graph_path), lower_first)
    publish_recipe(folder, recipe, _searched_file(folder) if "choice" in choice else None)
    engines: list[Facts] = []
    if job.engines.wants_tensorrt:
        path = tensorrt_onnx(folder)
        action = after_forgetting_report(folder, lambda: lower("tensorrt", path))
        stages.run("quantize-tensorrt", graph_key, onnx_files(path), action)
        engines = _make_engines(job, layers, axes, float_graph)
    return Exported(
        denoiser=job.denoiser,
        layers=layers,
        rounding=rounding,
        stages=stages,
        key=graph_key,
        weights=weights,
        calibration={**calibration, **ranges},
        relaxed=_relaxed_facts(read_step_scales(scales_path), choice),
        sensitivities=sensitivities,
        graph=graph,
        engines=engines,
        float_graph=float_graph,
        warnings=warnings,
    )


def _round_weights(job: Job, layers: list[Layer]) -> tuple[RoundWeight, Facts]:
    """What gives the layers their integer weights, and {"layers", "seconds"} of learning it, as `WeightLearning.run` has them."""
    if not learns_weights(job.recipe):
        return NearestRounding(job.recipe.weight_bits), {"layers": {}, "seconds": 0.0}
    job = replace(job, recipe=replace(job.recipe, relax="none"))  # the same weights whatever is relaxed
    return WeightLearning(
        denoiser=job.denoiser,
        layers=layers,
        conditions=job.conditions,
        seeds=job.noise_seeds(),
        recipe=job.recipe,
        folder=job.weights_folder or weights_folder(job.folder),
        key=_calibration_key(job),
        resume=job.resume,
        track=job.track,
        log=job.log,
    ).run()


def _calibration_key(job: Job) -> Key:
    """What a calibration depends on."""
    calibration_set = list(zip(map(int, job.noise_seeds()), job.conditions, strict=True))
    return {
        "weights": hash_weights(job.denoiser.network),
        "version": __version__,
        "torch": torch.__version__,
        **job.walk_key,
        **recipe_key(job.recipe),
        "calibration set": hash_content(calibration_set),
    }


def _choose_first_token(job: Job, example: Inputs) -> Job:
    """The job with "auto" replaced: a text's first token is quantized apart where it stands out."""
    if job.recipe.first_token != "auto":
        return job
    found = find_first_tokens(job.denoiser, example, split_skip(job.recipe.skip)[0])
    if found:
        job.log(f"the first token stands out for {len(found)} layers, such as {next(iter(found))}: quantized apart")
    return replace(job, recipe=replace(job.recipe, first_token="apart" if found else "together"))


def _relaxed_facts(scales: StepScales, choice: Facts) -> Facts:
    steps = [step for step, bits in enumerate(scales.bits) if bits > 8]
    return {"steps": steps, "mean_activation_bits": float(scales.bits.mean()), **choice}


def search_skipped_layers(job: Job, example: Inputs) -> tuple[Job, dict[str, float]]:
    """The job with the layers that were found in the place of "auto:N", and what they were chosen by; no facts for other jobs."""
    patterns, count = split_skip(job.recipe.skip)
    if not count:
        return job, {}
    conditions, seeds = job.measured_batch(SKIP_PROMPTS)
    recipe = replace(job.recipe, skip=patterns, relax="none")
    errors = SensitivitySearch(
        denoiser=job.denoiser,
        layers=find_layers(job.denoiser, example, patterns),
        round_weight=NearestRounding(recipe.weight_bits),
        conditions=conditions,
        seeds=seeds,
        samples=SKIP_SAMPLES,
        seed=recipe.seed,
        folder=job.folder / ".stages" / "skip",
        key=_calibration_key(replace(job, recipe=recipe)),
        resume=job.resume,
        track=job.track,
        log=job.log,
    ).run()
    worst = sorted(errors, key=lambda layer: (-errors[layer], layer))[:count]
    return replace(job, recipe=replace(job.recipe, skip=(*patterns, *worst))), errors


def search_ranges(job: Job, example: Inputs) -> tuple[Job, Facts]:
    """The job with the estimator that was found in the place of "auto", and the facts of that choice; none for other jobs."""
    recipe = job.recipe
    if recipe.ranges != "auto":
        return job, {}
    observed = job.measured_batch(RANGE_PROMPTS, LEAST_RANGE_PROMPTS)
    if searched_mean_bits(recipe.relax, recipe.relax_bits) is not None:
        recipe = replace(recipe, relax="none")
    denoiser = rewrite_network(job.denoiser, example, *observed, recipe, track=job.track)
    chosen = RangeSearch(
        denoiser=denoiser,
        layers=find_layers(denoiser, example, recipe.skip),
        observed=observed,
        judged=job.judging_batch(max(LEAST_RANGE_PROMPTS, len(observed[0]) // 2)),
        recipe=recipe,
        folder=job.folder / ".stages" / "ranges",
        key=_calibration_key(replace(job, recipe=recipe)),
        resume=job.resume,
        track=job.track,
        log=job.log,
    ).run()
    return replace(job, recipe=replace(job.recipe, ranges=chosen["ranges"])), chosen


def search_relaxed_steps(job: Job) -> tuple[Job, Facts]:
    """The job with the steps that were found in the place of "auto:MEAN", and the errors of that choice; no facts for other jobs."""
    recipe = job.recipe
    mean_bits = searched_mean_bits(recipe.relax, recipe.relax_bits)
    if mean_bits is None:
        return job, {}
    chosen = relax_search(job).choose(mean_bits, recipe.relax, _searched_file(job.folder))
    return replace(job, recipe=replace(recipe, relax=format_steps(chosen["steps"]))), {
        name: chosen[name] for name in ("choice", "errors")
    }


def _searched_file(folder: Path) -> Path:
    """Where a search stays until the graph that it chose is there: sensitivity.json to be."""
    return folder / ".stages" / "searched_steps.json"


def relax_search(job: Job) -> RelaxSearch:
    """The search of a job's relaxed steps."""
    conditions, seeds = job.measured_batch(SENSITIVITY_PROMPTS)

    def quantize(relax: str, folder: Path) -> Exported:
        recipe = replace(job.recipe, relax=relax)
        learned = job.weights_folder or weights_folder(job.folder)
        return quantize_denoiser(
            replace(job, recipe=recipe, folder=folder, weights_folder=learned, engines=EngineSettings())
        )

    return RelaxSearch(
        denoiser=job.denoiser,
        conditions=conditions,
        seeds=seeds,
        relax_bits=job.recipe.relax_bits,
        key={
            **_calibration_key(replace(job, recipe=replace(job.recipe, relax="none"))),
            "relax bits": str(job.recipe.relax_bits),
        },
        folder=job.folder / ".stages",
        quantize=quantize,
        resume=job.resume,
        track=job.track,
        log=job.log,
    )


def _engine_axes(job: Job, example: Inputs) -> dict[str, Range]:
    """Minimum, optimum and maximum of the inputs' axes, told before anything is calibrated for sizes that can't be."""
    sizes = {
        axis_name: example[name].shape[axis]
        for name, axes in job.denoiser.dynamic_axes.items()
        for axis, axis_name in axes.items()
    }
    return job.engines.axes(sizes, {"height": job.recipe.height, "width": job.recipe.width}, EXAMPLE_CONDITIONS)


def _make_engines(
    job: Job, layers: list[Layer], axes: dict[str, Range], float_graph: Callable[[], ir.Model]
) -> list[Facts]:
    """Build the engines and, where this machine's GPU is one that they are for, measure them on it."""
    engine_job = EngineJob(
        settings=job.engines,
        folder=job.folder,
        axes=axes,
        layers=tuple(layer.name for layer in layers if layer.site is not None),
        track=job.track,
        log=job.log,
    )
    engines = make_engines(engine_job)
    measured = measure_on_gpu(engine_job, gpu_target(), float_graph) if job.validate else {}
    return [{**facts, **(measured if facts["target"] == measured.get("target") else {})} for facts in engines]


def _calibrate(
    job: Job,
    layers: list[Layer],
    rounding: RoundWeight,
    float_graph: Callable[[], ir.Model],
    key: Key,
    path: Path,
) -> Facts:
    check_layers_have_nodes(float_graph().graph, {layer.name for layer in layers if layer.site is not None})
    state = CalibrationState(path.parent / ".stages" / "calibration", key_hash(key))
    if not job.resume:
        state.clear()
    start = time.monotonic()
    scales = calibrate(
        job.denoiser,
        layers,
        job.conditions,
        job.noise_seeds(),
        job.recipe,
        round_weight=rounding,
        state=state,
        track=job.track,
    )
    forget_results(job.folder)
    write_step_scales(scales, path)
    state.clear()
    batches = -(-len(job.conditions) // prompts_per_call(job.recipe))
    progressive = job.recipe.scheme == "progressive"
    return {
        "prompts": len(job.conditions),
        "steps": scales.num_steps,
        "unet_batches": num_unet_calls(job.denoiser.timesteps, batches)
        if progressive
        else batches * len(job.denoiser.timesteps),
        "seconds": round(time.monotonic() - start, 1),
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def _quantize(
    job: Job,
    layers: list[Layer],
    rounding: RoundWeight,
    float_graph: ir.Model,
    scales_path: Path,
    path: Path,
    dialect: str,
) -> Facts:
    with job.track(f"quantizing the graph for {dialect}", 1) as advance:
        facts = asdict(quantize_onnx(float_graph, read_step_scales(scales_path), layers, path, dialect, rounding))
        advance(1)
    del facts["layers"]  # the report lists every layer under sites
    return facts


def finish(job: Job, exported: Exported, validation: Facts) -> dict[str, Any]:
    """Write report.json, then refuse an artifact that is not what was calibrated, or scales that lose the network."""
    report = make_report(
        job.recipe,
        exported.layers,
        calibration=exported.calibration,
        relaxed=exported.relaxed,
        sensitivities=exported.sensitivities,
        weights=exported.weights,
        graph=exported.graph,
        parts=exported.parts,
        engines=[*validation.get("engines", []), *exported.engines],
        validation=validation,
        warnings=exported.warnings,
    )
    publish(job.folder / "report.json", json_text(report))
    refuse_bad_results(report, job.recipe.min_sqnr_db, job.folder / "report.json")
    return report


def make_folder(folder: Path) -> None:
    """Make the output folder and prove that it can be written to. Raises PcrExportError where it can't."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        refuse_linked_folders(folder)
        probe = temporary_beside(folder / "probe")
        open_new(probe).close()
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise PcrExportError(
            f"--out: {folder} can't be written to ({error.strerror}): choose another folder"
        ) from error
