"""Our ranges against ModelOpt's calibrators where those are right, and why its others are not used.

ModelOpt's max and percentile calibrators and its fake quantizer agree with ours. They are not what the job runs on: they know no
steps and no zero point, its histogram depends on the order of the batches, and its MSE calibrator is wrong (below).
"""

import pytest
import torch

from pcr_export.calibrate.ranges import ActivationHistogram, minmax_range, mse_quantizer, percentile_range
from pcr_export.calibrate.weights.nearest import quantize_weight

modelopt = pytest.importorskip("modelopt.torch.quantization.calib", reason="dev extra")


@pytest.fixture(scope="module")
def x():
    return torch.randn(100_000, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def histogram(x):
    histogram = ActivationHistogram()
    histogram.update(x)
    return histogram


def calibrated(kind, x, *method, **arguments):
    calibrator = kind(num_bits=8, axis=None, unsigned=False)
    calibrator.collect(x)
    return calibrator.compute_amax(*method, **arguments).item()


def test_max_is_our_minmax(x, histogram):
    low, high = minmax_range(histogram)
    assert calibrated(modelopt.MaxCalibrator, x) == max(-low, high)


def test_percentile_is_ours(x, histogram):
    theirs = calibrated(modelopt.HistogramCalibrator, x, "percentile", percentile=98.0)  # of |x|: 1 % at each end
    low, high = percentile_range(histogram, 99.0)
    assert theirs == pytest.approx((high - low) / 2, rel=0.01)  # both histograms have bins


def test_fake_quantized_weights_are_ours():
    from modelopt.torch.quantization.config import QuantizerAttributeConfig
    from modelopt.torch.quantization.nn import TensorQuantizer

    weight = torch.randn(6, 40, generator=torch.Generator().manual_seed(1))
    q, scale = quantize_weight(weight.numpy())
    quantizer = TensorQuantizer(QuantizerAttributeConfig(num_bits=8, axis=0))
    quantizer.amax = torch.from_numpy(scale * 127)[:, None]
    ours = torch.from_numpy(q).float() * torch.from_numpy(scale)[:, None]
    torch.testing.assert_close(quantizer(weight), ours, rtol=2**-22, atol=0)  # the same integers; three roundings


def test_their_mse_range_is_far_from_the_optimum_and_ours_is_not(x, histogram):
    def error(amax):
        scale = amax / 127
        return ((x / scale).round().clamp(-128, 127) * scale - x).square().mean().item()

    theirs = calibrated(modelopt.HistogramCalibrator, x, "mse")
    ours = mse_quantizer(histogram, affine=False).scale * 127
    best = min(error(x.abs().max().item() * ratio) for ratio in torch.linspace(0.2, 1, 200).tolist())
    assert error(ours) < 1.02 * best  # candidates are 3.7 % apart
    assert error(theirs) > 100 * best
