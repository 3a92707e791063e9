"""Weights to nearest: the grid, the clip search, and that blocks of rows change nothing."""

import numpy as np
import pytest

from pcr_export.calibrate.weights import nearest
from pcr_export.calibrate.weights.nearest import quantize_weight


@pytest.mark.parametrize("bits", [4, 8])
def test_no_other_clip_ratio_is_nearer(bits: int) -> None:
    weight = np.random.default_rng(0).standard_normal((6, 5, 3, 3), np.float32)
    q, scale = quantize_weight(weight, bits)
    limit = 2 ** (bits - 1) - 1
    assert q.dtype == np.int8
    assert np.abs(q).max() <= limit
    rows = weight.reshape(6, -1)
    error = np.square(q.reshape(6, -1) * scale[:, None] - rows).sum(axis=1)
    for ratio in nearest.CLIP_RATIOS:
        s = (np.abs(rows).max(axis=1) / np.float32(limit) * ratio)[:, None]
        other = np.clip(np.rint(rows / s), -limit, limit) * s
        assert (error <= np.square(other - rows).sum(axis=1) * (1 + 1e-6)).all()  # float32 sums


def test_blocks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = np.random.default_rng(1).standard_normal((50, 40), np.float32)
    whole = quantize_weight(weight)
    monkeypatch.setattr(nearest, "BLOCK_ELEMENTS", 120)
    for expected, found in zip(whole, quantize_weight(weight), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_a_channel_of_zeros_has_scale_one() -> None:
    q, scale = quantize_weight(np.zeros((2, 3), np.float32))
    np.testing.assert_array_equal(q, 0)
    np.testing.assert_array_equal(scale, 1)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_damaged_weights_are_refused(value: float) -> None:
    weight = np.ones((2, 3), np.float32)
    weight[1, 1] = value
    with pytest.raises(ValueError, match="NaN or infinite"):
        quantize_weight(weight)
