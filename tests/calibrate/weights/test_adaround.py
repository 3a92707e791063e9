"""AdaRound's maths, and its result against all 2^n roundings of a small layer."""

import itertools

import numpy as np
import pytest
import torch
from calibrate.weights.test_gptq import correlated_inputs, dequantized

from pcr_export.calibrate.weights.adaround import (
    AdaRoundSettings,
    SoftRounding,
    beta_at,
    learn_rounding,
    regularizer,
)
from pcr_export.calibrate.weights.gptq import output_error
from pcr_export.calibrate.weights.nearest import quantize_weight


def learn(weight: np.ndarray, x: torch.Tensor, bits: int, seed: int = 0, **settings) -> tuple[np.ndarray, np.ndarray]:
    """One Linear without bias by AdaRound from its own weight, as published."""
    _, scale = quantize_weight(weight, bits)
    steps = torch.from_numpy(weight / scale[:, None])
    rounding = SoftRounding(steps, torch.from_numpy(scale), bits)
    target = x @ torch.from_numpy(weight).T

    def loss(weights, indices):
        return (x[indices] @ weights["layer"].T - target[indices]).square().sum(dim=1).mean()

    learn_rounding({"layer": rounding}, loss, len(x), AdaRoundSettings(**settings), seed)
    return rounding.harden(), scale


def test_the_soft_weight_starts_as_the_weight_itself() -> None:
    weight = np.random.default_rng(0).standard_normal((5, 7), np.float32)
    _, scale = quantize_weight(weight, 4)
    rounding = SoftRounding(torch.from_numpy(weight / scale[:, None]), torch.from_numpy(scale), 4)
    np.testing.assert_allclose(
        rounding().detach().numpy(), np.clip(weight, -8 * scale[:, None], 7 * scale[:, None]), atol=1e-5
    )  # a sigmoid of its own inverse: some 2^-24 of 8 units of up to 0.5
    sharp = SoftRounding(torch.from_numpy(weight / scale[:, None]), torch.from_numpy(scale), 4, sharpness=1.0)
    np.testing.assert_allclose(sharp().detach().numpy(), dequantized(sharp.harden(), scale), atol=1e-5)
    np.testing.assert_array_equal(sharp.harden(), np.clip(np.rint(weight / scale[:, None]), -8, 7))


def test_regularizer_and_beta() -> None:
    assert regularizer(torch.tensor([0.0, 1.0]), 20.0).item() == 0
    assert regularizer(torch.tensor([0.5]), 20.0).item() == 1
    settings = AdaRoundSettings(iterations=100)
    assert beta_at(19, settings) is None
    assert beta_at(20, settings) == 20
    assert beta_at(60, settings) == pytest.approx(11)
    assert 2 < beta_at(99, settings) < 2.5


def test_near_the_best_of_all_roundings() -> None:
    """7 weights of 3 bits a row: of the 2^7 roundings up or down, most rows end with the best and none behind nearest."""
    weight = np.random.default_rng(1).standard_normal((12, 7), np.float32)
    x = correlated_inputs(7)
    hessian = x.T @ x
    q, scale = learn(weight, x, 3, iterations=1500, learning_rate=1e-2, weight_of_regularizer=1.0)
    nearest = dequantized(*quantize_weight(weight, 3)) - weight
    ups = np.array(list(itertools.product((0, 1), repeat=7)), np.float32)
    best, ours, rounded = np.zeros((3, 12))
    for i, row in enumerate(weight):
        floor = np.clip(np.floor(row / scale[i]), -4, 2)
        assert set(np.unique(q[i] - floor)) <= {0, 1}
        changes = torch.from_numpy((floor + ups) * scale[i] - row)
        best[i] = float(((changes @ hessian) * changes).sum(dim=1).min())
        ours[i] = output_error((dequantized(q, scale) - weight)[i : i + 1], hessian)
        rounded[i] = output_error(nearest[i : i + 1], hessian)
    assert (best * (1 - 1e-3) <= ours).all()
    assert (ours <= rounded * (1 + 1e-3)).all()
    # Another machine's float sums decide as another seed does: eight seeds give 7 of 12 and 0.75 to 0.78.
    assert (ours <= best * 1.05).sum() >= 5
    assert ours.sum() < 0.87 * rounded.sum()


def test_the_seed_decides() -> None:
    weight, x = np.random.default_rng(2).standard_normal((6, 9), np.float32), correlated_inputs(9)
    one, same, other = (
        learn(weight, x, 4, seed, iterations=40, batch=4, learning_rate=0.1, weight_of_regularizer=1.0)[0]
        for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(one, same)
    assert (one != other).any()
