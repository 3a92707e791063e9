"""Stage latents: everything that the denoiser learns from, computed once: latents, text contexts, pooled embeddings, labels."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from pcr_export.models.reference.captions import write_caption
from pcr_export.models.reference.scenes import scene_from_labels
from reference_training.configurations import SCALING_FACTOR
from reference_training.pictures import SEED, as_images, render
from reference_training.probe import Batches
from reference_training.text import TextTowers, tokenize

SHARD = 5000  # scenes


@dataclass(frozen=True)
class Examples:
    """float16 latents [N, 4, 16, 16] (unit variance), contexts [N, 24, 256], pooled [N, 128]; int64 labels [N, 9]."""

    latents: torch.Tensor
    contexts: torch.Tensor
    pooled: torch.Tensor
    labels: torch.Tensor

    def batch(self, rng: np.random.Generator, size: int, device: torch.device) -> list[torch.Tensor]:
        """Draw `size` examples: float32 latents, contexts, pooled, and labels."""
        rows = torch.from_numpy(rng.integers(len(self.latents), size=size))
        return [part[rows].to(device).float() for part in (self.latents, self.contexts, self.pooled)] + [
            self.labels[rows].to(device)
        ]


@torch.no_grad()
def write_shard(index: int, vae: AutoencoderKL, towers: TextTowers, folder: Path, device: torch.device) -> None:
    """Render, encode and caption the training scenes of one shard, unless it is there already."""
    path = folder / "latents" / f"{index:03d}.safetensors"
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    pictures = render(SHARD, SEED + 1 + index, held_out=False)
    rng = np.random.default_rng([6, index])
    captions = [write_caption(scene_from_labels(row), rng) for row in pictures.labels]
    latents, contexts, pooled = [], [], []
    for start in range(0, SHARD, 50):
        images = as_images(pictures.pixels[start : start + 50]).to(device)
        latents.append(vae.encode(images).latent_dist.mean * SCALING_FACTOR)
        ids = tokenize(captions[start : start + 50], folder / "pipeline")
        context, pool = towers.context(*(part.to(device) for part in ids))
        contexts.append(context)
        pooled.append(pool)
    tensors = {"latents": torch.cat(latents), "contexts": torch.cat(contexts), "pooled": torch.cat(pooled)}
    half = {name: value.half().cpu().contiguous() for name, value in tensors.items()}
    partial = path.with_suffix(".partial")
    save_file({**half, "labels": torch.from_numpy(pictures.labels)}, partial)
    os.replace(partial, path)


def read_shards(folder: Path) -> Examples:
    """Load every shard into memory."""
    shards = [load_file(path) for path in sorted((folder / "latents").glob("*.safetensors"))]
    names = ("latents", "contexts", "pooled", "labels")
    return Examples(*(torch.cat([shard[name] for shard in shards]) for name in names))


def latent_batches(examples: Examples, device: torch.device, size: int = 128) -> Batches:
    """Draw batches of latents and labels for a reader of latents."""

    def draw(rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        rows = torch.from_numpy(rng.integers(len(examples.latents), size=size))
        return examples.latents[rows].float().to(device), examples.labels[rows].to(device)

    return draw
