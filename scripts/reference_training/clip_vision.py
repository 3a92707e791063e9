"""Stage vision: an image tower for the CLIP score and the Frechet features, tuned to the locked text tower (Zhai et al. 2022, LiT)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from pcr_export.models.reference.captions import write_caption
from pcr_export.models.reference.scenes import scene_from_labels
from reference_training.configurations import build_clip_vision
from reference_training.loop import Budget, Trainer, write_weights
from reference_training.pictures import Pictures
from reference_training.text import TextTowers, contrastive_loss, reading_loss, tokenize

BATCH = 64


def train_vision(pictures: Pictures, towers: TextTowers, folder: Path, device: torch.device, steps: int) -> None:
    """Train the image tower so that a picture's embedding is its caption's.

    Besides the contrast, the embedding is read along the text tower's own fixed directions, which tells the tower at once
    which attributes matter.
    """
    vision = build_clip_vision().to(device)
    trainer = Trainer("vision", vision, Budget(steps, 1e-3, averaging=0.99, decay_from=0.3), folder)

    def loss_at(step: int) -> tuple[torch.Tensor, dict[str, float]]:
        rng = np.random.default_rng([9, step])
        images, labels = (part.to(device) for part in pictures.batch(rng, BATCH))
        captions = [write_caption(scene_from_labels(row), rng) for row in labels.tolist()]
        with torch.no_grad():
            ids = tokenize(captions, folder / "pipeline")
            target = towers.context(*(part.to(device) for part in ids))[1]
        images = images + 0.1 * torch.rand(len(images), 1, 1, 1, device=device) * torch.randn_like(images)
        embedding = vision(images).image_embeds
        read, right = reading_loss(embedding @ towers.pooled_directions.T, labels)
        contrast = contrastive_loss(torch.cat([F.normalize(embedding, dim=-1), F.normalize(target, dim=-1)]))
        near = F.mse_loss(embedding, target)
        return contrast + read + 0.5 * near, {"contrast": float(contrast.detach()), "all_right": right}

    trainer.train(loss_at)
    trainer.load_average()
    write_weights("vision", vision, folder)
