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
COARSE = 0.25  # weight of the coarse part of the error
OFFSET = 0.15  # standard deviation of the noise's mean per channel
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
        noise = offset_noise(rng, latents.shape).to(device)
        alpha = alphas[timesteps][:, None, None, None]
        noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
        with autocast(device):
            predicted = predict_noise(unet, noisy, timesteps, contexts * kept[:, None, None], pooled * kept[:, None])
        predicted, snr = predicted.float(), (alpha / (1 - alpha))[:, 0, 0, 0]
        error, loss = noise_loss(predicted, noise, snr)
        clean = (noisy - (1 - alpha).sqrt() * predicted) / alpha.sqrt()
        shown = kept & (snr > TAUGHT_ABOVE)
        lesson, right = reading_loss(teacher(clean[shown]), labels[shown])
        return loss + TEACHING * lesson, {"error": error, "right": right}

    trainer.train(loss_at)


def noise_loss(predicted: torch.Tensor, noise: torch.Tensor, snr: torch.Tensor) -> tuple[float, torch.Tensor]:
    """Return (mean square error, loss) of [B, 4, 16, 16]: the error and its coarse part, weighted by min(SNR, 5) / SNR.

    The coarse part is the error averaged over 4 x 4 latents, where the colour of the background is decided.
    """
    difference = predicted - noise
    fine = difference.square().mean((1, 2, 3))
    coarse = 16 * F.avg_pool2d(difference, 4).square().mean((1, 2, 3))  # white errors: as large as `fine`
    loss = ((fine + COARSE * coarse) * (SNR_LIMIT / snr).clamp(max=1)).mean()
    return float(fine.detach().mean()), loss


def offset_noise(rng: np.random.Generator, shape: torch.Size) -> torch.Tensor:
    """Draw float32 noise whose mean varies a little from channel to channel, as SDXL was trained.

    The noisiest training image still shows the mean of the clean one; a sampler starts from noise that does not. With the
    offset that trace cannot be trusted, and the denoiser takes the colour of the background from the caption.
    """
    white = rng.standard_normal(shape, dtype=np.float32)
    return torch.from_numpy(white + OFFSET * rng.standard_normal((*shape[:2], 1, 1), dtype=np.float32))


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
