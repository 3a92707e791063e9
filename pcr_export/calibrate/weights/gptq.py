"""GPTQ (arXiv 2210.17323): round a weight column by column, each error made good by the columns that are not rounded yet."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

DAMPING = 0.01  # of the Hessian's mean diagonal
MOST_DAMPING = 10.0
CLIP_RATIOS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)
BLOCK_COLUMNS = 128  # rounded before the columns behind them are corrected at once


def integer_range(bits: int) -> tuple[int, int]:
    """Least and greatest integer of a learned weight: all 2^bits, but -128, which the symmetric INT8 of some kernels leaves out."""
    high: int = 2 ** (bits - 1) - 1
    return (-high - 1 if bits < 8 else -high), high


@dataclass(frozen=True)
class Gptq:
    """What `gptq` found for one weight."""

    q: np.ndarray  # int8 [out_channels, ...]
    scale: np.ndarray  # float32 [out_channels]
    compensated: (
        np.ndarray
    )  # float32 [out_channels, ...]: w / s as it was, corrected for the columns before it, when it was rounded


def gptq(weight: np.ndarray, hessian: Tensor, bits: int) -> Gptq:
    """Minimise tr((Wq - W) H (Wq - W)^T), the squared error of the layer's output, over integer weights, greedily.

    With U the upper Cholesky factor of (H + damping)^-1 and the columns in the order of their H_jj, largest first:

        q_j = clip(round(w_j / s)),    w_k -= (w_j - s q_j) U_jk / U_jj   for every k behind j

    clipped to `integer_range`. Each output channel takes the s = ratio * max|w| / (2^(bits-1) - 1) of CLIP_RATIOS whose result has
    the least such error.

    Args:
        weight: float [out_channels, ...], fan_in numbers a row.
        hessian: float32 [fan_in, fan_in], sum of x x^T over the layer's inputs, laid out like a row of the weight.
        bits: 2..8.

    Raises:
        ValueError: the weight or the Hessian is not finite.
    """
    rows = torch.from_numpy(np.array(weight, np.float32)).reshape(len(weight), -1)
    if not (torch.isfinite(hessian).all() and torch.isfinite(rows).all()):
        raise ValueError("the layer's weights or inputs hold NaN or infinite values")
    clip = integer_range(bits)
    peak = rows.abs().amax(dim=1)
    scales = torch.where(peak > 0, peak / clip[1], 1) * torch.tensor(CLIP_RATIOS)[:, None]  # [ratios, out_channels]
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    q, compensated = (rows / scales[..., None] for _ in range(2))
    inner = (len(CLIP_RATIOS) * len(rows), -1)
    _round_columns(q.view(inner), compensated.view(inner), order, _inverse_factor(hessian, order), clip)
    changes = q * scales[..., None] - rows
    best = ((changes @ hessian) * changes).sum(dim=-1).argmin(dim=0)
    channels = torch.arange(len(rows))
    return Gptq(
        q=q[best, channels].to(torch.int8).numpy().reshape(weight.shape),
        scale=scales[best, channels].numpy(),
        compensated=compensated[best, channels].numpy().reshape(weight.shape),
    )


def _round_columns(q: Tensor, compensated: Tensor, order: Tensor, factor: Tensor, clip: tuple[int, int]) -> None:
    """Write to both what the columns of `q`, float32 [rows, fan_in] in units of the scale, become, in the order `order`."""
    steps = q[:, order]
    for start in range(0, steps.shape[1], BLOCK_COLUMNS):
        part = slice(start, start + BLOCK_COLUMNS)
        block, errors = steps[:, part], torch.empty_like(steps[:, part])
        inner = factor[part, part]
        for j, column in enumerate(order[part].tolist()):
            compensated[:, column] = block[:, j]
            q[:, column] = block[:, j].round().clamp(*clip)
            errors[:, j] = (block[:, j] - q[:, column]) / inner[j, j]
            block[:, j + 1 :] -= errors[:, j, None] * inner[j, None, j + 1 :]
        steps[:, part.stop :] -= errors @ factor[part, part.stop :]


def output_error(change: np.ndarray, hessian: Tensor) -> float:
    """tr(D H D^T): the squared error that a change D [out_channels, ...] of the weight makes in the layer's output, summed."""
    rows = torch.from_numpy(np.array(change, np.float32)).reshape(len(change), -1)
    return float(((rows @ hessian) * rows).sum(dtype=torch.float64))


def _inverse_factor(hessian: Tensor, order: Tensor) -> Tensor:
    """U upper triangular with U^T U = (H + damping * mean H_jj)^-1, rows and columns in `order`.

    The damping grows until H can be factored in float32. At most three more matrices of its size are in memory at a time.
    """
    mean = float(hessian.diagonal().mean()) or 1.0
    damping = DAMPING
    while damping <= MOST_DAMPING:
        damped = hessian[order[:, None], order]
        damped.diagonal().add_(damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        del damped
        if not failed:
            inverse = torch.cholesky_inverse(lower)
            del lower
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not failed:
                return upper
        damping *= 10
    raise ValueError("the Hessian of the layer's inputs can't be factored")
