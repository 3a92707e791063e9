"""Stage vae: pixels to latents and back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch.nn import functional as F

from reference_training.configurations import SCALING_FACTOR, build_vae
from reference_training.loop import Budget, Trainer, write_weights
from reference_training.pictures import Pictures
from reference_training.precision import autocast

BATCH = 8
COLOUR_UNTIL = 0.3  # share of the steps in which latents 0 to 2 are pulled towards the pooled picture


def train_vae(pictures: Pictures, folder: Path, device: torch.device, steps: int) -> None:
    """Train the autoencoder, then standardise its latents by folding."""
    vae = build_vae().to(device, memory_format=torch.channels_last)
    trainer = Trainer("vae", vae, Budget(steps, 1.5e-3, averaging=0.995, decay_from=0.4), folder)

    def loss_at(step: int) -> tuple[torch.Tensor, dict[str, float]]:
        images, _ = pictures.batch(np.random.default_rng([1, step]), BATCH)
        images = images.to(device, memory_format=torch.channels_last)
        with autocast(device):
            posterior = vae.encode(images).latent_dist
            latents = posterior.mean + 0.02 * torch.randn_like(posterior.mean)
            output = vae.decode(latents).sample
        loss, error = reconstruction_loss(output.float(), images)
        mean = posterior.mean.float()
        if step < COLOUR_UNTIL * steps:
            loss = loss + 0.5 * F.mse_loss(mean[:, :3], F.avg_pool2d(images, 4))
        loss = loss + 1e-3 * mean.square().mean()
        return loss, {"psnr": float(10 * torch.log10(4 / error.detach()))}

    trainer.train(loss_at)
    trainer.load_average()
    fold_standardisation(vae.eval(), pictures, device)
    write_weights("vae", vae, folder)


def reconstruction_loss(output: torch.Tensor, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (loss, mean square error): L1 weighted 1 to 5 by the edges, plus the square error at full and low resolution."""
    error = output - images
    edges = (images - F.avg_pool2d(images, 5, 1, 2, count_include_pad=False)).abs().amax(1, keepdim=True)
    weight = 1 + 4 * (edges / 0.3).clamp(max=1)
    square = error.square().mean()
    low = F.avg_pool2d(error, 8).square().mean()
    return (weight * error.abs()).mean() + 2 * (weight * error.square()).mean() + 2 * low, square


@torch.no_grad()
def fold_standardisation(vae: AutoencoderKL, pictures: Pictures, device: torch.device) -> None:
    """Scale the quant convolutions so that latents times SCALING_FACTOR have zero mean and unit variance per channel.

    With mu, s of the old latents z: z' = (z - mu) / (s f) is folded into quant_conv's output (means; log-variances move by
    -2 log(s f)) and z = s f z' + mu into post_quant_conv's input. Exact.
    """
    images, _ = pictures.batch(np.random.default_rng(2), 1024)
    means = torch.cat([vae.encode(part.to(device)).latent_dist.mean for part in images.split(64)])
    mu, scale = means.mean((0, 2, 3)), means.std((0, 2, 3)) * SCALING_FACTOR
    channels = len(mu)
    weight, bias = vae.quant_conv.weight, vae.quant_conv.bias
    weight[:channels] /= scale[:, None, None, None]
    bias[:channels] = (bias[:channels] - mu) / scale
    bias[channels:] -= 2 * scale.log()
    back = vae.post_quant_conv
    back.bias += (back.weight[:, :, 0, 0] * mu).sum(1)
    back.weight *= scale[None, :, None, None]
