"""Text encoders and VAE with float16 and INT8 weights: bytes, error of their outputs, and what is left of the images.

    python benchmarks/smaller_parts.py --json FILE

The reference model as an exported folder with its float32 UNet, so that nothing but these parts differs from the float model: PSNR of
its images to those of the same folder with float32 parts.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

from pcr_export.deploy.folder import write_pipeline_folder
from pcr_export.deploy.smaller_parts import part_inputs, shrink_parts
from pcr_export.export_pipeline import PARTS_PROMPTS
from pcr_export.graph.to_onnx import export_float_onnx
from pcr_export.models.catalog import resolve
from pcr_export.models.denoiser import sample
from pcr_export.models.load import load_model
from pcr_export.prompts import REFERENCE, own_prompt_sets, prompt_seeds, read_prompts
from pcr_export.qdiffbench.distances import psnr_db
from pcr_export.qdiffbench.painters import FolderPainter
from pcr_export.request import PART_FORMS
from pcr_export.stages import write_json


def paint(folder: Path, prompts: list[str], threads: int) -> np.ndarray:
    """Images of the folder's own networks, uint8 [prompts, height, width, 3]."""
    with FolderPainter(folder=folder).open(threads) as painter:
        return painter(prompts, prompt_seeds(prompts, 0))


def main(
    images: Annotated[int, typer.Option(help="of each form")] = 64,
    threads: Annotated[int, typer.Option(help="of each session")] = 1,
    json_file: Annotated[Path | None, typer.Option("--json", help="where the rows are kept")] = None,
) -> None:
    """Measure every form, then show and keep the table."""
    model, sets = load_model(resolve(REFERENCE)), own_prompt_sets(REFERENCE)
    denoiser, prompts = model.denoiser(), read_prompts(sets.in_domain)[:images]
    measured = read_prompts(sets.calibration)[:PARTS_PROMPTS]
    latents = sample(denoiser, denoiser, measured, prompt_seeds(measured, 0))
    inputs = part_inputs(model.pipeline, measured, latents)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        base = Path(scratch) / PART_FORMS[0]
        write_pipeline_folder(model.pipeline, base)
        export_float_onnx(denoiser, next(denoiser.walk(measured[:2], [0, 1])), base / "unet" / "model.onnx")
        expected = torch.from_numpy(paint(base, prompts, threads))
        for form in PART_FORMS[1:]:
            folder = Path(shutil.copytree(base, Path(scratch) / form))
            parts = shrink_parts(folder, form, inputs, lambda _count: None)
            psnr = psnr_db(torch.from_numpy(paint(folder, prompts, threads)), expected)
            sizes = {name: sum(part[name] for part in parts.values()) for name in ("bytes", "float_bytes")}
            rows.append(
                {"form": form, "parts": parts, **sizes, "psnr_db": float(np.mean(psnr)), "worst_psnr_db": min(psnr)}
            )
    table = Table("form", "bytes, of float32's", "least dB of a part", "PSNR dB", "worst")
    for row in rows:
        decibels = [part["sqnr_db"][row["form"]] for part in row["parts"].values()]
        least = "exact" if None in decibels else f"{min(decibels):.1f}"
        share = f"{row['bytes'] / row['float_bytes']:.2f}"
        table.add_row(row["form"], share, least, f"{row['psnr_db']:.1f}", f"{row['worst_psnr_db']:.1f}")
    Console().print(table)
    if json_file:
        write_json(json_file, {"images": images, "rows": rows})


if __name__ == "__main__":
    typer.run(main)
