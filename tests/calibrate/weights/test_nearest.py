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
        assert (error <= np.square(other - rows).sum(axis=1) * (1 + 2 * 45 * 2**-24)).all()  # float32 sums of 45


def test_blocks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = np.random.default_rng(1).standard_normal((50, 40), np.float32)
    whole = quantize_weight(weight)
    monkeypatch.setattr(nearest, "BLOCK_ELEMENTS", 120)
    for expected, found in zip(whole, quantize_weight(weight), strict=True):
        np.testing.assert_array_equal(found, expected)


ROWS = {
    "normal": np.random.default_rng(2).standard_normal((70, 500), np.float32),
    "long normal": np.random.default_rng(3).standard_normal((20, 11520), np.float32),
    "heavy tails": np.random.default_rng(4).standard_t(1.5, (70, 300)).astype(np.float32),
    "constant": np.full((5, 70), 0.3, np.float32),
    "zero": np.zeros((3, 9), np.float32),
    "tiny": np.random.default_rng(5).standard_normal((4, 3), np.float32) * np.float32(1e-18),
}
ROWS["mixed"] = np.concatenate([ROWS[name][:3, :3] for name in ROWS])


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("kind", ROWS)
def test_the_search_ends_early_and_finds_the_same(
    kind: str, bits: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nearest, "usable_cpus", lambda: threads)
    monkeypatch.setattr(nearest, "BLOCK_ELEMENTS", 4000)
    found = quantize_weight(ROWS[kind], bits)
    for expected, array in zip(full_search(ROWS[kind], np.float32(2 ** (bits - 1) - 1)), found, strict=True):
        assert array.tobytes() == expected.tobytes()


def full_search(rows: np.ndarray, limit: np.float32) -> tuple[np.ndarray, np.ndarray]:
    """Every ratio for every row; the first of equals."""
    amax = np.abs(rows).max(axis=1)
    full = np.where(amax > 0, amax / limit, np.float32(1))
    scales = [(full * ratio)[:, None] for ratio in nearest.CLIP_RATIOS]
    grids = [np.clip(np.rint(rows / s), -limit, limit) for s in scales]
    errors = [np.square(grid * s - rows).sum(axis=1) for grid, s in zip(grids, scales, strict=True)]
    best = np.argmin(errors, axis=0)
    row = np.arange(len(rows))
    return np.array(grids)[best, row].astype(np.int8), np.array(scales)[best, row, 0]


def test_most_ratios_are_never_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []
    error = nearest._error
    monkeypatch.setattr(nearest, "_error", lambda *arguments: tried.append(1) or error(*arguments))
    quantize_weight(ROWS["normal"])
    assert len(tried) < 8


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
