"""Stage evaluate: follow held-out prompts and let the probe say what came out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image, ImageDraw

from pcr_export.models.reference.captions import write_caption, write_short_caption
from pcr_export.models.reference.scenes import draw_scene, scene_labels
from reference_training.probe import Reader, score_pictures

STEPS = 20
GUIDANCE = 4.5
BATCH = 64
GOALS = {"count": 0.9, "colour": 0.9, "size": 0.8, "shape": 0.6, "relation": 0.7, "background": 0.9, "pattern": 0.9}


@dataclass(frozen=True)
class HeldOut:
    """Captions of held-out scenes and the attributes asked for, int64 [N, 9]."""

    captions: list[str]
    labels: torch.Tensor


def held_out_prompts(count: int, seed: int) -> HeldOut:
    """Draw scenes that no training stage has seen, and caption them."""
    rng = np.random.default_rng(seed)
    scenes = [draw_scene(rng, held_out=True) for _ in range(count)]
    return HeldOut([write_caption(scene, rng) for scene in scenes], torch.tensor([scene_labels(s) for s in scenes]))


def short_prompts(count: int, seed: int) -> HeldOut:
    """Draw scenes and caption them without sizes, without the background, or without both."""
    rng = np.random.default_rng(seed)
    captions, meant = zip(
        *(write_short_caption(draw_scene(rng, held_out=True), rng) for _ in range(count)), strict=True
    )
    return HeldOut(list(captions), torch.tensor([scene_labels(scene) for scene in meant]))


@torch.no_grad()
def generate(pipeline: StableDiffusionXLPipeline, captions: list[str], guidance: float = GUIDANCE) -> torch.Tensor:
    """Sample one picture per caption with 20 Euler steps: float32 [N, 3, 64, 64] from 0 to 1; picture i has seed i."""
    pipeline.set_progress_bar_config(disable=True)
    pictures = []
    for start in range(0, len(captions), BATCH):
        part = captions[start : start + BATCH]
        seeds = [torch.Generator().manual_seed(start + i) for i in range(len(part))]
        made = pipeline(
            part,
            height=64,
            width=64,
            num_inference_steps=STEPS,
            guidance_scale=guidance,
            generator=seeds,
            output_type="pt",
        )
        pictures.append(made.images.float().cpu())
    return torch.cat(pictures)


def evaluate(
    pipeline: StableDiffusionXLPipeline, probe: Reader, held_out: HeldOut
) -> tuple[dict[str, float], torch.Tensor]:
    """Return the probe's scores of the pictures made for held-out prompts, and the pictures."""
    pictures = generate(pipeline, held_out.captions)
    with torch.no_grad():
        logits = torch.cat([probe(part * 2 - 1) for part in pictures.split(BATCH)])
    return score_pictures(logits, held_out.labels), pictures


def draw_samples(pictures: torch.Tensor, captions: list[str], path: Path, columns: int = 8) -> None:
    """Write a PNG of the pictures, twice their size, each over its caption."""
    cell, text = 176, 52
    rows = -(-len(captions) // columns)
    sheet = Image.new("RGB", (columns * cell, rows * (128 + text)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        x, y = i % columns * cell, i // columns * (128 + text)
        pixels = (picture.permute(1, 2, 0).numpy() * 255 + 0.5).astype(np.uint8)
        sheet.paste(Image.fromarray(pixels).resize((128, 128), Image.Resampling.NEAREST), (x + (cell - 128) // 2, y))
        draw.multiline_text((x + 4, y + 130), wrap(caption), fill="black", font_size=10, spacing=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.quantize(256).save(path, optimize=True)


def wrap(caption: str, width: int = 34) -> str:
    """Break a caption into lines of at most `width` characters."""
    lines = [""]
    for word in caption.split():
        if len(lines[-1]) + len(word) >= width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)
