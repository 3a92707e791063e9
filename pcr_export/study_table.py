"""`pcr-export study`: which rows the paper's table has (QDiffBench, arXiv 2311.06322), and the one JSON file that holds them."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pcr_export.errors import PcrExportError
from pcr_export.folder_lock import hold_folder
from pcr_export.graph.quantize import write_half_onnx
from pcr_export.models.catalog import resolve
from pcr_export.models.load import LoadedModel, load_model
from pcr_export.output_file import check_output_file
from pcr_export.progress import Track, silent
from pcr_export.prompts import choose_prompts, own_prompt_sets, read_prompts
from pcr_export.qdiffbench.features import find_extractors
from pcr_export.qdiffbench.html_report import read_pairs
from pcr_export.qdiffbench.image_pairs import PairGroup
from pcr_export.qdiffbench.metrics import METRICS, format_metric
from pcr_export.qdiffbench.painters import FloatPainter, UnetPainter, settings_of
from pcr_export.qdiffbench.schemes import SCHEMES
from pcr_export.qdiffbench.study_report import write_study_report
from pcr_export.qdiffbench.workers import Workers, worker_processes
from pcr_export.read_files import check_schema, read_json
from pcr_export.recipe import Recipe
from pcr_export.report_schema import Study as StudyFacts
from pcr_export.request import CALIBRATION_PIXELS_PER_CALL
from pcr_export.stages import Facts
from pcr_export.study import Domain, Study, run_scheme, score, score_recipe
from pcr_export.usable_cpus import usable_cpus
from pcr_export.write_files import write_json

FORMAT = 1
CALIBRATION_SETS = ((4, "in"), (16, "in"), (64, "in"), (256, "in"), (64, "out"), (64, "mixed"), (64, "empty"))
CALIBRATION_SET_SCHEME = "pcr-affine"
CALIBRATION_SET_IMAGES = (
    512  # of each domain, the first ones; calibration prompts out of domain come from the rest of the file
)
SIMULATED_SCHEME = "pcr-affine"
SIMULATION_IMAGES = 128  # the first ones: a simulation paints three times as long as its artifact
SHOWN_SCHEMES = ("static-minmax", "pcr-last-20")  # whose images stand in the report
SHOWN_METRICS = ("fid_to_fp32", "clip_score", "psnr_db", "lpips")  # on the terminal
OTHER_NOISE = 1  # the seed of the float model's images with other noise
PLACE = ("scheme", "simulated", "seed", "prompts", "domain", "eval_domain", "n_images")  # what a row is of
SECTIONS = ("rows", "simulation", "calibration_sets", "scale_bars")


@dataclass(frozen=True, kw_only=True)
class StudyRequest:
    """The arguments of `pcr-export study MODEL`. None means the model's own."""

    model: str
    out: Path
    json_file: Path | None = None
    schemes: tuple[str, ...] = ()  # empty: all
    images: int | None = None  # of each domain; None: one per prompt
    steps: int | None = None
    calib_size: int = Recipe.calib_size  # prompts
    prompts_file: Path | None = None  # calibration
    in_domain_file: Path | None = None
    out_of_domain_file: Path | None = None
    simulation_seeds: int = 0  # calibration seeds with which the artifact is held against its simulation
    calibration_sets: bool = False
    scale_bars: bool = False
    inception: Path | None = None
    clip: str | None = None
    workers: Workers = field(default_factory=Workers)
    command: str = ""  # for the record

    @property
    def folder(self) -> Path:
        """Where the study's files go."""
        return self.out / f"study-{resolve(self.model).name}"

    def check(self) -> None:
        """Raise PcrExportError for what can be refused before a model is loaded."""
        unknown = [name for name in self.schemes if name not in SCHEMES]
        if unknown:
            raise PcrExportError(f"--schemes {','.join(unknown)} is unknown: choose of {', '.join(SCHEMES)}")
        if self.steps is not None and self.steps < 1:
            raise PcrExportError(f"--steps {self.steps}: give 1 or more")
        if self.images is not None and self.images < 2:
            raise PcrExportError(f"--images {self.images}: a Frechet distance needs 2 or more")
        if self.json_file is not None:
            check_output_file(self.json_file, "--json", ".json")
        domains(self)


def run_study(
    request: StudyRequest, *, track: Track = silent, log: Callable[[str], None] = lambda _line: None
) -> Facts:
    """Every row that was asked for. The JSON file is written again after each, and what it holds already is not made again.

    Returns:
        {format, model, command, rows, simulation, calibration_sets, scale_bars, protocol, reference}. A row is {scheme, simulated,
        bits, relaxed_steps, mean_activation_bits, domain, seed, key, hardware} and METRICS; those of calibration_sets say
        {prompts, domain} of the calibration set and eval_domain.
    """
    request.check()
    with hold_folder(request.folder):
        return _run_study(request, track, log)


def _run_study(request: StudyRequest, track: Track, log: Callable[[str], None]) -> Facts:
    path = request.json_file or request.folder / "study.json"
    content = _read_study(path)
    study = open_study(request, _rows_by_key(content), track, log)
    content |= {"format": FORMAT, "model": request.model, "command": request.command}

    def keep(section: str, rows: Sequence[Facts]) -> None:
        for row in rows:
            reference, protocol = row.pop("clip_score_fp32", None), row.pop("protocol", None)
            if section == "rows" and protocol is not None:  # of other sections they belong to other numbers of images
                content["protocol"] = protocol
                content.setdefault("reference", {})[row["domain"]] = {"clip_score": reference}
            row.setdefault("hardware", _hardware())
        content[section] = replace_rows(content.get(section, []), rows)
        content["hardware"] = "; ".join(sorted({row["hardware"] for row in _all_rows(content)}))
        write_json(path, content)

    with worker_processes(request.workers):
        for section, rows in _sections(request, study):
            keep(section, rows)
    write_study_report(content, request.folder / "report.html", pairs=image_pairs(study))
    return content


def _sections(request: StudyRequest, study: Study) -> Iterator[tuple[str, list[Facts]]]:
    """Rows and the section that they belong to, as they are made."""
    for name in request.schemes or tuple(SCHEMES):
        yield "rows", run_scheme(study, name, replace(study.base, **SCHEMES[name]))
    for seed in range(request.simulation_seeds):
        recipe = replace(study.base, seed=seed, **SCHEMES[SIMULATED_SCHEME])
        inside = replace(study, domains=[replace(study.domains[0], scored=SIMULATION_IMAGES)])
        for simulated in (False, True):
            yield "simulation", run_scheme(inside, SIMULATED_SCHEME, recipe, simulated=simulated)
    for size, kind in CALIBRATION_SETS if request.calibration_sets else ():
        yield "calibration_sets", run_calibration_set(study, size, kind)
    if request.scale_bars:
        yield "scale_bars", run_scale_bars(study)


def replace_rows(old: Sequence[Facts], new: Sequence[Facts]) -> list[Facts]:
    """The rows of a section with `new` ones in the place of those that say what they are of: of an older calibration, say."""

    def place(row: Facts) -> tuple[Any, ...]:
        return tuple(row.get(name) for name in PLACE)

    places = {place(row) for row in new}
    return [row for row in old if place(row) not in places] + list(new)


def image_pairs(study: Study) -> list[PairGroup]:
    """Worst, median and best images of SHOWN_SCHEMES in each domain, of those that this machine has painted."""
    groups = []
    for domain in study.domains:
        reference = study.folder / "images" / domain.name / "fp32"
        for name in SHOWN_SCHEMES:
            folder = reference.with_name(f"{name}-{study.base.seed}")
            if (folder / "per_image.json").is_file():
                title = f"{name}, {domain.name} domain"
                groups.append(read_pairs(title, reference, folder, folder / "per_image.json"))
    return groups


def table_rows(content: Facts) -> list[tuple[str, ...]]:
    """The table for people: a line per row, one of names on top."""
    heads = (METRICS[name].short for name in SHOWN_METRICS)
    lines: list[tuple[str, ...]] = [("scheme", "domain", "bits", *heads)]
    for row in content["rows"]:
        figures = (format_metric(name, row) for name in SHOWN_METRICS)
        lines.append((row["scheme"], row["domain"], f"{row['mean_activation_bits']:g}", *figures))
    return lines


def _read_study(path: Path) -> Facts:
    """What an earlier run left, or nothing. Raises PcrExportError where the file is damaged or of another format."""
    if not path.exists():
        return {}
    content = read_json(path, advice="move it away")
    if content.get("format") != FORMAT:
        raise PcrExportError(
            f"{path} has study format {content.get('format')}, this version reads {FORMAT}: move it away"
        )
    check_schema(content, StudyFacts, path, advice="move it away")
    return content


def _rows_by_key(content: Facts) -> dict[str, Facts]:
    return {row["key"]: row for row in _all_rows(content)}


def _all_rows(content: Facts) -> list[Facts]:
    sections = (content.get(section, []) for section in SECTIONS)
    return [row for rows in sections for row in (rows if isinstance(rows, list) else [rows])]


def open_study(request: StudyRequest, known: Mapping[str, Facts], track: Track, log: Callable[[str], None]) -> Study:
    """Load the model and everything that all rows share."""
    entry = resolve(request.model)
    model = load_model(entry if request.steps is None else replace(entry, num_inference_steps=request.steps))
    calibration = read_prompts(request.prompts_file or own_prompt_sets(request.model).calibration)
    return Study(
        model=model,
        base=base_recipe(request.model, model, min(request.calib_size, len(calibration))),
        calibration=calibration,
        calibration_outside=_calibration_outside(request),
        domains=domains(request),
        extractors=find_extractors(model.entry.source, inception=request.inception, clip=request.clip),
        folder=request.folder,
        workers=request.workers,
        known=known,
        track=track,
        log=log,
    )


def base_recipe(name: str, model: LoadedModel, calib_size: int) -> Recipe:
    """The recipe of the main job for a model, with nothing relaxed."""
    entry = model.entry
    height, width = int(entry.height or 0), int(entry.width or 0)
    return Recipe(
        model=name,
        num_inference_steps=int(entry.num_inference_steps or 0),
        guidance_scale=float(entry.guidance_scale or 0),
        height=height,
        width=width,
        scheduler=entry.scheduler,
        guidance_rescale=entry.guidance_rescale,
        calib_size=calib_size,
        calib_batch=max(1, CALIBRATION_PIXELS_PER_CALL // (height * width)),
    )


def domains(request: StudyRequest) -> list[Domain]:
    """The prompts in and out of the domain of the calibration prompts; without a set out of domain, the first alone."""
    files = {
        "in": request.in_domain_file or own_prompt_sets(request.model).in_domain,
        "out": _out_of_domain_file(request),
    }
    return [
        Domain(name=name, prompts=read_prompts(path)[: request.images])
        for name, path in files.items()
        if path is not None
    ]


def _calibration_outside(request: StudyRequest) -> list[str]:
    path = _out_of_domain_file(request)
    return read_prompts(path)[CALIBRATION_SET_IMAGES:] if path else []


def _out_of_domain_file(request: StudyRequest) -> Path | None:
    return request.out_of_domain_file or own_prompt_sets(request.model).out_of_domain


def run_calibration_set(study: Study, size: int, kind: str) -> list[Facts]:
    """Score CALIBRATION_SET_SCHEME calibrated on `size` prompts of one kind: "in", "out", "mixed" or "empty"."""
    outside = study.calibration_outside
    drawn = {
        "in": lambda: choose_prompts(study.calibration, size, 0),
        "out": lambda: choose_prompts(outside, size, 0),
        "mixed": lambda: [*choose_prompts(study.calibration, size // 2, 0), *choose_prompts(outside, size // 2, 0)],
        "empty": lambda: [""] * size,
    }[kind]()
    if len(drawn) < size:
        raise PcrExportError(
            f"there are only {len(drawn)} calibration prompts of the kind {kind}, {size} are needed: give files with more of them"
        )
    recipe = replace(study.base, calib_size=size, **SCHEMES[CALIBRATION_SET_SCHEME])
    few = replace(study, domains=[replace(each, scored=CALIBRATION_SET_IMAGES) for each in study.domains])
    about = {"scheme": CALIBRATION_SET_SCHEME, "prompts": size}
    rows = score_recipe(few, f"calibrated-on-{size}-{kind}", recipe, drawn, about)
    return [{**row, "domain": kind, "eval_domain": row.get("eval_domain", row["domain"])} for row in rows]


def run_scale_bars(study: Study) -> list[Facts]:
    """What the figures are to be read against: the float model in float16, and in float32 with other noise."""
    path = study.folder / "schemes" / "fp16" / "unet" / "model.onnx"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_half_onnx(study.float_graph, path)
    settings = settings_of(study.base)
    rows = []
    for domain in study.domains:
        half = score(study, domain, "fp16", UnetPainter(settings=settings, onnx_path=path), {"precision": "float16"})
        other = score(study, domain, "fp32-other-noise", FloatPainter(settings=settings), {}, noise_seed=OTHER_NOISE)
        for name, facts in (("fp16", half), ("fp32-other-noise", other)):
            rows.append({"scheme": name, "domain": domain.name, "key": f"{name} {domain.name}", **facts})
    return rows


def _hardware() -> str:
    """The processor's name and the number of its cores, for the record."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text("utf-8", "replace").splitlines() if information.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {usable_cpus()} cores"
