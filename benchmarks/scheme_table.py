"""How scales are found, measured on exported artifacts: static, per step, progressive, progressive + relaxed.

    python benchmarks/scheme_table.py --model tiny-sdxl --images 512 --out engines/schemes --json FILE

Every row writes the UNet with another recipe, draws the same prompts from the same noise on onnxruntime, and scores the images
against those of the float model. Stops and goes on where it was stopped.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from pcr_export.cli import track
from pcr_export.export import quantize_denoiser
from pcr_export.export_pipeline import judge_images, pipeline_job
from pcr_export.models.catalog import resolve
from pcr_export.models.load import load_model
from pcr_export.prompts import packaged_prompts, read_prompts
from pcr_export.recipe import Recipe
from pcr_export.stages import write_json

SCHEMES: dict[str, dict[str, Any]] = {
    "static, min-max over all steps": {"scheme": "static", "ranges": "minmax"},
    "static, MSE over all steps": {"scheme": "static"},
    "per step, float trajectories": {"scheme": "float-trajectory"},
    "progressive, one pass": {},
    "progressive, observe then advance": {"calib_batch": 32},
    "progressive + first 20 % at 10 bit": {"relax": "first:20%"},
    "progressive + last 20 % at 10 bit": {"relax": "last:20%"},
    "progressive + all steps at 10 bit": {"relax": "first:100%"},
}
COLUMNS = ("fid_to_fp32", "clip_score", "clip_score_fp32", "psnr_db")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One scheme's scores."""

    scheme: str
    recipe: dict[str, Any]
    quality: dict[str, Any]


def measure(model_name: str, images: int, out: Path, seed: int, changes: dict[str, Any]) -> list[Row]:
    """One row per scheme. All share one folder, so the float graph and the float images are made once."""
    model = load_model(resolve(model_name))
    calibration, evaluation = (read_prompts(packaged_prompts(name)) for name in ("tiny-sdxl", "tiny-sdxl-eval"))
    entry = model.entry
    base = Recipe(
        model=model_name,
        num_inference_steps=int(entry.num_inference_steps or 0),
        guidance_scale=float(entry.guidance_scale or 0),
        height=int(entry.height or 0),
        width=int(entry.width or 0),
        seed=seed,
        **changes,
    )
    rows = []
    for name, settings in SCHEMES.items():
        recipe = replace(base, **settings)
        job = replace(pipeline_job(model, recipe, calibration, out), track=track)
        quality = judge_images(job, quantize_denoiser(job), Path(entry.source), evaluation[:images])
        rows.append(Row(scheme=name, recipe=vars(recipe), quality=quality))
    return rows


def main(
    model: str = "tiny-sdxl",
    images: int = 512,
    out: Path = Path("engines/schemes"),
    seed: int = 0,
    changes: Annotated[str, typer.Option(help='settings of every row as JSON, e.g. {"affine": false}')] = "{}",
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    """Measure and print the table."""
    rows = measure(model, images, out, seed, json.loads(changes))
    table = Table(title=f"{model}, {images} images, extractor {rows[0].quality['protocol']['extractor']}")
    for column in ("scheme", "Frechet to FP32", "CLIP", "CLIP FP32", "PSNR dB"):
        table.add_column(column, justify="left" if column == "scheme" else "right")
    for row in rows:
        table.add_row(row.scheme, *(f"{row.quality[c]:.{4 if c == 'fid_to_fp32' else 2}f}" for c in COLUMNS))
    Console().print(table)
    if json_file:
        write_json(json_file, [vars(row) for row in rows])


if __name__ == "__main__":
    typer.run(main)
