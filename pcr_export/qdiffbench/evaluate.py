"""QDiffBench of an exported folder: paint every prompt with the float model and with the artifact, score, report."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from pcr_export import __version__
from pcr_export.deploy.pipeline import read_tokenizers
from pcr_export.errors import PcrExportError
from pcr_export.folder_lock import hold_folder
from pcr_export.manifest import check_finished
from pcr_export.models.catalog import resolve
from pcr_export.models.long_prompts import warn_of_cut_prompts
from pcr_export.models.lora_file import LoraFile
from pcr_export.progress import Track, silent
from pcr_export.prompts import own_prompt_sets, prompt_seeds, read_prompts
from pcr_export.qdiffbench.features import Extractors
from pcr_export.qdiffbench.html_report import write_html_report
from pcr_export.qdiffbench.images import forget_images_of_another_key, has_images_of, prompts_per_call
from pcr_export.qdiffbench.metrics import METRICS, format_metric
from pcr_export.qdiffbench.painters import (
    FloatPainter,
    FolderPainter,
    ModelSettings,
    Painter,
    paint_images,
    settings_of,
)
from pcr_export.qdiffbench.scores import measure_scores, write_scores
from pcr_export.qdiffbench.workers import Workers, worker_processes
from pcr_export.recipe import Recipe, read_recipe
from pcr_export.stages import Facts, Key, Stages, hash_file, key_hash
from pcr_export.write_files import write_json

FORMAT = 1
ARTIFACT_PARTS = (
    "scheduler",
    "text_encoder",
    "text_encoder_2",
    "tokenizer",
    "tokenizer_2",
    "unet",
    "vae_decoder",
)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What is evaluated, on which prompts, and who paints."""

    folder: Path  # that an export wrote
    prompts: Sequence[Path] = ()  # a file for each domain; none: the packaged sets
    images: int | None = None  # of each domain, for the first prompts of its file; None: for all
    real: Path | None = None  # a folder of real images, for another Frechet distance
    model: str | None = None  # where the float model is found; None: as the recipe names it
    lora: tuple[LoraFile, ...] = ()  # the files that the export fused into the model
    seed: int | None = None  # of the initial noise; None: the recipe's
    workers: Workers = field(default_factory=Workers)
    resume: bool = True
    command: str = ""  # what a person typed, for the report
    track: Track = silent
    log: Callable[[str], None] = field(default=lambda _line: None)

    def __post_init__(self) -> None:
        if self.images is not None and self.images < 2:
            raise PcrExportError(f"--images must be at least 2, got {self.images}")
        if self.real is not None and not self.real.is_dir():
            raise PcrExportError(f"--real {self.real} is no folder: give one of real images")

    @cached_property
    def recipe(self) -> Recipe:
        """The exported folder's recipe. Raises PcrExportError where the folder is no export."""
        return read_recipe(self.folder)

    @cached_property
    def settings(self) -> ModelSettings:
        """The float model; a folder by its absolute path, which other processes find too."""
        settings = replace(settings_of(self.recipe), lora=self._recipe_lora())
        entry = resolve(self.model or settings.model)
        named = self.model or settings.model
        return replace(settings, model=str(Path(entry.source).resolve()) if Path(named).is_dir() else named)

    def _recipe_lora(self) -> tuple[LoraFile, ...]:
        """The LoRA files, which must be those of the recipe: without them the float model is another one."""
        if tuple(lora.facts() for lora in self.lora) != self.recipe.lora:
            words = " ".join(f"--lora {lora.name}:{lora.scale:g}" for lora in self.recipe.lora) or "no --lora"
            raise PcrExportError(f"{self.folder} was exported with {words}: give the same files to evaluate")
        return tuple(replace(lora, path=lora.path.absolute()) for lora in self.lora)

    @property
    def source(self) -> str:
        """Folder or hub id of the float model's pipeline."""
        return resolve(self.settings.model).source

    @property
    def noise_seed(self) -> int:
        """The seed of the initial noise."""
        return self.recipe.seed if self.seed is None else self.seed

    def domains(self) -> list[Domain]:
        """The prompt sets. Raises PcrExportError where one can't be read, is too small, or shares its name with another."""
        check_finished(self.folder)
        own = own_prompt_sets(self.recipe.model)
        if not (self.folder / "model_index.json").is_file():
            raise PcrExportError(
                f"{self.folder} was exported from a Denoiser, which only Python has: write "
                "evaluate_denoiser(DenoiserEvaluation(folder=..., denoiser=..., conditions=...)), as docs/denoiser.md shows"
            )
        packaged = [path for path in (own.in_domain, own.out_of_domain) if path is not None]
        files = [(path, str(path)) for path in self.prompts] or [(path, f"calib/{path.name}") for path in packaged]
        domains = [Domain(path.stem, path, shown, read_prompts(path)[: self.images]) for path, shown in files]
        for domain in domains:
            if len(domain.prompts) < 2:
                raise PcrExportError(f"the prompts file {domain.path} holds one prompt: an evaluation needs 2 or more")
        name, count = Counter(domain.name for domain in domains).most_common(1)[0]
        if count > 1:
            raise PcrExportError(f"{count} prompt files are called {name}, which names their results: rename one")
        return domains


@dataclass(frozen=True)
class Domain:
    """A prompt set that is evaluated."""

    name: str
    path: Path
    shown: str  # the path as the report has it: a packaged file lies elsewhere in every installation
    prompts: list[str]


def evaluate_folder(evaluation: Evaluation, extractors: Extractors | None) -> dict[str, Any]:
    """Paint, score, and write evaluation.json, evaluation/NAME/per_image.json and report.html to the folder.

    A run that was stopped goes on where it was; figures depend neither on that nor on the number of workers.

    Args:
        extractors: the networks that judge (`find_extractors`); None leaves only PSNR and SSIM.

    Returns:
        What was written to evaluation.json. Raises PcrExportError where prompts, models or images can't be read, or a worker fails.
    """
    domains = evaluation.domains()
    tokenizers = read_tokenizers(evaluation.folder)
    for domain in domains:
        warn_of_cut_prompts(tokenizers, domain.prompts, f"prompts of {domain.shown}")
    with hold_folder(evaluation.folder):
        artifact = _artifact_key(evaluation.folder)
        model = _model_key(evaluation.settings)
        with worker_processes(evaluation.workers):
            rows = [_evaluate_domain(evaluation, domain, extractors, model, artifact) for domain in domains]
        written = {"format": FORMAT, "command": evaluation.command, "seed": evaluation.noise_seed, "domains": rows}
        write_json(evaluation.folder / "evaluation.json", written)
        write_html_report(evaluation.folder)
    return written


def table_rows(evaluation: dict[str, Any]) -> list[tuple[str, ...]]:
    """What evaluation.json says, as a table with a column for each domain. Figures that were not measured are left out."""
    domains = evaluation["domains"]
    rows = [("", *(domain["name"] for domain in domains))]
    for name, metric in METRICS.items():
        if any(domain["scores"][name] is not None for domain in domains):
            rows.append((metric.head, *(format_metric(name, domain["scores"]) for domain in domains)))
    warnings = dict.fromkeys(text for domain in domains if (text := domain["scores"]["warning"]))
    return [*rows, *(("note", text) for text in warnings)]


def _evaluate_domain(
    evaluation: Evaluation, domain: Domain, extractors: Extractors | None, model: Key, artifact: Key
) -> Facts:
    """One entry of evaluation.json's domains."""
    place = Path("evaluation") / domain.name
    folder = evaluation.folder / place
    common = _common_key(evaluation, domain)
    keys = {"fp32": {**common, **model}, "artifact": {**common, **artifact}}
    painters: dict[str, Painter] = {
        "fp32": FloatPainter(settings=evaluation.settings),
        "artifact": FolderPainter(folder=evaluation.folder.resolve()),
    }
    for name, painter in painters.items():
        image_key = key_hash(keys[name]) if evaluation.resume else ""
        if not has_images_of(folder / name, image_key):
            (evaluation.folder / "evaluation.json").unlink(missing_ok=True)  # which scores the images of before
        forget_images_of_another_key(folder / name, image_key)
        _paint(evaluation, domain, painter, folder / name, name)

    def measure() -> Facts:
        scores = measure_scores(
            folder / "artifact",
            folder / "fp32",
            domain.prompts,
            extractors,
            real=evaluation.real,
            workers=evaluation.workers,
            track=evaluation.track,
        )
        return write_scores(scores, folder / "per_image.json")

    stages = Stages(evaluation.folder / ".stages" / place, resume=evaluation.resume, log=evaluation.log)
    key = {
        **{f"{name} images": key_hash(each) for name, each in keys.items()},
        "extractors": extractors.name if extractors else "none",
        "real images": _listing(evaluation.real) if evaluation.real else "none",
    }
    return {
        "name": domain.name,
        "prompts_file": domain.shown,
        "prompts_sha256": hash_file(domain.path),
        "n_images": len(domain.prompts),
        **{name: (place / name).as_posix() for name in painters},
        "per_image": (place / "per_image.json").as_posix(),
        "scores": stages.run("scores", key, [folder / "per_image.json"], measure),
    }


def _paint(evaluation: Evaluation, domain: Domain, painter: Painter, folder: Path, name: str) -> None:
    paint_images(
        painter,
        domain.prompts,
        prompt_seeds(domain.prompts, evaluation.noise_seed),
        folder,
        chunk=prompts_per_call(evaluation.recipe.height, evaluation.recipe.width),
        workers=evaluation.workers,
        description=f"{domain.name}, {name}",
        track=evaluation.track,
    )


def _common_key(evaluation: Evaluation, domain: Domain) -> Key:
    """What all images of a domain depend on besides the model: prompts, noise and libraries, but not who paints."""
    return {
        "version": __version__,
        "torch": torch.__version__,
        "threads": str(evaluation.workers.threads),
        "seed": str(evaluation.noise_seed),
        "prompts": hashlib.sha256(json.dumps(domain.prompts).encode()).hexdigest(),
    }


def _model_key(settings: ModelSettings) -> Key:
    """The float model and its sampling: the files of a folder, or the name and revision of a model of the hub."""
    entry = resolve(settings.model)
    sampling = {name: str(value) for name, value in asdict(settings).items() if name not in ("model", "lora")}
    if settings.lora:
        sampling["lora"] = str([lora.facts() for lora in settings.lora])
    if not entry.is_local:
        facts = {name: value for name, value in asdict(entry).items() if name != "lora"}
        return {**sampling, "model": json.dumps(facts)}
    folder = Path(entry.source)
    files = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")]
    return {**sampling, "model": _hash_files(folder, files)}


def _artifact_key(folder: Path) -> Key:
    """Every file that drawing with an exported folder reads."""
    files = [path for part in ARTIFACT_PARTS for path in (folder / part).glob("*") if path.suffix != ".engine"]
    files += [folder / "model_index.json", folder / "recipe.json"]
    return {"artifact": _hash_files(folder, [path for path in files if path.is_file()])}


def _hash_files(folder: Path, paths: Iterable[Path]) -> str:
    """sha256 over the names below `folder` and the contents of files."""
    return key_hash({path.relative_to(folder).as_posix(): hash_file(path) for path in sorted(paths)})


def _listing(folder: Path) -> str:
    """Hash of the names, sizes and times of all files of a folder, which may be too large to read twice."""
    files = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()]
    return hashlib.sha256(json.dumps(sorted(files)).encode()).hexdigest()
