"""The command line: parse, call, print. Heavy imports wait until a command runs."""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from pcr_export import __version__, cli_folder
from pcr_export.cli_command import Command, DefaultExport, ResumingCommand
from pcr_export.engine_settings import BACKENDS, EngineSettings
from pcr_export.errors import explain
from pcr_export.output_file import check_output_file
from pcr_export.recipe import RANGES, REDUCTIONS, SCHEMES, WEIGHTS, Recipe
from pcr_export.request import PART_FORMS, ExportRequest
from pcr_export.stop_signals import importing
from pcr_export.terminal import (
    escape_what_is_not_encoded,
    flush_or_forget,
    print_rows,
    say,
    say_error,
    say_traceback,
    show_warning,
    status,
    track,
)

app = typer.Typer(cls=DefaultExport, add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


def _print_version(wanted: bool) -> None:
    if wanted:
        say(f"pcr-export {__version__}")
        raise typer.Exit


@app.callback()
def _program(
    version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True)] = False,
) -> None:
    """INT8 deployment artifacts for text-to-image diffusion models, with one activation scale per denoising step.

    pcr-export MODEL --bits w8a8 --out engines/ is the main job (see pcr-export export --help).
    """


Scheduler = Annotated[
    str | None,
    typer.Option(help="NAME[:key=value,...] of diffusers, e.g. EulerDiscreteScheduler:timestep_spacing=trailing"),
]
GuidanceRescale = Annotated[float | None, typer.Option(help="0 to 1 (arXiv 2305.08891)")]
Affine = Annotated[bool, typer.Option("--affine/--symmetric", help="zero offsets where they are free")]
ObservedSteps = Annotated[str, typer.Option(help="steps that --scheme static sees: all, uniform:10, normal:64")]
Reduce = Annotated[str, typer.Option(help=f"how --scheme static joins them: {', '.join(REDUCTIONS)}")]
SmoothQuant = Annotated[float | None, typer.Option(help="SmoothQuant's alpha for Linears [default: not smoothed]")]
SplitShortcut = Annotated[
    bool, typer.Option("--split-shortcut", help="a scale for each half of what a 1x1 convolution joins")
]
FirstToken = Annotated[
    str, typer.Option(help="of a text, quantized: together, apart; auto: apart where it dwarfs the others, as SDXL's")
]
Weights = Annotated[str, typer.Option(help=f"how they are rounded: {', '.join(WEIGHTS)}")]
Keep = Annotated[str, typer.Option(help="layers that keep 8-bit weights: how many, or mean bits such as 4.5bit")]
WeightSamples = Annotated[int, typer.Option(help="UNet inputs that rounding is learned from")]
WeightRounds = Annotated[int, typer.Option(help="of learning; each samples with the weights of the one before")]
Skip = Annotated[
    list[str] | None,
    typer.Option(help="one more module path pattern that stays float; auto:4 for the four layers that need it most"),
]
LoraFiles = Annotated[
    list[str] | None, typer.Option("--lora", help="FILE[:SCALE], safetensors, fused into the model; may be repeated")
]
Iterations = Annotated[int, typer.Option(help="of --weights adaround, for each block")]
Parts = Annotated[
    str, typer.Option(help=f"weights of text encoders and VAE: {', '.join(PART_FORMS)}, as small as is safe")
]
StripEncoders = Annotated[
    bool, typer.Option("--strip-encoders", help="write the UNet alone: no text encoders, tokenizers or VAE")
]


@app.command(cls=ResumingCommand)
def export(
    model: Annotated[str, typer.Argument(help="catalog name (tiny-sdxl, sd15, sdxl, ...), hub id or diffusers folder")],
    out: Annotated[Path, typer.Option(help="parent of the output folder NAME-wXaY")] = Path("engines"),
    bits: Annotated[str, typer.Option(help="bits of weights and activations")] = "w8a8",
    steps: Annotated[int | None, typer.Option(help="denoising steps [default: the model's]")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="[default: the model's]")] = None,
    guidance_rescale: GuidanceRescale = None,
    scheduler: Scheduler = None,
    height: Annotated[str | None, typer.Option(help="pixels, or MIN:OPT:MAX [default: the model's]")] = None,
    width: Annotated[str | None, typer.Option(help="pixels, or MIN:OPT:MAX [default: the model's]")] = None,
    backend: Annotated[str, typer.Option(help=f"engines: {', '.join(BACKENDS)}")] = EngineSettings.backend,
    target: Annotated[str | None, typer.Option(help="GPUs of the engines, e.g. sm86,sm89,sm120")] = None,
    batch: Annotated[str, typer.Option(help="images per call of the engines, or MIN:OPT:MAX")] = "1",
    allow_float_fallback: Annotated[
        bool, typer.Option("--allow-float-fallback", help="keep an engine with layers that are not INT8")
    ] = EngineSettings.allow_float_fallback,
    onnx_only: Annotated[bool, typer.Option("--onnx-only", help="write graphs and build commands, no engine")] = False,
    calib_size: Annotated[int, typer.Option(help="calibration prompts (not batches)")] = Recipe.calib_size,
    calib_batch: Annotated[int | None, typer.Option(help="prompts of a call, for --reduce min-mean")] = None,
    prompts_file: Annotated[Path | None, typer.Option(help="calibration prompts, one a line")] = None,
    eval_prompts_file: Annotated[Path | None, typer.Option(help="prompts of the validation images")] = None,
    images: Annotated[int | None, typer.Option(help="validation images [default: by picture size]")] = None,
    scheme: Annotated[str, typer.Option(help=f"how scales are found: {', '.join(SCHEMES)}")] = Recipe.scheme,
    ranges: Annotated[str, typer.Option(help=f"range estimator: {', '.join(RANGES)}")] = Recipe.ranges,
    percentile: Annotated[float, typer.Option(help="of each end, for --ranges percentile")] = Recipe.percentile,
    affine: Affine = Recipe.affine,
    observed_steps: ObservedSteps = Recipe.observed_steps,
    reduce: Reduce = Recipe.reduce,
    smooth_quant: SmoothQuant = Recipe.smooth_quant,
    split_shortcut: SplitShortcut = Recipe.split_shortcut,
    first_token: FirstToken = Recipe.first_token,
    relax: Annotated[str | None, typer.Option(help="none, last:20%, 0:4,17, auto:8.4 [default: the model's]")] = None,
    relax_bits: Annotated[int, typer.Option(help="activation bits of relaxed steps, 9 to 16")] = Recipe.relax_bits,
    weights: Weights = Recipe.weights,
    keep: Keep = Recipe.keep,
    weight_samples: WeightSamples = Recipe.weight_samples,
    weight_rounds: WeightRounds = Recipe.weight_rounds,
    adaround_iterations: Iterations = Recipe.adaround_iterations,
    skip: Skip = None,
    lora: LoraFiles = None,
    seed: Annotated[int, typer.Option(help="of everything random")] = Recipe.seed,
    resume: Annotated[bool, typer.Option(help="go on from what an earlier run of this command finished")] = True,
    validate: Annotated[bool, typer.Option(help="compare the artifact with its simulation and with FP32")] = True,
    parts: Parts = PART_FORMS[0],
    strip_encoders: StripEncoders = False,
    dry_run: Annotated[bool, typer.Option(help="print the plan and stop")] = False,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="tell more, and show tracebacks")] = False,
) -> None:
    """Calibrate MODEL, write its INT8 ONNX and everything around it, validate it and report."""
    arguments = dict(locals())
    request = ExportRequest(**{name: value for name, value in arguments.items() if name not in ("dry_run", "verbose")})
    request.check()
    if dry_run:
        print_rows(request.plan_rows(), "plan")
        return
    _export(request, verbose)


def _export(request: ExportRequest, verbose: bool) -> None:
    with _importing():
        from pcr_export.export_pipeline import run_request
        from pcr_export.report import build_commands, summary_rows
    report = run_request(request, track=track, log=say if verbose else lambda _line: None)
    print_rows(summary_rows(report), str(request.folder()))
    if commands := build_commands(report):
        say("to build elsewhere:", *commands)


@contextlib.contextmanager
def _importing() -> Iterator[None]:
    with importing(), status("importing torch and diffusers"):
        yield


@app.command(cls=Command)
def generate(
    folder: Annotated[Path, typer.Argument(help="an exported folder, e.g. engines/tiny-sdxl-w8a8")],
    prompt: Annotated[str, typer.Argument(help="what to draw")],
    output: Annotated[Path, typer.Option("-o", "--output", help="the picture, PNG")] = Path("out.png"),
    seed: Annotated[int, typer.Option(help="of the noise")] = 0,
    steps: Annotated[int | None, typer.Option(help="[default: as calibrated]")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="[default: as calibrated]")] = None,
    guidance_rescale: GuidanceRescale = None,
    scheduler: Scheduler = None,
    negative_prompt: Annotated[str, typer.Option(help="what not to draw")] = "",
    engine: Annotated[str | None, typer.Option(help="GPU engine, e.g. sm89 [default: onnxruntime on the CPU]")] = None,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="show tracebacks")] = False,
) -> None:
    """Draw PROMPT with an exported folder alone."""
    check_output_file(output, "--output", ".png")
    with _importing():
        from pcr_export.deploy.run import generate as generate_image
        from pcr_export.qdiffbench.images import write_png
    with status(f"drawing with {folder}"):
        image = generate_image(
            folder,
            prompt,
            seed=seed,
            steps=steps,
            guidance_scale=guidance_scale,
            guidance_rescale=guidance_rescale,
            scheduler=scheduler,
            negative_prompt=negative_prompt,
            engine=engine,
        )
    write_png(image, output)
    say(str(output))


@app.command(cls=Command)
def compare(
    folder: Annotated[Path, typer.Argument(help="an export with --backend tensorrt-rtx or tensorrt")],
    target: Annotated[list[str] | None, typer.Option(help="one engine, e.g. sm89 [default: every one]")] = None,
    runs: Annotated[int, typer.Option(help="calls per figure of the timing", min=1)] = 20,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="show tracebacks")] = False,
) -> None:
    """Run both dialects of the UNet and, on a GPU, its engines on the same inputs: how far apart they are, and how fast."""
    with importing():
        from pcr_export.engines.compare import compare_folder, table_rows
        from pcr_export.manifest import check_finished
    check_finished(folder)
    print_rows(table_rows(compare_folder(folder, target or (), runs=runs, track=track)), str(folder))


@app.command(cls=ResumingCommand)
def evaluate(
    folder: Annotated[Path, typer.Argument(help="an exported folder, e.g. engines/tiny-sdxl-w8a8")],
    prompts: Annotated[list[Path] | None, typer.Option(help="prompt set, may be given again [default: own]")] = None,
    images: Annotated[int | None, typer.Option(help="of each prompt set, the first ones [default: all]")] = None,
    real: Annotated[Path | None, typer.Option(help="folder of real images, for FID to them")] = None,
    workers: Annotated[int, typer.Option(help="processes that paint, through Ray where more than 1")] = 1,
    threads: Annotated[int, typer.Option(help="of each worker; changes the last digits")] = 1,
    address: Annotated[str | None, typer.Option(help="HOST:PORT of a Ray cluster [default: this machine]")] = None,
    inception: Annotated[Path | None, typer.Option(help="InceptionV3 weights of torch-fidelity")] = None,
    clip: Annotated[str | None, typer.Option(help="CLIP that judges: hub id or folder [default: by model]")] = None,
    model: Annotated[str | None, typer.Option(help="the float model, if not where the recipe says")] = None,
    lora: LoraFiles = None,
    seed: Annotated[int | None, typer.Option(help="of the initial noise [default: the recipe's]")] = None,
    resume: Annotated[bool, typer.Option(help="keep images and scores that an earlier run finished")] = True,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="tell more, and show tracebacks")] = False,
) -> None:
    """Run QDiffBench on an exported folder: images of both models, their scores, evaluation.json and report.html."""
    with _importing():
        from pcr_export.models.lora_file import parse_loras
        from pcr_export.qdiffbench.evaluate import Evaluation, evaluate_folder, table_rows
        from pcr_export.qdiffbench.features import find_extractors
        from pcr_export.qdiffbench.workers import Workers
    evaluation = Evaluation(
        folder=folder,
        prompts=prompts or (),
        images=images,
        real=real,
        model=model,
        lora=parse_loras(lora),
        seed=seed,
        workers=Workers(count=workers, threads=threads, address=address),
        resume=resume,
        command=shlex.join(["pcr-export", *sys.argv[1:]]),
        track=track,
        log=say if verbose else lambda _line: None,
    )
    evaluation.domains()  # what is wrong with them is told before networks are fetched
    extractors = find_extractors(evaluation.source, inception=inception, clip=clip)
    result = evaluate_folder(evaluation, extractors)
    print_rows(table_rows(result), str(folder))


@app.command(cls=ResumingCommand)
def study(
    model: Annotated[str, typer.Argument(help="catalog name (tiny-sdxl, sd15, sdxl, ...), hub id or diffusers folder")],
    out: Annotated[Path, typer.Option(help="parent of the folder study-NAME")] = Path("engines"),
    json_file: Annotated[
        Path | None, typer.Option("--json", help="the table [default: study.json in that folder]")
    ] = None,
    schemes: Annotated[str | None, typer.Option(help="some of the schemes, separated by commas [default: all]")] = None,
    images: Annotated[int | None, typer.Option(help="of each prompt set, the first ones [default: all]")] = None,
    steps: Annotated[int | None, typer.Option(help="denoising steps [default: the model's]")] = None,
    calib_size: Annotated[int, typer.Option(help="calibration prompts (not batches)")] = Recipe.calib_size,
    prompts_file: Annotated[Path | None, typer.Option(help="calibration prompts")] = None,
    in_domain_file: Annotated[Path | None, typer.Option(help="prompts like those of the calibration")] = None,
    out_of_domain_file: Annotated[Path | None, typer.Option(help="prompts unlike those of the calibration")] = None,
    simulation_seeds: Annotated[int, typer.Option(help="calibrations whose simulation is scored beside")] = 0,
    calibration_sets: Annotated[bool, typer.Option("--calibration-sets", help="sizes and kinds of them")] = False,
    scale_bars: Annotated[bool, typer.Option("--scale-bars", help="FP16, and FP32 with other noise")] = False,
    workers: Annotated[int, typer.Option(help="processes that paint, through Ray where more than 1")] = 1,
    threads: Annotated[int, typer.Option(help="of each worker; changes the last digits")] = 1,
    address: Annotated[str | None, typer.Option(help="HOST:PORT of a Ray cluster [default: this machine]")] = None,
    inception: Annotated[Path | None, typer.Option(help="InceptionV3 weights of torch-fidelity")] = None,
    clip: Annotated[str | None, typer.Option(help="CLIP that judges: hub id or folder [default: by model]")] = None,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="tell more, and show tracebacks")] = False,
) -> None:
    """Run QDiffBench's table: every scheme on the same prompts and noise, each scored as an exported artifact."""
    with _importing():
        from pcr_export.qdiffbench.workers import Workers
        from pcr_export.study_table import StudyRequest, run_study, table_rows
    request = StudyRequest(
        model=model,
        out=out,
        json_file=json_file,
        schemes=tuple(name.strip() for name in schemes.split(",")) if schemes else (),
        images=images,
        steps=steps,
        calib_size=calib_size,
        prompts_file=prompts_file,
        in_domain_file=in_domain_file,
        out_of_domain_file=out_of_domain_file,
        simulation_seeds=simulation_seeds,
        calibration_sets=calibration_sets,
        scale_bars=scale_bars,
        workers=Workers(count=workers, threads=threads, address=address),
        inception=inception,
        clip=clip,
        command=shlex.join(["pcr-export", *sys.argv[1:]]),
    )
    content = run_study(request, track=track, log=say if verbose else lambda _line: None)
    print_rows(table_rows(content), str(request.folder))


app.command(cls=Command)(cli_folder.inspect)
app.command(cls=Command)(cli_folder.verify)


def main() -> None:
    """Run the program. Whatever goes wrong is one line on stderr and a non-zero exit; -v shows the traceback."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    for library in ("TRANSFORMERS", "DIFFUSERS"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    warnings.showwarning = show_warning
    escape_what_is_not_encoded()
    try:
        app()
    except SystemExit as end:
        code = end.code
    except BaseException as error:  # a panic of a library in Rust is no Exception
        code = _fail(error)
    unwritten = flush_or_forget()
    if unwritten and not code:
        code = _fail(unwritten)
    sys.exit(code)


def _fail(error: BaseException) -> int:
    if Command.verbose:
        say_traceback(error)
    line, code = explain(error)
    say_error(f"error: {line}")
    return code
