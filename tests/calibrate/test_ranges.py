import numpy as np
import pytest
import torch

from pcr_export.calibrate.ranges import (
    ActivationHistogram,
    find_quantizer,
    mse_quantizer,
    percentile_range,
    quantize_dequantize,
    quantizer_from_range,
)


def histogram_of(*parts: torch.Tensor) -> ActivationHistogram:
    histogram = ActivationHistogram()
    for part in parts:
        histogram.update(part)
    return histogram


def squared_error(x: torch.Tensor, scale: float, zero_point: int, bits: int = 8) -> float:
    return (quantize_dequantize(x, scale, zero_point, bits) - x).square().mean().item()


@pytest.mark.parametrize("ranges", ["mse", "minmax", "percentile"])
@pytest.mark.parametrize("affine", [True, False])
def test_quantizer_depends_on_neither_order_nor_batches(ranges, affine):
    x = torch.randn(7, 1000, generator=torch.Generator().manual_seed(0)) * 3
    whole = find_quantizer(histogram_of(x), ranges=ranges, affine=affine)
    parts = find_quantizer(histogram_of(*x.flip(0).split(2)), ranges=ranges, affine=affine)
    assert whole == parts


def test_minmax_grid_holds_both_ends_and_zero():
    quantizer = quantizer_from_range(-0.28, 5.0, affine=True)
    ends = torch.tensor([-0.28, 0.0, 5.0])
    restored = quantize_dequantize(ends, quantizer.scale, quantizer.zero_point)
    assert restored[1] == 0
    assert (restored - ends).abs().max() <= quantizer.scale / 2 * 1.001  # rounding of the float32 scale


def test_symmetric_grid_keeps_zero_point_128():
    assert quantizer_from_range(-1.0, 4.0, affine=False).zero_point == 128


def test_affine_halves_the_error_of_silu_outputs():
    x = torch.nn.functional.silu(torch.randn(50_000, generator=torch.Generator().manual_seed(1)) * 2)
    affine, symmetric = (mse_quantizer(histogram_of(x), affine=flag) for flag in (True, False))
    assert (
        squared_error(x, affine.scale, affine.zero_point) < squared_error(x, symmetric.scale, symmetric.zero_point) / 2
    )


def test_mse_clips_a_heavy_tail_and_is_near_the_brute_force_optimum():
    x = torch.randn(100_000, generator=torch.Generator().manual_seed(2))
    x[:20] *= 30
    best = mse_quantizer(histogram_of(x), affine=False)
    minmax = quantizer_from_range(x.min().item(), x.max().item(), affine=False)
    brute = min(squared_error(x, s, 128) for s in np.linspace(minmax.scale / 10, minmax.scale, 400))
    assert best.scale < minmax.scale
    assert squared_error(x, best.scale, best.zero_point) < brute * 1.02  # the candidates are 3.7 % apart


def test_percentile_matches_numpy():
    x = torch.randn(200_000, generator=torch.Generator().manual_seed(3))
    low, high = percentile_range(histogram_of(x), 99.0)
    assert (low, high) == pytest.approx(tuple(np.percentile(x.numpy(), [1, 99])), rel=0.01)  # bins are 0.4 % wide


def test_relaxed_digit_gives_exactly_the_ten_bit_grid_inside_the_range():
    x = torch.linspace(-1, 1, 10_001)
    scale = float(torch.tensor(1 / 127, dtype=torch.float32))
    ten_bit = torch.round(x / scale * 4) / 4 * scale
    torch.testing.assert_close(quantize_dequantize(x, scale, 128, bits=10), ten_bit, rtol=0, atol=1e-7)
    assert squared_error(x, scale, 128, 10) < squared_error(x, scale, 128) / 15


def test_zeros_give_a_usable_grid():
    assert mse_quantizer(histogram_of(torch.zeros(10)), affine=True).scale == 1.0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(value):
    with pytest.raises(ValueError, match="NaN or infinite"):
        histogram_of(torch.tensor([1.0, value]))
