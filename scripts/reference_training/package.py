"""Stage package: the parts as one diffusers folder in FP16."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPVisionModelWithProjection

from pcr_export.models.reference.drawing import PIXELS
from reference_training.configurations import build_scheduler
from reference_training.text import TextTowers
from reference_training.tokenizer import load_tokenizers

BYTES_ALLOWED = 20_000_000
PREPROCESSING = {
    "image_processor_type": "CLIPImageProcessor",
    "do_resize": True,
    "size": {"shortest_edge": PIXELS},
    "do_center_crop": False,
    "do_rescale": True,
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}


def assemble(
    folder: Path, vae: AutoencoderKL, towers: TextTowers, unet: UNet2DConditionModel
) -> StableDiffusionXLPipeline:
    """Put the parts into a pipeline as they are."""
    narrow, wide = load_tokenizers(folder / "pipeline")
    return StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=towers.narrow,
        text_encoder_2=towers.wide,
        tokenizer=narrow,
        tokenizer_2=wide,
        unet=unet,
        scheduler=build_scheduler(),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )


def write_package(
    folder: Path, target: Path, pipeline: StableDiffusionXLPipeline, vision: CLIPVisionModelWithProjection | None
) -> int:
    """Write the pipeline and the image tower in FP16 below `target`, and return the bytes that they take.

    The folder is made beside its place and then moved; a README.md that is there stays.
    """
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    pipeline.to(dtype=torch.float16).save_pretrained(partial)
    if vision is not None:
        vision.half().save_pretrained(partial / "clip_vision")
        (partial / "clip_vision" / "preprocessor_config.json").write_text(json.dumps(PREPROCESSING, indent=1) + "\n")
    for name in ("tokenizer", "tokenizer_2"):
        for file in ("vocab.json", "merges.txt"):
            shutil.copyfile(folder / "pipeline" / name / file, partial / name / file)
    if (target / "README.md").exists():
        shutil.copyfile(target / "README.md", partial / "README.md")
    shutil.rmtree(target, ignore_errors=True)
    os.replace(partial, target)
    total = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    if total > BYTES_ALLOWED:
        raise ValueError(f"{target} takes {total} bytes, more than {BYTES_ALLOWED}: make a part smaller")
    return total
