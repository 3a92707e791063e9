"""A denoiser that is no diffusers model: a small class-conditional UNet with its own DDIM walk."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pcr_export.models.denoiser import Denoiser, Inputs, Walk

TIMESTEPS = (900.0, 700.0, 500.0, 300.0, 100.0)


class Block(nn.Module):
    def __init__(self, channels: int, embedding: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(4, channels)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.project = nn.Linear(embedding, channels)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        return x + self.conv(F.silu(self.norm(x) + self.project(embedding)[:, :, None, None]))


class Attention(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels, bias=False) for _ in range(3))
        self.to_out = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(self.to_q(tokens), self.to_k(tokens), self.to_v(tokens))
        return x + self.to_out(mixed).transpose(1, 2).reshape(x.shape)


class ClassConditionalUNet(nn.Module):
    def __init__(self, channels: int = 16, num_classes: int = 5) -> None:
        super().__init__()
        self.embed = nn.Embedding(num_classes, 32)
        self.time = nn.Linear(8, 32)
        self.conv_in = nn.Conv2d(3, channels, 3, padding=1)
        self.down = Block(channels, 32)
        self.stride = nn.Conv2d(channels, channels, 3, stride=2, padding=1)
        self.middle = Block(channels, 32)
        self.attention = Attention(channels)
        self.merge = nn.Conv2d(2 * channels, channels, 1)
        self.conv_out = nn.Conv2d(channels, 3, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        frequencies = torch.exp(-torch.arange(4, dtype=torch.float32))
        angles = t.reshape(1, 1) / 100 * frequencies
        embedding = self.time(torch.cat([angles.sin(), angles.cos()], dim=1)) + self.embed(label)
        high = self.down(self.conv_in(x), embedding)
        low = self.attention(self.middle(self.stride(high), embedding))
        up = F.interpolate(low, scale_factor=2.0, mode="nearest")
        return self.conv_out(self.merge(torch.cat([high, up], dim=1)))


def call(network: nn.Module, inputs: Inputs) -> Tensor:
    return network(inputs["x"], inputs["t"], inputs["label"])


def walk(labels: Sequence[int], seeds: Sequence[int]) -> Walk:
    noise = [torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    x, label = torch.stack(noise), torch.tensor(labels)
    for timestep, following in zip(TIMESTEPS, (*TIMESTEPS[1:], 0.0), strict=True):
        epsilon = yield {"x": x, "t": torch.tensor(timestep), "label": label}
        alpha, beta = 1 - timestep / 1000, 1 - following / 1000
        x0 = (x - (1 - alpha) ** 0.5 * epsilon) / alpha**0.5
        x = beta**0.5 * x0 + (1 - beta) ** 0.5 * epsilon
    return x


def class_conditional_denoiser(seed: int = 0) -> Denoiser:
    torch.manual_seed(seed)
    return Denoiser(
        network=ClassConditionalUNet().eval(),
        call=call,
        walk=walk,
        timesteps=TIMESTEPS,
        timestep="t",
        output="epsilon",
        dynamic_axes={"x": {0: "batch", 2: "height", 3: "width"}, "t": {}, "label": {0: "batch"}},
    )
