"""QDiffBench of a folder that was exported from a Denoiser: its images and the float network's, for conditions that Python gives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from pcr_export import __version__
from pcr_export.engines.onnxruntime import OnnxRuntimeEngine
from pcr_export.errors import PcrExportError
from pcr_export.folder_lock import hold_folder
from pcr_export.manifest import check_finished
from pcr_export.models.content_hash import hash_content, seed_text
from pcr_export.models.denoiser import Denoiser
from pcr_export.models.hash_weights import hash_weights
from pcr_export.progress import Track, silent
from pcr_export.prompts import prompt_seeds
from pcr_export.qdiffbench.evaluate import FORMAT
from pcr_export.qdiffbench.features import Extractors
from pcr_export.qdiffbench.html_report import write_html_report
from pcr_export.qdiffbench.images import forget_images_of_another_key, generate_images, prompts_per_call
from pcr_export.qdiffbench.painters import engine_call, paint_with
from pcr_export.qdiffbench.scores import measure_scores, write_scores
from pcr_export.read_files import read_json
from pcr_export.recipe import Recipe, read_recipe
from pcr_export.stages import Facts, Key, hash_file, key_hash
from pcr_export.write_files import write_json

PLACE = Path("evaluation") / "conditions"


@dataclass(frozen=True, kw_only=True)
class DenoiserEvaluation:
    """What is evaluated: the folder, the float denoiser that it was exported from, and conditions that its walk takes."""

    folder: Path
    denoiser: Denoiser  # with `decode`
    conditions: Sequence[Any]  # two or more
    seeds: Sequence[int] | None = None  # one per condition; None: from the conditions' content and the recipe's seed
    extractors: Extractors | None = None  # the networks that judge; None leaves only PSNR and SSIM
    real: Path | None = None  # a folder of real images, for another Frechet distance
    resume: bool = False  # keep the images of a stopped run with the same network, timesteps and conditions; `decode` is not compared
    track: Track = silent
    log: Callable[[str], None] = field(default=lambda _line: None)

    def noise_seeds(self) -> Sequence[int]:
        """One seed per condition."""
        return self.seeds or prompt_seeds([seed_text(each) for each in self.conditions], read_recipe(self.folder).seed)


def evaluate_denoiser(evaluation: DenoiserEvaluation) -> dict[str, Any]:
    """Paint with the float network and with unet/model.onnx, score, and write evaluation.json and report.html to the folder.

    Returns:
        What was written to evaluation.json: `domains` with one entry, whose `scores` has psnr_db, ssim and more.

    Raises:
        PcrExportError: the folder is no export or one of another network, or the denoiser makes no images.
    """
    check_finished(evaluation.folder)
    recipe, weights = read_recipe(evaluation.folder), hash_weights(evaluation.denoiser.network)
    _check(evaluation, weights)
    with hold_folder(evaluation.folder):
        domain = _evaluate(evaluation, recipe, weights)
        written = {"format": FORMAT, "command": "evaluate_denoiser", "seed": recipe.seed, "domains": [domain]}
        write_json(evaluation.folder / "evaluation.json", written)
        write_html_report(evaluation.folder)
    return written


def _check(evaluation: DenoiserEvaluation, weights: str) -> None:
    if evaluation.denoiser.decode is None:
        raise PcrExportError(
            "a denoiser without decode makes no images: give Denoiser(decode=...), latents to images in 0..1"
        )
    if len(evaluation.conditions) < 2 or len(evaluation.noise_seeds()) != len(evaluation.conditions):
        raise PcrExportError("give two conditions or more, and where you give seeds one for each")
    stamp = evaluation.folder / ".stages" / "calibrate.json"
    if stamp.is_file() and read_json(stamp).get("key", {}).get("weights") != weights:
        raise PcrExportError(
            f"{evaluation.folder} was exported from a network with other weights: give the denoiser of that"
        )


def _evaluate(evaluation: DenoiserEvaluation, recipe: Recipe, weights: str) -> Facts:
    """The one entry of evaluation.json's domains."""
    denoiser, texts = evaluation.denoiser, [str(each) for each in evaluation.conditions]
    graph = evaluation.folder / "unet" / "model.onnx"
    listed = hash_content(list(zip(evaluation.conditions, evaluation.noise_seeds(), strict=True)))
    common = {
        "version": __version__,
        "torch": torch.__version__,
        "conditions": listed,
        "timesteps": str(denoiser.timesteps),
    }
    _paint(evaluation, recipe, "fp32", {**common, "weights": weights}, denoiser)
    with OnnxRuntimeEngine(graph, threads=torch.get_num_threads()) as engine:
        files = {path.name: hash_file(path) for path in graph.parent.glob("model.onnx*")}
        _paint(evaluation, recipe, "artifact", {**common, **files}, engine_call(engine))
    folder = evaluation.folder / PLACE
    scores = measure_scores(
        folder / "artifact", folder / "fp32", texts, evaluation.extractors, real=evaluation.real, track=evaluation.track
    )
    return {
        "name": PLACE.name,
        "prompts_file": "conditions given in Python",
        "prompts_sha256": listed,
        "n_images": len(texts),
        **{name: (PLACE / name).as_posix() for name in ("fp32", "artifact")},
        "per_image": (PLACE / "per_image.json").as_posix(),
        "scores": write_scores(scores, folder / "per_image.json"),
    }


def _paint(
    evaluation: DenoiserEvaluation, recipe: Recipe, name: str, key: Key, call: Callable[..., torch.Tensor]
) -> None:
    folder = evaluation.folder / PLACE / name
    forget_images_of_another_key(folder, key_hash(key) if evaluation.resume else "")
    generate_images(
        paint_with(evaluation.denoiser, call),
        evaluation.conditions,
        evaluation.noise_seeds(),
        folder,
        chunk=prompts_per_call(recipe.height, recipe.width),
        description=f"conditions, {name}",
        track=evaluation.track,
    )
