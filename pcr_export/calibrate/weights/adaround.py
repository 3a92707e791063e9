"""AdaRound (arXiv 2004.10568) over a block (BRECQ, arXiv 2102.05426): learn for each weight whether it is rounded up or down."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from pcr_export.calibrate.weights.gptq import integer_range

STRETCH_LOW, STRETCH_HIGH = -0.1, 1.1  # zeta and gamma: h reaches 0 and 1 for finite alpha


@dataclass(frozen=True, kw_only=True)
class AdaRoundSettings:
    """Published (PCR): 2 000 iterations at 1e-3 with lambda 0.01, from the weight itself. Ours start where GPTQ ended, see README."""

    iterations: int = 500
    batch: int = 32
    learning_rate: float = 3e-2
    weight_of_regularizer: float = 1e-3  # lambda
    first_beta: float = 20.0
    last_beta: float = 2.0
    warmup: float = 0.2  # of the iterations run without the regularizer


class SoftRounding(nn.Module):
    """w_q = s clip(floor(v) + h, *integer_range),   h = clip(sigmoid(alpha) 1.2 - 0.1, 0, 1)   for each number v = w / s of the weight."""

    def __init__(self, steps: Tensor, scale: Tensor, bits: int, sharpness: float = 0.0) -> None:
        """Start at h = v - floor(v), so that the soft weight is v itself.

        Args:
            steps: v, float32 [out_channels, ...].
            scale: float32 [out_channels].
            sharpness: 0..1, how much nearer than v to round(v) the soft weight starts.
        """
        super().__init__()
        low, high = integer_range(bits)
        steps = steps.clamp(low, high)
        floor = steps.floor().clamp(max=high - 1)
        rest = steps - floor
        rest = rest + sharpness * ((rest >= 0.5).float() - rest)
        self.scale: Tensor
        self.floor: Tensor
        self.register_buffer("scale", scale.reshape(-1, *[1] * (steps.ndim - 1)))
        self.register_buffer("floor", floor)
        self.alpha = nn.Parameter(torch.logit((rest - STRETCH_LOW) / (STRETCH_HIGH - STRETCH_LOW)))

    def h(self) -> Tensor:
        """float32 of weight's shape, 0 (down) to 1 (up)."""
        return (torch.sigmoid(self.alpha) * (STRETCH_HIGH - STRETCH_LOW) + STRETCH_LOW).clamp(0, 1)

    def forward(self) -> Tensor:
        """The softly rounded weight."""
        return (self.floor + self.h()) * self.scale

    @torch.no_grad()
    def harden(self) -> np.ndarray:
        """int8 of weight's shape."""
        return (self.floor + (self.h() >= 0.5)).to(torch.int8).numpy()


def regularizer(h: Tensor, beta: float) -> Tensor:
    """sum(1 - |2h - 1|^beta): 0 where every h is 0 or 1."""
    return (1 - (2 * h - 1).abs().pow(beta)).sum()


def beta_at(iteration: int, settings: AdaRoundSettings) -> float | None:
    """beta falls linearly behind the warm-up; None within it."""
    start = int(settings.warmup * settings.iterations)
    if iteration < start:
        return None
    done = (iteration - start) / max(1, settings.iterations - start)
    return settings.first_beta + (settings.last_beta - settings.first_beta) * done


def learn_rounding(
    roundings: Mapping[str, SoftRounding],
    loss: Callable[[Mapping[str, Tensor], Tensor], Tensor],
    num_samples: int,
    settings: AdaRoundSettings,
    seed: int,
    advance: Callable[[int], None] = lambda _count: None,
) -> None:
    """Minimise  loss + lambda * sum of the regularizers  over the alphas of a block's layers, with Adam.

    Args:
        roundings: by layer; learned in place.
        loss: (softly rounded weights by layer, indices int64 [batch] of samples) -> the error of the block's output.
        num_samples: that the indices are drawn from.
        seed: of the draws.
    """
    generator = torch.Generator().manual_seed(seed)
    alphas = [each.alpha for each in roundings.values()]
    adam = torch.optim.Adam(alphas, lr=settings.learning_rate)
    for iteration in range(settings.iterations):
        indices = torch.randint(num_samples, (min(settings.batch, num_samples),), generator=generator)
        total = loss({layer: rounding() for layer, rounding in roundings.items()}, indices)
        beta = beta_at(iteration, settings)
        if beta is not None:
            for rounding in roundings.values():
                total = total + settings.weight_of_regularizer * regularizer(rounding.h(), beta)
        for alpha, gradient in zip(alphas, torch.autograd.grad(total, alphas), strict=True):
            alpha.grad = gradient  # and none for the block's own parameters
        adam.step()
        advance(1)
