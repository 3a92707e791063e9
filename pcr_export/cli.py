"""The command line: parse, call, print. Heavy imports wait until a command runs."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from typer.core import TyperGroup

from pcr_export import __version__
from pcr_export.errors import PcrExportError
from pcr_export.progress import Advance
from pcr_export.recipe import RANGES, SCHEMES, Recipe, parse_bits

if TYPE_CHECKING:
    from pcr_export.models.catalog import CatalogEntry

CALIBRATION_PIXELS_PER_CALL = 2**20
VALIDATION_PIXELS = 2**19
INTERRUPTED = 130

console = Console()
errors = Console(stderr=True, soft_wrap=True)


class DefaultExport(TyperGroup):
    """`pcr-export MODEL ...` means `pcr-export export MODEL ...`."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:
        """Insert the default command where no command is named."""
        if args and args[0] not in self.commands and args[0] not in ("--help", "--version"):
            args = ["export", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(cls=DefaultExport, add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


def _print_version(wanted: bool) -> None:
    if wanted:
        console.print(f"pcr-export {__version__}")
        raise typer.Exit


@app.callback()
def _program(
    version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True)] = False,
) -> None:
    """INT8 deployment artifacts for text-to-image diffusion models, with one activation scale per denoising step.

    pcr-export MODEL --bits w8a8 --out engines/ is the main job (see pcr-export export --help).
    """


@app.command()
def export(
    model: Annotated[str, typer.Argument(help="catalog name (tiny-sdxl, sd15, sdxl, ...), hub id or diffusers folder")],
    out: Annotated[Path, typer.Option(help="parent of the output folder NAME-wXaY")] = Path("engines"),
    bits: Annotated[str, typer.Option(help="bits of weights and activations")] = "w8a8",
    steps: Annotated[int | None, typer.Option(help="denoising steps [default: the model's]")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="[default: the model's]")] = None,
    height: Annotated[int | None, typer.Option(help="pixels [default: the model's]")] = None,
    width: Annotated[int | None, typer.Option(help="pixels [default: the model's]")] = None,
    calib_size: Annotated[int, typer.Option(help="calibration prompts (not batches)")] = 64,
    calib_batch: Annotated[int | None, typer.Option(help="prompts per UNet call [default: by picture size]")] = None,
    prompts_file: Annotated[Path | None, typer.Option(help="calibration prompts, one a line")] = None,
    eval_prompts_file: Annotated[Path | None, typer.Option(help="prompts of the validation images")] = None,
    images: Annotated[
        int | None, typer.Option(help="validation images [default: by picture size, at most 128]")
    ] = None,
    scheme: Annotated[str, typer.Option(help=f"how scales are found: {', '.join(SCHEMES)}")] = "progressive",
    ranges: Annotated[str, typer.Option(help=f"range estimator: {', '.join(RANGES)}")] = "mse",
    percentile: Annotated[float, typer.Option(help="of each end, for --ranges percentile")] = 99.99,
    affine: Annotated[
        bool, typer.Option("--affine/--symmetric", help="zero offsets where the graph carries them")
    ] = True,
    relax: Annotated[
        str | None, typer.Option(help="none, first:20%, last:20% or steps such as 0:4,17 [default: the model's]")
    ] = None,
    relax_bits: Annotated[int, typer.Option(help="activation bits of relaxed steps, 9 to 15")] = 10,
    skip: Annotated[list[str] | None, typer.Option(help="one more module path pattern that stays float")] = None,
    seed: Annotated[int, typer.Option(help="of everything random")] = 0,
    resume: Annotated[bool, typer.Option(help="go on from what an earlier run of this command finished")] = True,
    validate: Annotated[bool, typer.Option(help="compare the artifact with its simulation and with FP32")] = True,
    dry_run: Annotated[bool, typer.Option(help="print the plan and stop")] = False,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="tell more, and show tracebacks")] = False,
) -> None:
    """Calibrate MODEL, write its INT8 ONNX and everything around it, validate it and report."""
    from pcr_export.models.catalog import CATALOG, resolve

    weight_bits, activation_bits = parse_bits(bits)
    entry = _override(
        resolve(model), num_inference_steps=steps, guidance_scale=guidance_scale, height=height, width=width
    )
    prompts = _read_prompt_sets(entry.name if entry.name in CATALOG else None, prompts_file, eval_prompts_file)
    settings = {
        "model": model,
        "weight_bits": weight_bits,
        "activation_bits": activation_bits,
        "scheme": scheme,
        "ranges": ranges,
        "percentile": percentile,
        "affine": affine,
        "relax": relax,
        "relax_bits": relax_bits,
        "skip": skip or [],
        "calib_size": calib_size,
        "calib_batch": calib_batch,
        "seed": seed,
    }
    folder = out / f"{entry.name}-{bits.lower()}"
    if dry_run:
        _print_plan(entry, settings, prompts, folder)
        return
    try:
        report = _run_export(
            entry, settings, prompts, folder, images, resume=resume, validate=validate, verbose=verbose
        )
    except KeyboardInterrupt as stop:
        raise PcrExportError("stopped; the same command goes on from here", exit_code=INTERRUPTED) from stop
    _print_summary(report, folder)


def _override(entry: CatalogEntry, **settings: Any) -> CatalogEntry:
    return replace(entry, **{name: value for name, value in settings.items() if value is not None})


def _read_prompt_sets(
    model: str | None, calibration: Path | None, evaluation: Path | None
) -> tuple[list[str], list[str]]:
    """The prompts to calibrate on and those to validate with: files of the user's, or the sets of calib/."""
    from pcr_export.prompts import packaged_prompts, read_prompts

    name = "tiny-sdxl" if model == "tiny-sdxl" else "general"
    return (
        read_prompts(calibration or packaged_prompts(name)),
        read_prompts(evaluation or packaged_prompts(f"{name}-eval")),
    )


def _make_recipe(entry: CatalogEntry, settings: dict[str, Any], num_prompts: int) -> Recipe:
    """The recipe of a loaded model: what was asked for, and the model's own defaults where nothing was."""
    pixels = int(entry.height or 1) * int(entry.width or 1)
    own = {
        "relax": f"{entry.relaxed_end}:20%" if entry.relaxed_end else "none",
        "calib_batch": max(1, CALIBRATION_PIXELS_PER_CALL // pixels),
    }
    asked = {name: value for name, value in settings.items() if value is not None}
    asked["skip"] = (*Recipe.skip, *asked["skip"])
    asked["calib_size"] = min(asked["calib_size"], num_prompts) if asked["calib_size"] > 0 else asked["calib_size"]
    sampling = {name: getattr(entry, name) for name in ("num_inference_steps", "guidance_scale", "height", "width")}
    return Recipe(**{**own, **sampling, **asked})


def _run_export(
    entry: CatalogEntry,
    settings: dict[str, Any],
    prompts: tuple[list[str], list[str]],
    folder: Path,
    images: int | None,
    *,
    resume: bool,
    validate: bool,
    verbose: bool,
) -> dict[str, Any]:
    with console.status("importing torch and diffusers"):
        from pcr_export.export import Job, make_folder
        from pcr_export.export_pipeline import export_pipeline
        from pcr_export.models.load import load_model
        from pcr_export.prompts import choose_prompts

    make_folder(folder)
    with console.status(f"loading {entry.name}"):
        model = load_model(entry)
    recipe = _make_recipe(model.entry, settings, len(prompts[0]))
    count = images if images is not None else max(2, min(128, VALIDATION_PIXELS // (recipe.height * recipe.width)))
    if validate and count < 2:
        raise PcrExportError(f"--images {count}: give 2 or more, or --no-validate")
    job = Job(
        denoiser=model.denoiser(),
        recipe=recipe,
        conditions=choose_prompts(prompts[0], recipe.calib_size, recipe.seed),
        folder=folder,
        resume=resume,
        validate=validate,
        track=track,
        log=console.print if verbose else lambda _line: None,
    )
    return export_pipeline(job, model, prompts[1][:count])


@contextlib.contextmanager
def track(description: str, total: int) -> Iterator[Advance]:
    """Draw a progress bar with the time spent and the time left."""
    columns = (
        TextColumn("{task.description:28}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(description, total=total)
        yield lambda count: progress.advance(task, count)


def _print_plan(
    entry: CatalogEntry, settings: dict[str, Any], prompts: tuple[list[str], list[str]], folder: Path
) -> None:
    table = Table("setting", "value", title=f"plan: {entry.name} -> {folder}")
    for name in ("source", "num_inference_steps", "guidance_scale", "height", "width", "relaxed_end"):
        value = getattr(entry, name)
        table.add_row(name, "the model's own" if value is None else str(value))
    for name, value in settings.items():
        table.add_row(name, "the model's own" if value is None else str(value))
    table.add_row("calibration prompts", f"{min(settings['calib_size'], len(prompts[0]))} of {len(prompts[0])}")
    console.print(table)
    console.print("stages: calibrate, float ONNX, quantize, package, validate (artifact, latency, images), report")


def _print_summary(report: dict[str, Any], folder: Path) -> None:
    from pcr_export.report import summary_rows

    table = Table(title=str(folder), show_header=False)
    for row in summary_rows(report):
        table.add_row(*row)
    console.print(table)


@app.command()
def generate(
    folder: Annotated[Path, typer.Argument(help="an exported folder, e.g. engines/tiny-sdxl-w8a8")],
    prompt: Annotated[str, typer.Argument(help="what to draw")],
    output: Annotated[Path, typer.Option("-o", "--output", help="the picture, PNG")] = Path("out.png"),
    seed: Annotated[int, typer.Option(help="of the noise")] = 0,
    steps: Annotated[int | None, typer.Option(help="[default: as calibrated]")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="[default: as calibrated]")] = None,
    negative_prompt: Annotated[str, typer.Option(help="what not to draw")] = "",
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="show tracebacks")] = False,
) -> None:
    """Draw PROMPT with an exported folder alone, on onnxruntime."""
    from pcr_export.deploy.run import generate as generate_image
    from pcr_export.qdiffbench.images import write_png

    with console.status(f"drawing with {folder}"):
        image = generate_image(
            folder,
            prompt,
            seed=seed,
            steps=steps,
            guidance_scale=guidance_scale,
            negative_prompt=negative_prompt,
        )
    write_png(image, output)
    console.print(f"{output}")


def main() -> None:
    """Run the program. What a person can mend is one line on stderr and a non-zero exit; -v shows the traceback."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        app()
    except PcrExportError as error:
        sys.exit(_fail(str(error), error.exit_code))
    except OSError as error:
        sys.exit(_fail(f"{error}: mend that, the same command goes on from here", 1))


def _fail(message: str, exit_code: int) -> int:
    if {"-v", "--verbose"} & set(sys.argv):
        errors.print_exception()
    errors.print(f"error: {message}", markup=False, highlight=False)
    return exit_code
