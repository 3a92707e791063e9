"""Text encoders and VAE with float16 and INT8 weights: bytes, error of their outputs, and what is left of the images.

    python benchmarks/smaller_parts.py --json FILE

The reference model as an exported folder with its float32 UNet, so that nothing but these parts differs from the float model: PSNR of
its images to those of the same folder with float32 parts. Then, with random weights at full size, what onnxruntime takes for SDXL's first
text encoder (two prompts) and its VAE decoder (128 x 128 pixels): bytes of the files, memory, and time of a call beside float32's.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnx_ir as ir
import torch
import typer
from diffusers import AutoencoderKL
from rich.console import Console
from rich.table import Table
from transformers import CLIPTextConfig, CLIPTextModel

from pcr_export.deploy.folder import write_pipeline_folder
from pcr_export.deploy.onnx_parts import export_text_encoder, export_vae_decoder
from pcr_export.deploy.smaller_parts import part_inputs, shrink_parts, store_smaller
from pcr_export.engines.onnxruntime import OnnxRuntimeEngine
from pcr_export.engines.session_memory import measure_memory
from pcr_export.export_pipeline import PARTS_PROMPTS
from pcr_export.graph.to_onnx import export_float_onnx, save_model
from pcr_export.graph.weight_file import onnx_files
from pcr_export.models.catalog import resolve
from pcr_export.models.denoiser import sample
from pcr_export.models.load import load_model
from pcr_export.prompts import REFERENCE, own_prompt_sets, prompt_seeds, read_prompts
from pcr_export.qdiffbench.distances import psnr_db
from pcr_export.qdiffbench.painters import FolderPainter
from pcr_export.request import PART_FORMS
from pcr_export.write_files import write_json

CALLS = 5  # of which the median counts


def paint(folder: Path, prompts: list[str], threads: int) -> np.ndarray:
    """Images of the folder's own networks, uint8 [prompts, height, width, 3]."""
    with FolderPainter(folder=folder).open(threads) as painter:
        return painter(prompts, prompt_seeds(prompts, 0))


def text_encoder() -> CLIPTextModel:
    """CLIP ViT-L/14's text tower, random."""
    sizes = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    return CLIPTextModel(CLIPTextConfig(**sizes, projection_dim=768)).eval()


def autoencoder() -> AutoencoderKL:
    """SDXL's VAE, random."""
    levels = 4
    return AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
    ).eval()


def full_size_rows(folder: Path, threads: int) -> list[dict[str, Any]]:
    """Bytes, memory and milliseconds of each form of both parts."""
    torch.manual_seed(0)
    latents = np.random.default_rng(0).standard_normal((1, 4, 16, 16)).astype(np.float32)
    feeds = {"text_encoder": {"input_ids": np.zeros((2, 77), np.int64)}, "vae_decoder": {"latent_sample": latents}}
    export_text_encoder(text_encoder(), 77, folder / "text_encoder" / PART_FORMS[0] / "model.onnx")
    export_vae_decoder(autoencoder(), folder / "vae_decoder" / PART_FORMS[0] / "model.onnx")
    rows = []
    for name, feed in feeds.items():
        for form in PART_FORMS:
            path = folder / name / form / "model.onnx"
            if form != PART_FORMS[0]:
                model = ir.load(path.parents[1] / PART_FORMS[0] / "model.onnx")
                store_smaller(model, form)
                save_model(model, path)
            with OnnxRuntimeEngine(path, threads=threads) as engine:
                milliseconds = engine.latency(feed, CALLS).p50
            size = sum(file.stat().st_size for file in onnx_files(path))
            memory = measure_memory(path, feed, threads)
            rows.append(
                {"part": name, "form": form, "bytes": size, "memory_bytes": memory, "milliseconds": milliseconds}
            )
    return rows


def show_full_size(rows: list[dict[str, Any]]) -> None:
    """Each form beside its part's float32."""
    table = Table("part", "form", "file, MB", "memory, MB", "times fp32's time")
    floats = {row["part"]: row["milliseconds"] for row in rows if row["form"] == PART_FORMS[0]}
    for row in rows:
        sizes = (f"{row[name] / 1e6:.0f}" for name in ("bytes", "memory_bytes"))
        table.add_row(row["part"], row["form"], *sizes, f"{row['milliseconds'] / floats[row['part']]:.2f}")
    Console().print(table)


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
    with tempfile.TemporaryDirectory() as scratch:
        full_size = full_size_rows(Path(scratch), threads)
    show_full_size(full_size)
    if json_file:
        write_json(json_file, {"images": images, "threads": threads, "rows": rows, "full_size": full_size})


if __name__ == "__main__":
    typer.run(main)
