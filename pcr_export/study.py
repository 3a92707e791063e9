"""One scheme after another, each exported and painted with the same prompts and noise: the rows of QDiffBench's table."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pcr_export import __version__
from pcr_export.export import quantize_denoiser
from pcr_export.export_job import Exported
from pcr_export.export_pipeline import pipeline_job
from pcr_export.graph.to_onnx import trace_float_onnx
from pcr_export.models.check_denoiser import EXAMPLE_CONDITIONS
from pcr_export.models.hash_weights import hash_weights
from pcr_export.models.load import LoadedModel
from pcr_export.progress import Track, silent
from pcr_export.prompts import prompt_seeds
from pcr_export.qdiffbench.features import Extractors
from pcr_export.qdiffbench.images import forget_images_of_another_key, prompts_per_call
from pcr_export.qdiffbench.painters import (
    FloatPainter,
    Painter,
    SimulationPainter,
    UnetPainter,
    paint_images,
    settings_of,
)
from pcr_export.qdiffbench.scores import measure_scores, write_scores
from pcr_export.qdiffbench.workers import Workers
from pcr_export.recipe import Recipe
from pcr_export.stages import Facts, Key, Stages, hash_file, key_hash
from pcr_export.step_scales import read_step_scales

if TYPE_CHECKING:
    import onnx_ir as ir

NOISE_SEED = 0  # of every image but those that are painted with other noise on purpose
METRICS = ("n_images", "fid_to_fp32", "kid_to_fp32", "clip_score", "psnr_db", "ssim", "lpips")


@dataclass(frozen=True, kw_only=True)
class Domain:
    """One set of prompts that every scheme paints."""

    name: str  # "in" or "out" of the domain of the calibration prompts
    prompts: Sequence[str]  # the float model paints all of them
    scored: int | None = None  # a scheme paints and is scored on so many, the first ones; None: all

    @property
    def scored_prompts(self) -> Sequence[str]:
        """The prompts that a scheme paints."""
        return self.prompts[: self.scored]


@dataclass(frozen=True, kw_only=True)
class Study:
    """A model, the recipe that every scheme changes, what is painted, and where the files go."""

    model: LoadedModel
    base: Recipe
    calibration: Sequence[str]  # the prompts that a scheme's calibration set is drawn from
    calibration_outside: Sequence[str]  # prompts out of its domain for the same use, none of them scored then
    domains: Sequence[Domain]
    extractors: Extractors
    folder: Path
    workers: Workers = field(default_factory=Workers)
    known: Mapping[str, Facts] = field(default_factory=dict)  # rows of an earlier run by their keys
    track: Track = silent
    log: Callable[[str], None] = field(default=lambda _line: None)

    @functools.cached_property
    def float_model(self) -> str:
        """Hash of everything that the float model's images depend on besides prompts and noise."""
        pipeline = self.model.pipeline
        names = ("unet", "text_encoder", "text_encoder_2", "vae")
        parts = [part for name in names if (part := getattr(pipeline, name, None)) is not None]
        sampling = {name: value for name, value in asdict(settings_of(self.base)).items() if name != "lora"}
        scheduler = pipeline.scheduler.to_json_string()  # its class, too
        return key_hash({"weights": hash_weights(*parts), "scheduler": scheduler, "sampling": json.dumps(sampling)})

    @functools.cached_property
    def float_graph(self) -> ir.Model:
        """The float UNet as ONNX, traced once for all schemes."""
        denoiser = self.model.denoiser()
        prompts, seeds = [self.calibration[0]] * EXAMPLE_CONDITIONS, [0] * EXAMPLE_CONDITIONS
        return trace_float_onnx(denoiser, next(denoiser.walk(prompts, seeds)))


def run_scheme(study: Study, name: str, recipe: Recipe, *, simulated: bool = False) -> list[Facts]:
    """Export a scheme and score it in every domain: one row each. A row that is known already is not made again.

    Args:
        name: of its folders and in its rows.
        recipe: its settings; its seed is that of the calibration set.
        simulated: paint with the simulation in torch instead of the exported artifact.
    """
    about = {"scheme": name, "simulated": simulated, "seed": recipe.seed}
    return score_recipe(study, f"{name}-{recipe.seed}", recipe, study.calibration, about, simulated=simulated)


def score_recipe(
    study: Study, name: str, recipe: Recipe, calibration: Sequence[str], about: Facts, *, simulated: bool = False
) -> list[Facts]:
    """A row per domain: `about`, what the recipe became, and METRICS.

    Args:
        name: of its folders.
        calibration: the prompts that its calibration set is drawn from.
    """
    keys = [_row_key(study, domain, recipe, calibration, simulated) for domain in study.domains]
    if all(key in study.known for key in keys):
        return [study.known[key] for key in keys]
    folder = study.folder / "schemes" / name
    exported = export_scheme(study, folder, recipe, calibration)
    scales = read_step_scales(folder / "step_scales.safetensors")
    about = {
        **about,
        "bits": f"w{recipe.weight_bits}a{recipe.activation_bits}",
        "relaxed_steps": np.flatnonzero(scales.bits > recipe.activation_bits).tolist(),
        "mean_activation_bits": float(scales.bits.mean()),
        "onnx_bytes": exported.graph["onnx_bytes"],
        "calibration_seconds": round(exported.calibration["seconds"] + exported.weights["seconds"], 1),
    }
    return [
        {**about, "domain": domain.name, **_score_folder(study, domain, name, folder, recipe, simulated), "key": key}
        for domain, key in zip(study.domains, keys, strict=True)
    ]


def _row_key(study: Study, domain: Domain, recipe: Recipe, calibration: Sequence[str], simulated: bool) -> str:
    """Everything that a row's figures depend on, but for the machine."""
    facts = {
        **_image_key(study, domain.scored_prompts),
        "version": __version__,
        "recipe": recipe.hash(),
        "calibration": key_hash({str(index): prompt for index, prompt in enumerate(calibration)}),
        "extractors": study.extractors.name,
        "simulated": str(simulated),
    }
    return key_hash(facts)


def export_scheme(study: Study, folder: Path, recipe: Recipe, prompts: Sequence[str]) -> Exported:
    """Calibrate on `prompts` and write the folder of a scheme: its step scales and its UNet, by the main job's own code."""
    job = pipeline_job(study.model, recipe, prompts, folder)
    return quantize_denoiser(replace(job, float_graph=lambda: study.float_graph, track=study.track, log=study.log))


def _score_folder(study: Study, domain: Domain, name: str, folder: Path, recipe: Recipe, simulated: bool) -> Facts:
    """Score an exported folder's UNet, or its simulation, in one domain: METRICS by name."""
    settings, onnx_path = settings_of(recipe), folder / "unet" / "model.onnx"
    key = {"artifact": key_hash({path.name: hash_file(path) for path in sorted(onnx_path.parent.glob("model.onnx*"))})}
    if simulated:
        return score(study, domain, f"{name}-simulated", SimulationPainter(settings=settings, folder=folder), key)
    return score(study, domain, name, UnetPainter(settings=settings, onnx_path=onnx_path), key)


def score(
    study: Study, domain: Domain, name: str, painter: Painter, key: Key, *, noise_seed: int = NOISE_SEED
) -> Facts:
    """Paint the domain's prompts and score the images against those of the float model: METRICS, CLIP score of FP32, protocol."""
    reference = paint(study, domain, "fp32", FloatPainter(settings=settings_of(study.base)), {}, domain.prompts)
    name = name if domain.scored is None else f"{name}-first-{domain.scored}"  # beside the images of all prompts
    folder = paint(study, domain, name, painter, key, domain.scored_prompts, noise_seed)
    stages = Stages(study.folder / "stages" / domain.name, log=study.log)

    def measure() -> Facts:
        scores = measure_scores(
            folder, reference, domain.scored_prompts, study.extractors, workers=study.workers, track=study.track
        )
        facts = write_scores(scores, folder / "per_image.json")
        return {each: facts[each] for each in (*METRICS, "clip_score_fp32", "protocol")}

    stage_key = {**_image_key(study, domain.scored_prompts), **key, "extractors": study.extractors.name}
    return stages.run(f"scores-{name}", stage_key, [folder / "per_image.json"], measure)


def paint(
    study: Study,
    domain: Domain,
    name: str,
    painter: Painter,
    key: Key,
    prompts: Sequence[str],
    noise_seed: int = NOISE_SEED,
) -> Path:
    """The folder of a painter's images of `prompts`; those that are there already are kept."""
    folder = study.folder / "images" / domain.name / name
    image_key = {**_image_key(study, prompts), **key, "noise": str(noise_seed)}
    forget_images_of_another_key(folder, key_hash(image_key))
    paint_images(
        painter,
        prompts,
        prompt_seeds(prompts, noise_seed),
        folder,
        chunk=prompts_per_call(study.base.height, study.base.width),
        workers=study.workers,
        description=f"{name}, {domain.name} domain",
        track=study.track,
    )
    return folder


def _image_key(study: Study, prompts: Sequence[str]) -> Key:
    return {
        "float model": study.float_model,
        "prompts": key_hash({str(index): prompt for index, prompt in enumerate(prompts)}),
        "threads": str(study.workers.threads),
    }
