"""Round to nearest with an MSE clip search: per-channel symmetric weights."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np

from pcr_export.usable_cpus import usable_cpus

CLIP_RATIOS = np.linspace(1.0, 0.6, 21, dtype=np.float32)  # tried in this order; the first of equals wins

BLOCK_ELEMENTS = 2**17  # rows are searched in blocks that stay in a core's cache: the same result, four times as fast
PEAK_ELEMENTS = 64  # neighbours of a row that `_clip_error` counts once, by the largest
ROUNDING = np.float32(1e-5)  # how far, relative to max|w|, float32 arithmetic may move a clipped weight


def quantize_weight(weight: np.ndarray, bits: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """Quantize each output channel on a symmetric grid whose clip minimises the squared error.

        q = clip(round(w / s), -(2^(bits-1) - 1), 2^(bits-1) - 1),    s = ratio * max|w| / (2^(bits-1) - 1)

    Args:
        weight: float [out_channels, ...].
        bits: 2..8.

    Returns:
        q int8 of weight's shape, s float32 [out_channels]. A channel of zeros gets s = 1.

    Raises:
        ValueError: a weight is NaN or infinite.
    """
    limit = np.float32(2 ** (bits - 1) - 1)
    rows = np.ascontiguousarray(weight, dtype=np.float32).reshape(weight.shape[0], -1)
    q, scale = np.empty(rows.shape, np.int8), np.empty(len(rows), np.float32)
    block = max(1, BLOCK_ELEMENTS // max(1, rows.shape[1]))
    parts = [slice(start, start + block) for start in range(0, len(rows), block)]

    def search(part: slice) -> None:
        q[part], scale[part] = _quantize_rows(rows[part], limit)

    threads = min(usable_cpus(), len(parts))  # a block each; numpy computes outside Python's lock
    if threads == 1:
        for part in parts:
            search(part)
    else:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(search, parts))
    return q.reshape(weight.shape), scale


def _quantize_rows(rows: np.ndarray, limit: np.float32) -> tuple[np.ndarray, np.ndarray]:
    """The search on float32 [rows, fan_in]. It ends where clipping alone costs every row more than its best ratio does."""
    if not np.isfinite(rows).all():
        raise ValueError("weight holds NaN or infinite values")
    peaks = np.maximum.reduceat(np.abs(rows), np.arange(0, rows.shape[1], PEAK_ELEMENTS), axis=1)
    amax = peaks.max(axis=1)
    full = np.where(amax > 0, amax / limit, np.float32(1)).astype(np.float32)
    best_error = np.full(len(rows), np.inf, dtype=np.float32)
    best_scale = full
    work = np.empty_like(rows)
    for ratio in CLIP_RATIOS:
        if ((best_error == 0) | (_clip_error(peaks, amax, ratio) > best_error)).all():
            break
        scale = (full * ratio).astype(np.float32)
        error = _error(rows, scale, limit, work)
        better = error < best_error
        best_scale = np.where(better, scale, best_scale)
        best_error = np.where(better, error, best_error)
    return _round(rows, best_scale, limit, work).astype(np.int8), best_scale


def _clip_error(peaks: np.ndarray, amax: np.ndarray, ratio: np.float32) -> np.ndarray:
    """Less than the squared error of a row at `ratio` or at any below it, whatever the rounding of float32; float32 [rows].

    sum over peaks of max(0, peak - ratio * max|w|)^2, a little less, since each peak is one of the row's weights.
    """
    clipped = np.maximum(peaks - ((ratio + ROUNDING) * amax)[:, None], 0)
    return np.square(clipped).sum(axis=1) * np.float32(0.999)


def _error(rows: np.ndarray, scale: np.ndarray, limit: np.float32, work: np.ndarray) -> np.ndarray:
    _round(rows, scale, limit, work)
    np.multiply(work, scale[:, None], out=work)
    np.subtract(work, rows, out=work)
    error: np.ndarray = np.square(work, out=work).sum(axis=1)
    return error


def _round(rows: np.ndarray, scale: np.ndarray, limit: np.float32, out: np.ndarray) -> np.ndarray:
    np.divide(rows, scale[:, None], out=out)
    return np.clip(np.rint(out, out=out), -limit, limit, out=out)
