"""What the evaluation is to be read against: the same judges on real held-out renders and on their reconstructions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch.nn import functional as F
from transformers import CLIPVisionModelWithProjection

from pcr_export.models.reference.captions import write_caption
from pcr_export.models.reference.scenes import scene_from_labels
from reference_training.pictures import as_images, render
from reference_training.probe import Reader, score_pictures
from reference_training.text import TextTowers, tokenize

Scores = dict[str, float]


@torch.no_grad()
def score_renders(probe: Reader, vae: AutoencoderKL, count: int) -> dict[str, Scores]:
    """Score the probe on held-out renders and on what the autoencoder makes of them, with its PSNR in dB."""
    drawn = render(count, 21, held_out=True)
    images, labels = as_images(drawn.pixels), torch.from_numpy(drawn.labels)
    again = torch.cat([vae.decode(vae.encode(part).latent_dist.mean).sample for part in images.split(32)]).clamp(-1, 1)
    psnr = float(10 * torch.log10(4 / (again - images).square().mean()))
    return {
        "renders": score_pictures(probe(images), labels),
        "reconstructions": {**score_pictures(probe(again), labels), "psnr_db": psnr},
    }


@torch.no_grad()
def score_clip(vision: CLIPVisionModelWithProjection, towers: TextTowers, pipeline: Path, count: int) -> Scores:
    """Compare held-out renders with captions: mean cosine with their own and others', and how often their own wins."""
    drawn = render(count, 22, held_out=True)
    rng = np.random.default_rng(23)
    captions = [write_caption(scene_from_labels(row), rng) for row in drawn.labels]
    text = towers.context(*tokenize(captions, pipeline))[1]
    image = vision(as_images(drawn.pixels)).image_embeds
    cosines = F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T
    own = cosines.diagonal()
    others = (cosines.sum() - own.sum()) / (count * (count - 1))
    wins = cosines.argmax(1) == torch.arange(count)
    return {"own": float(own.mean()), "others": float(others), "retrieved": float(wins.float().mean())}
