"""The job for a text-to-image pipeline of diffusers: the denoiser's export, the other parts beside it, and images to judge it by."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from pcr_export.calibrate.layers import check_skip
from pcr_export.deploy.folder import unet_files, write_pipeline_folder, write_unet_folder, written_files
from pcr_export.deploy.smaller_parts import part_inputs, shrink_parts
from pcr_export.deploy.triton_repository import REPOSITORY, repository_key, repository_paths, write_triton_repository
from pcr_export.engines.onnxruntime import OnnxRuntimeEngine
from pcr_export.export import finish, make_folder, quantize_denoiser
from pcr_export.export_engines import check_engines
from pcr_export.export_job import Exported, Job
from pcr_export.export_results import after_forgetting_report, forget_report
from pcr_export.export_validation import validate_artifact
from pcr_export.folder_lock import hold_folder
from pcr_export.manifest import STORED_IMAGE, StoredImage, write_manifest
from pcr_export.models.denoiser import Inputs, sample
from pcr_export.models.hash_weights import hash_weights
from pcr_export.models.load import LoadedModel, load_model
from pcr_export.models.long_prompts import tokenizers_of, warn_of_cut_prompts
from pcr_export.models.picture_sizes import size_factor
from pcr_export.progress import Track
from pcr_export.prompts import choose_prompts, prompt_seeds
from pcr_export.qdiffbench.features import own_extractors
from pcr_export.qdiffbench.html_report import write_html_report
from pcr_export.qdiffbench.images import (
    forget_images_of_another_key,
    generate_images,
    has_images_of,
    image_path,
    prompts_per_call,
)
from pcr_export.qdiffbench.painters import FolderPainter, Paint, engine_call, paint_with
from pcr_export.qdiffbench.scores import measure_scores, write_scores
from pcr_export.qdiffbench.workers import Workers
from pcr_export.read_files import read_json
from pcr_export.recipe import Recipe
from pcr_export.request import PART_FORMS, ExportRequest
from pcr_export.stages import Facts, Key, key_hash

PARTS_PROMPTS = 8  # that smaller text encoders and VAE are measured with
TWICE_DB = 6.1  # twice the error in PSNR
SAMPLING = ("num_inference_steps", "guidance_scale", "guidance_rescale")  # settings of the recipe, beside the scheduler
MOST_PSNR_DB = 40.0  # asked of an image painted again: an error of 2.5 of 255 levels, which nobody sees


def export_pipeline(
    job: Job, model: LoadedModel, eval_prompts: Sequence[str], *, parts: str | None = PART_FORMS[0]
) -> dict[str, Any]:
    """Export `model` (whose denoiser is job.denoiser) to job.folder: ONNX parts, step scales, images, report.json and manifest.json.

    Args:
        eval_prompts: an image each of the float model and of the artifact is made of these; at least two where job.validate.
        parts: form of the weights of text encoders and VAE, "fp32", or at the smallest "fp16" or "int8", where that is measured to be
            safe; None leaves them and the tokenizers out, for machines that have them from elsewhere.

    Returns:
        The report. Raises PcrExportError as `export_denoiser` does.
    """
    check_engines(job.engines)  # before a folder is made
    if job.validate:
        warn_of_cut_prompts(tokenizers_of(model.pipeline), eval_prompts, "validation prompts")
    check_skip(job.denoiser.network, job.recipe.skip)
    with hold_folder(job.folder):
        return _export_pipeline(job, model, eval_prompts, parts)


def _export_pipeline(job: Job, model: LoadedModel, eval_prompts: Sequence[str], parts: str | None) -> dict[str, Any]:
    exported = quantize_denoiser(job)
    key = _package_key(job, exported, parts)
    files = unet_files(job.folder) if parts is None else written_files(model.pipeline, job.folder)
    package = after_forgetting_report(job.folder, lambda: _package(job, model, parts))
    exported = replace(exported, parts=exported.stages.run("package", key, files, package))
    if parts is None:
        shutil.rmtree(job.folder / REPOSITORY, ignore_errors=True)  # which would have no text encoders to name
    else:
        _serve(job, exported, key)
    validation = {}
    if job.validate:
        fidelity = validate_artifact(job, exported)
        quality = judge_images(job, exported, Path(model.entry.source), eval_prompts, parts)
        validation = {**fidelity, "quality": quality}
    report = finish(job, exported, validation)
    write_html_report(job.folder)
    write_manifest(job.folder, _first_image(job, eval_prompts) if job.validate else None)
    return report


def _serve(job: Job, exported: Exported, package_key: Key) -> None:
    def write() -> Facts:
        write_triton_repository(job.folder)
        return {}

    key = {**exported.key, **package_key, **repository_key(job.folder)}
    exported.stages.run("triton", key, repository_paths(job.folder), after_forgetting_report(job.folder, write))


def run_request(request: ExportRequest, *, track: Track, log: Callable[[str], None]) -> dict[str, Any]:
    """The main job from a checked request to its report. Raises PcrExportError for everything that a person can mend."""
    engines = request.engines()
    check_engines(engines)
    make_folder(request.folder())
    model = load_model(request.entry())
    engines.check_picture_sizes(size_factor(model.pipeline.unet.config, model.pipeline.vae_scale_factor))
    calibration, evaluation = request.prompt_sets()
    recipe = request.recipe(model.entry, len(calibration))
    job = replace(
        pipeline_job(model, recipe, calibration, request.folder()),
        engines=engines,
        resume=request.resume,
        validate=request.validate,
        track=track,
        log=log,
    )
    prompts = evaluation[: request.num_images(recipe, len(evaluation))]
    return export_pipeline(job, model, prompts, parts=None if request.strip_encoders else request.parts)


def pipeline_job(model: LoadedModel, recipe: Recipe, prompts: Sequence[str], folder: Path) -> Job:
    """The job of exporting a pipeline, calibrated on recipe.calib_size of the prompts."""
    parts = {name: part for name, part in model.pipeline.components.items() if isinstance(part, torch.nn.Module)}
    conditions = choose_prompts(prompts, recipe.calib_size, recipe.seed)
    warn_of_cut_prompts(tokenizers_of(model.pipeline), conditions, "calibration prompts")
    return Job(
        denoiser=model.denoiser(),
        recipe=recipe,
        conditions=conditions,
        folder=folder,
        walk_key={
            "other parts": hash_weights(*(part for name, part in sorted(parts.items()) if name != "unet")),
            "scheduler": model.pipeline.scheduler.to_json_string(),  # its class, too: two can have equal settings
        },
    )


def _first_image(job: Job, prompts: Sequence[str]) -> StoredImage:
    """The image that `verify` paints again. Rounding may take another turn there, so that both images are as far from the float
    model's as this one is: they then lie at most twice as far from each other, 6 dB below this one's PSNR to the float model.
    """
    to_float = read_json(job.folder / "images" / "per_image.json")["psnr_db"][0]
    return StoredImage(
        file=STORED_IMAGE,
        prompt=prompts[0],
        seed=prompt_seeds(prompts, job.recipe.seed)[0],
        min_psnr_db=round(min(MOST_PSNR_DB, to_float - TWICE_DB), 1),
    )


def _package_key(job: Job, exported: Exported, parts: str | None) -> Key:
    """What the other parts' files depend on; smaller ones on the prompts and pictures that they are measured with, too."""
    names = ("version", "torch", *job.walk_key)
    if parts == PART_FORMS[0]:
        return {name: exported.key[name] for name in names}
    if parts is None:
        return {**{name: exported.key[name] for name in names}, "parts": "UNet alone"}
    sampling = ("weights", "calibration set", *(f"recipe {name}" for name in SAMPLING))
    sizes = ("recipe height", "recipe width")
    return {**{name: exported.key[name] for name in (*names, *sampling, *sizes)}, "parts": parts}


def _package(job: Job, model: LoadedModel, parts: str | None) -> Facts:
    if parts is None:
        write_unet_folder(model.pipeline, job.folder)
        return {}
    with job.track("writing text encoders and VAE", 1) as advance:
        write_pipeline_folder(model.pipeline, job.folder)
        advance(1)
    if parts == PART_FORMS[0]:
        return {}
    conditions, seeds = job.measured_batch(PARTS_PROMPTS)
    with job.track("pictures to measure them on", len(job.denoiser.timesteps)) as advance:

        def call(inputs: Inputs) -> torch.Tensor:
            output = job.denoiser(inputs)
            advance(1)
            return output

        latents = sample(job.denoiser, call, conditions, seeds)
    inputs = part_inputs(model.pipeline, conditions, latents)
    with job.track(f"text encoders and VAE, {parts}", len(inputs)) as advance:
        return shrink_parts(job.folder, parts, inputs, advance)


def judge_images(job: Job, exported: Exported, source: Path, prompts: Sequence[str], parts: str | None) -> Facts:
    """Images of the float model and of the exported folder, both kept by index, and their scores."""
    seeds = prompt_seeds(prompts, job.recipe.seed)
    sampling = {name: str(getattr(job.recipe, name)) for name in (*SAMPLING, "height", "width")}
    float_key = {
        **{name: exported.key[name] for name in ("weights", "torch", *job.walk_key)},
        "prompts": key_hash(
            {str(i): f"{seed} {prompt}" for i, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))}
        ),
        **sampling,
    }
    folders = {name: job.folder / "images" / name for name in ("float", "int8")}
    workers = Workers(threads=torch.get_num_threads())

    def make(name: str, paint: Paint) -> Facts:
        generate_images(
            paint,
            prompts,
            seeds,
            folders[name],
            chunk=prompts_per_call(job.recipe.height, job.recipe.width),
            description=f"images, {name}",
            track=job.track,
        )
        return {}

    def make_int8() -> Facts:
        with _open_artifact(job, parts, workers.threads) as paint:
            return make("int8", paint)

    int8_key = {**exported.key, **float_key, **_package_key(job, exported, parts)}

    for name, key, action in (
        ("float", float_key, lambda: make("float", paint_with(job.denoiser, job.denoiser))),
        ("int8", int8_key, make_int8),
    ):
        image_key = key_hash(key) if job.resume else ""
        if not has_images_of(folders[name], image_key):
            forget_report(job.folder)  # which scores the images of before, and has one of them painted again
        forget_images_of_another_key(folders[name], image_key)
        images = [image_path(folders[name], index) for index in range(len(prompts))]
        exported.stages.run(f"images-{name}", key, images, action)
    extractors, per_image = own_extractors(source), job.folder / "images" / "per_image.json"

    def measure() -> Facts:
        scores = measure_scores(
            folders["int8"], folders["float"], prompts, extractors, workers=workers, track=job.track
        )
        return write_scores(scores, per_image)

    key = {**int8_key, "extractors": extractors.name if extractors else "none"}
    return exported.stages.run("quality", key, [per_image], measure)


@contextmanager
def _open_artifact(job: Job, parts: str | None, threads: int) -> Iterator[Paint]:
    """The exported folder alone, or its UNet between the float model's other parts where it has none."""
    if parts is not None:
        with FolderPainter(folder=job.folder).open(threads) as paint:
            yield paint
    else:
        with OnnxRuntimeEngine(job.folder / "unet" / "model.onnx", threads=threads) as engine:
            yield paint_with(job.denoiser, engine_call(engine))
