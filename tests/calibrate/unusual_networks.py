"""Networks as people write them: layers called by name, tied, wrapped, unread, or of kinds that are not quantized."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from pcr_export.models.denoiser import Denoiser, Inputs, Walk

WIDTH = 8


class StandardizedConv(nn.Conv2d):
    """Weight standardization: what is multiplied is not the weight."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)


class ScaledLinear(nn.Linear):
    """As diffusers' LoRACompatibleLinear: another forward that computes the same."""

    def forward(self, hidden_states: Tensor, scale: float = 1.0) -> Tensor:
        return super().forward(hidden_states)


class Unusual(nn.Module):
    """A flow network on pictures [batch, 3, 8, 8] in which no layer is called conv_in or conv_out."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, WIDTH, 1)
        self.time = nn.Linear(4, WIDTH)
        self.standardized = StandardizedConv(WIDTH, WIDTH, 1)
        self.normed = parametrizations.weight_norm(nn.Conv2d(WIDTH, WIDTH, 1))
        self.down = nn.Conv2d(WIDTH, WIDTH, 2, stride=2)
        self.again = self.down  # called by its second name
        self.up = nn.ConvTranspose2d(WIDTH, WIDTH, 2, stride=2)
        self.named = nn.Linear(WIDTH, WIDTH)
        self.scaled = ScaledLinear(WIDTH, WIDTH)
        self.dead = nn.Linear(WIDTH, WIDTH)
        self.reused = nn.Linear(WIDTH, WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.one, self.other = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.other.weight = self.one.weight
        self.norm = nn.BatchNorm2d(WIDTH)
        self.table = nn.Parameter(torch.randn(64, WIDTH))
        self.to_pixels = nn.Linear(WIDTH, 3)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        angles = t / 1000 * torch.arange(1.0, 5.0)
        h = self.patch(input=x) + self.time(angles.sin().reshape(1, 4))[:, :, None, None]
        h = self.norm(self.normed(self.standardized(h)))
        h = h + self.up(F.silu(self.again(h)))
        tokens = h.flatten(2).transpose(1, 2) + self.table
        self.dead(tokens)
        tokens = tokens + self.named(input=tokens)
        tokens = tokens + self.scaled(hidden_states=tokens)
        tokens = tokens + self.reused(tokens) + tokens @ self.reused.weight
        tokens = tokens + self.attention(tokens, tokens, tokens)[0]
        tokens = self.other(F.silu(self.one(tokens)))
        velocity = self.to_pixels(tokens).transpose(1, 2).reshape(x.shape)
        return velocity - 0.1 * x


def denoiser_of(
    network: nn.Module,
    shape: Sequence[int] = (3, 8, 8),
    call: Callable[[nn.Module, Inputs], Tensor] = lambda network, inputs: network(inputs["t"], inputs["x"]),
) -> Denoiser:
    """A flow-matching denoiser: the network gives the velocity; its first input is the timestep."""
    timesteps = (1000.0, 750.0, 500.0, 250.0)

    def walk(conditions: Sequence[int], seeds: Sequence[int]) -> Walk:
        x = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
        for t in timesteps:
            velocity = yield {"t": torch.tensor(t), "x": x}
            x = x - 0.25 * velocity
        return x

    return Denoiser(
        network=network.eval(),
        call=call,
        walk=walk,
        timesteps=timesteps,
        timestep="t",
        dynamic_axes={"t": {}, "x": {0: "batch"}},
        output_axes={0: "batch"},
    )


def unusual_denoiser() -> Denoiser:
    torch.manual_seed(0)
    return denoiser_of(Unusual())
