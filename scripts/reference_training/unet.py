"""Stage unet: the denoiser, on cached latents and contexts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from torch.nn import functional as F

from pcr_export.models.reference.drawing import PIXELS
from reference_training.configurations import build_scheduler, build_unet
from reference_training.latents import Examples
from reference_training.loop import Budget, Trainer
from reference_training.precision import autocast
from reference_training.probe import Reader
from reference_training.text import reading_loss

BATCH = 64
TEACHING = 0.02  # weight of the teacher's cross-entropy
TAUGHT_ABOVE = 0.05  # signal-to-noise ratio below which the predicted clean latents say too little
DROPPED = 0.1  # share of examples without a prompt, for classifier-free guidance
SNR_LIMIT = 5.0  # Hang et al. 2023, min-SNR weighting


def train_unet(examples: Examples, folder: Path, device: torch.device, steps: int, teacher: Reader) -> None:
    """Train the denoiser; its checkpoint holds the averaged weights.

    The cross-entropy of the teacher, a frozen reader of latents, on the predicted clean latents joins the loss.
    """
    unet = build_unet().to(device, memory_format=torch.channels_last)
    trainer = Trainer("unet", unet, Budget(steps, 1e-3, averaging=0.998, decay_from=0.5), folder)
    alphas = build_scheduler().alphas_cumprod.to(device)

    def loss_at(step: int) -> tuple[torch.Tensor, dict[str, float]]:
        rng = np.random.default_rng([8, step])
        latents, contexts, pooled, labels = examples.batch(rng, BATCH, device)
        kept = torch.from_numpy(rng.random(BATCH) >= DROPPED).to(device)
        timesteps = stratified_timesteps(rng, BATCH).to(device)
        noise = torch.from_numpy(rng.standard_normal(latents.shape, dtype=np.float32)).to(device)
        alpha = alphas[timesteps][:, None, None, None]
        noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
        with autocast(device):
            predicted = predict_noise(unet, noisy, timesteps, contexts * kept[:, None, None], pooled * kept[:, None])
        snr = (alpha / (1 - alpha))[:, 0, 0, 0]
        error = F.mse_loss(predicted.float(), noise, reduction="none").mean((1, 2, 3))
        loss = (error * (SNR_LIMIT / snr).clamp(max=1)).mean()
        clean = (noisy - (1 - alpha).sqrt() * predicted.float()) / alpha.sqrt()
        shown = kept & (snr > TAUGHT_ABOVE)
        lesson, right = reading_loss(teacher(clean[shown]), labels[shown])
        return loss + TEACHING * lesson, {"error": float(error.detach().mean()), "right": right}

    trainer.train(loss_at)


def predict_noise(
    unet: UNet2DConditionModel,
    noisy: torch.Tensor,
    timesteps: torch.Tensor,
    contexts: torch.Tensor,
    pooled: torch.Tensor,
) -> torch.Tensor:
    """Call the denoiser as StableDiffusionXLPipeline does: original size, crop at (0, 0), target size in pixels."""
    sizes = torch.tensor([PIXELS, PIXELS, 0, 0, PIXELS, PIXELS], device=noisy.device, dtype=noisy.dtype)
    added = {"text_embeds": pooled, "time_ids": sizes.expand(len(noisy), -1)}
    return unet(noisy, timesteps, contexts, added_cond_kwargs=added, return_dict=False)[0]


def stratified_timesteps(rng: np.random.Generator, count: int) -> torch.Tensor:
    """Draw int64 [count] timesteps from 0 to 999, one from each of `count` equal intervals, in random order."""
    places = (np.arange(count) + rng.random(count)) / count * 1000
    return torch.from_numpy(rng.permutation(places.astype(np.int64)))
