"""Train a small unconditional UNet2DModel on pictures of 16 x 16, for benchmarks/calibration_order.py.

    python scripts/train_tiny_unconditional.py DATA.npz OUT --target noise    # or flow; about two minutes of one core

DATA.npz holds `jpeg` uint8 (all files one after another) and `offsets` int64 [pictures + 1]; pictures are averaged down to 16 x 16.
"""

from __future__ import annotations

import argparse
import copy
import io
import itertools
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DModel
from PIL import Image
from torch import Tensor

SIZE = 16
BATCH = 16
LEARNING_RATE = 1e-3
EMA = 0.998


def read_pictures(path: Path) -> Tensor:
    """float32 [pictures, 3, SIZE, SIZE] in -1..1."""
    data = np.load(path)
    raw, ends = data["jpeg"], data["offsets"]
    pictures = []
    for start, end in itertools.pairwise(ends):
        picture = np.asarray(Image.open(io.BytesIO(raw[start:end].tobytes())).convert("RGB"))
        x = torch.from_numpy(picture.copy()).permute(2, 0, 1).float() / 127.5 - 1
        pictures.append(F.adaptive_avg_pool2d(x, SIZE))
    return torch.stack(pictures)


def make_network() -> UNet2DModel:
    """0.7 M parameters, attention at 8 x 8."""
    return UNet2DModel(
        sample_size=SIZE,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=16,
        attention_head_dim=32,
    )


def make_sample(x: Tensor, target: str, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """The network's input, its timestep and what it is to answer; time is stratified over the batch."""
    noise = torch.randn(x.shape, generator=generator)
    u = (torch.arange(len(x)) + torch.rand(len(x), generator=generator)) / len(x)
    if target == "noise":
        t = (u * 1000).long()
        return DDPMScheduler(beta_schedule="linear").add_noise(x, noise, t), t, noise
    time = torch.sigmoid(torch.special.ndtri(u.clamp(1e-4, 1 - 1e-4)))  # logit-normal
    mixed = (1 - time.view(-1, 1, 1, 1)) * x + time.view(-1, 1, 1, 1) * noise
    return mixed, time * 1000, noise - x


def train(pictures: Tensor, target: str, steps: int) -> UNet2DModel:
    """The moving average of the weights after `steps` steps; seeded."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    network = make_network()
    average = copy.deepcopy(network).eval()
    optimizer = torch.optim.AdamW(network.parameters(), LEARNING_RATE, betas=(0.9, 0.99))
    for step in range(steps):
        rate = min(1.0, (step + 1) / 100, max(0.02, 2 * (1 - step / steps)))
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * rate
        x = pictures[torch.randint(len(pictures), (BATCH,), generator=generator)]
        inputs, t, expected = make_sample(x, target, generator)
        loss = F.mse_loss(network(inputs, t, return_dict=False)[0], expected)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            for mean, weight in zip(average.parameters(), network.parameters(), strict=True):
                mean.lerp_(weight, 1 - min(EMA, (step + 1) / (step + 10)))
        if step % 100 == 99:
            print(step + 1, round(loss.item(), 4), flush=True)
    return average


def main() -> None:
    """Read the arguments, train, save."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--target", choices=("noise", "flow"), default="noise")
    parser.add_argument("--steps", type=int, default=560)
    arguments = parser.parse_args()
    train(read_pictures(arguments.data), arguments.target, arguments.steps).save_pretrained(arguments.out)


if __name__ == "__main__":
    main()
