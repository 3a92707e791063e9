"""Stage probe: two small convolutional readers of attributes, one of pictures (the judge) and one of latents (a teacher)."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from pcr_export.models.reference.scenes import ABSENT
from reference_training.loop import Budget, Trainer, write_weights
from reference_training.pictures import Pictures
from reference_training.text import SIZES_OF_ATTRIBUTES, reading_loss

Batches = Callable[[np.random.Generator], tuple[torch.Tensor, torch.Tensor]]


class Reader(nn.Module):
    """Convolutions with stride 2 down to 4 x 4, then one hidden layer: images to the logits of all attributes, [B, 47]."""

    def __init__(self, channels: int, widths: tuple[int, ...]) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(channels, widths[0], 3, padding=1), nn.SiLU()]
        for before, after in pairwise(widths):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GroupNorm(8, after), nn.SiLU()]
        self.body = nn.Sequential(*layers, nn.Conv2d(widths[-1], 64, 1), nn.SiLU(), nn.Flatten())
        self.head = nn.Sequential(nn.Linear(64 * 16, 256), nn.SiLU(), nn.Linear(256, sum(SIZES_OF_ATTRIBUTES)))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Read float32 [B, C, H, W]."""
        return self.head(self.body(images))


def image_probe() -> Reader:
    """Build the judge, which reads pictures [B, 3, 64, 64]."""
    return Reader(3, (16, 32, 64, 96, 128))


def latent_probe() -> Reader:
    """Build the teacher, which reads standardised latents [B, 4, 16, 16]."""
    return Reader(4, (32, 64, 128))


def train_probe(name: str, probe: Reader, batches: Batches, folder: Path, steps: int, noise: float) -> None:
    """Train a reader on real renders, spoiled by noise whose standard deviation is drawn between 0 and `noise`."""
    trainer = Trainer(name, probe, Budget(steps, 2e-3, averaging=0.99), folder)

    def loss_at(step: int) -> tuple[torch.Tensor, dict[str, float]]:
        images, labels = batches(np.random.default_rng([5, step]))
        images = images + noise * torch.rand(len(images), 1, 1, 1, device=images.device) * torch.randn_like(images)
        loss, right = reading_loss(probe(images), labels)
        return loss, {"all_right": right}

    trainer.train(loss_at)
    trainer.load_average()
    write_weights(name, probe, folder)


def picture_batches(pictures: Pictures, device: torch.device, size: int = 64) -> Batches:
    """Draw batches of rendered pictures, half of them softened as a decoder softens."""

    def draw(rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        images, labels = pictures.batch(rng, size)
        soft = F.avg_pool2d(images[: size // 2], 3, 1, 1, count_include_pad=False)
        return torch.cat([soft, images[size // 2 :]]).to(device), labels.to(device)

    return draw


def score_pictures(logits: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """Compare a probe's logits [N, 47] with the labels [N, 9] that were asked for; shares from 0 to 1.

    A relation counts as right where the layout is right and the two objects fit their own places better than each other's.
    """
    parts = [part.log_softmax(1) for part in logits.split(SIZES_OF_ATTRIBUTES, 1)]
    right = torch.stack([part.argmax(1) for part in parts], 1) == labels
    pair = labels[:, 4] != ABSENT
    layout = parts[0].argmax(1)
    slots = torch.stack([right[:, 1:4], right[:, 4:7]], 1)  # [N, 2, 3]
    there = torch.stack([torch.ones_like(pair), pair], 1)
    shape, colour, size = slots[there].float().mean(0).tolist()
    fits = _fit(parts, labels, (0, 1)) > _fit(parts, labels, (1, 0))
    return {
        "count": float(((layout != 0) == pair).float().mean()),
        "colour": colour,
        "size": size,
        "shape": shape,
        "relation": float((right[:, 0] & fits)[pair].float().mean()),
        "background": float(right[:, 7].float().mean()),
        "pattern": float(right[:, 8].float().mean()),
    }


def _fit(parts: list[torch.Tensor], labels: torch.Tensor, order: tuple[int, int]) -> torch.Tensor:
    """Log-likelihood [N] that the places hold the asked objects in this order."""
    total = torch.zeros(len(labels), device=labels.device)
    for place, item in enumerate(order):
        for attribute in range(3):
            target = labels[:, 1 + 3 * item + attribute].clamp(min=0)
            total += parts[1 + 3 * place + attribute].gather(1, target[:, None])[:, 0]
    return total
