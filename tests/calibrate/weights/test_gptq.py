"""GPTQ against brute force on a layer small enough for it, and on what it does to a layer's output."""

import itertools

import numpy as np
import pytest
import torch

from pcr_export.calibrate.weights.gptq import CLIP_RATIOS, gptq, output_error
from pcr_export.calibrate.weights.nearest import quantize_weight


def correlated_inputs(fan_in: int, count: int = 200, seed: int = 0) -> torch.Tensor:
    """float32 [count, fan_in] whose columns go together, as the channels of a network do."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(fan_in, fan_in, generator=generator)
    return torch.randn(count, fan_in, generator=generator) @ (mixing + 1)


def dequantized(q: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return q * scale.reshape(-1, *[1] * (q.ndim - 1))


def test_output_error_is_the_squared_error_of_the_output() -> None:
    x = correlated_inputs(6)
    change = np.random.default_rng(0).standard_normal((4, 6), np.float32)
    expected = (x @ torch.from_numpy(change).T).square().sum().item()
    # float32 sums of 200 rows and 6 columns in any order; the squares of the columns that cancel are some 10 times as large
    assert output_error(change, x.T @ x) == pytest.approx(expected, rel=10 * 206 * 2**-24)


def test_uncorrelated_inputs_leave_rounding_to_nearest() -> None:
    weight = np.random.default_rng(1).standard_normal((8, 20), np.float32)
    found = gptq(weight, torch.eye(20), 4)
    nearest = np.clip(np.rint(weight / found.scale[:, None]), -8, 7)
    np.testing.assert_array_equal(found.q, nearest)
    np.testing.assert_allclose(found.compensated * found.scale[:, None], weight, rtol=1e-5, atol=1e-6)
    limits = np.abs(weight).max(axis=1) / 7
    ratios = np.float32(CLIP_RATIOS)[:, None]
    np.testing.assert_allclose(
        np.abs(found.scale / limits - ratios).min(axis=0), 0, atol=2**-22
    )  # four roundings below 1


def test_near_the_best_of_all_integer_weights() -> None:
    """5 weights of 3 bits a row: all 8^5 rows are tried with GPTQ's own scale."""
    hessian = (x := correlated_inputs(5)).T @ x
    weight = np.random.default_rng(2).standard_normal((6, 5), np.float32)
    found = gptq(weight, hessian, 3)
    rows = np.array(list(itertools.product(range(-4, 4), repeat=5)), np.float32)
    for i, row in enumerate(weight):
        changes = torch.from_numpy(rows * found.scale[i] - row)
        best = float(((changes @ hessian) * changes).sum(dim=1).min())
        ours = output_error((dequantized(found.q, found.scale) - weight)[i : i + 1], hessian)
        nearest = output_error((dequantized(*quantize_weight(weight, 3)) - weight)[i : i + 1], hessian)
        assert best * (1 - 1e-3) <= ours <= min(nearest, 6 * best), i
    total = output_error(dequantized(found.q, found.scale) - weight, hessian)
    assert total < 0.5 * output_error(dequantized(*quantize_weight(weight, 3)) - weight, hessian)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_convolution_with_more_columns_than_a_block(bits: int) -> None:
    weight = np.random.default_rng(3).standard_normal((10, 20, 3, 3), np.float32)
    hessian = (x := correlated_inputs(180, 400)).T @ x
    found = gptq(weight, hessian, bits)
    assert (found.q.shape, found.q.dtype, found.scale.shape) == (weight.shape, np.int8, (10,))
    assert (found.q.min(), found.q.max()) == {4: (-8, 7), 8: (-127, 127)}[bits]
    nearest = output_error(dequantized(*quantize_weight(weight, bits)) - weight, hessian)
    assert output_error(dequantized(found.q, found.scale) - weight, hessian) < 0.6 * nearest


def test_inputs_that_are_always_zero_and_a_channel_of_zeros() -> None:
    weight = np.random.default_rng(4).standard_normal((3, 4), np.float32)
    weight[1] = 0
    found = gptq(weight, torch.zeros(4, 4), 4)
    assert (found.q[1] == 0).all()
    assert (found.scale > 0).all()
    assert np.isfinite(found.compensated).all()


def test_damaged_input_is_refused() -> None:
    weight = np.ones((2, 3), np.float32)
    with pytest.raises(ValueError, match="NaN or infinite"):
        gptq(weight, torch.full((3, 3), torch.nan), 4)
    weight[0, 0] = np.inf
    with pytest.raises(ValueError, match="NaN or infinite"):
        gptq(weight, torch.eye(3), 4)
