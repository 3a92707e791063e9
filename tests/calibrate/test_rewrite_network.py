"""Split shortcuts and SmoothQuant: the same function in another form, quantized by the same code."""

import numpy as np
import pytest
import torch
from class_conditional import class_conditional_denoiser

from pcr_export.calibrate.layers import find_layers
from pcr_export.calibrate.rewrite_network import rewrite_network
from pcr_export.calibrate.smooth_quant import SmoothedLinear, channel_peaks, smoothing_scale
from pcr_export.calibrate.split_shortcut import SplitConv
from pcr_export.progress import silent
from pcr_export.recipe import Recipe

LABELS, SEEDS = [0, 1, 2, 3], [10, 11, 12, 13]


def recipe(**changes):
    settings = {"skip": ("conv_in", "conv_out"), **changes}
    return Recipe(model="toy", num_inference_steps=5, guidance_scale=1.0, height=16, width=16, **settings)


def rewrite(denoiser, **changes):
    example = next(denoiser.walk(LABELS, SEEDS))
    return rewrite_network(denoiser, example, LABELS, SEEDS, recipe(**changes)), example


@pytest.mark.parametrize(
    "changes", [{"split_shortcut": True}, {"smooth_quant": 0.8}, {"split_shortcut": True, "smooth_quant": 0.3}]
)
def test_rewritten_network_is_the_same_function(changes):
    denoiser = class_conditional_denoiser()
    rewritten, example = rewrite(denoiser, **changes)
    with torch.inference_mode():
        torch.testing.assert_close(
            rewritten(example), denoiser(example), rtol=0, atol=1e-4
        )  # sums in another order, products rounded once more


def test_the_network_itself_stays_as_it_is_and_its_weights_are_shared():
    denoiser = class_conditional_denoiser()
    before = {name: tensor.clone() for name, tensor in denoiser.network.state_dict().items()}
    rewritten, _ = rewrite(denoiser, split_shortcut=True, smooth_quant=0.8)
    assert rewritten is not denoiser
    after = denoiser.network.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert rewritten.network.down.conv.weight is denoiser.network.down.conv.weight


def test_nothing_to_rewrite_is_the_denoiser_itself():
    denoiser = class_conditional_denoiser()
    assert rewrite(denoiser)[0] is denoiser


def test_a_convolution_is_split_where_its_input_was_concatenated():
    denoiser = class_conditional_denoiser()
    rewritten, example = rewrite(denoiser, split_shortcut=True)
    split = rewritten.network.merge
    assert isinstance(split, SplitConv)
    assert split.sizes == (16, 16)
    assert [name for name, module in rewritten.network.named_modules() if isinstance(module, SplitConv)] == ["merge"]
    layers = {layer.name: layer for layer in find_layers(rewritten, example, ())}
    assert layers["merge.deep"].site == "merge.deep"
    assert layers["merge.shortcut"].site == "merge.shortcut"
    assert layers["merge.deep"].affine


def test_a_skipped_convolution_is_not_split():
    rewritten, _ = rewrite(class_conditional_denoiser(), split_shortcut=True, skip=("merge",))
    assert isinstance(rewritten.network.merge, torch.nn.Conv2d)


def test_every_quantized_linear_is_smoothed_and_no_other():
    rewritten, example = rewrite(class_conditional_denoiser(), smooth_quant=0.8, skip=("time", "conv_in", "conv_out"))
    assert isinstance(rewritten.network.time, torch.nn.Linear)
    smoothed = {name for name, module in rewritten.network.named_modules() if isinstance(module, SmoothedLinear)}
    expected = {"down.project", "middle.project", *(f"attention.to_{name}" for name in ("q", "k", "v", "out"))}
    assert smoothed == expected
    sites = {layer.site for layer in find_layers(rewritten, example, ("time",)) if layer.op == "Linear" and layer.site}
    assert sites == {f"{name}.linear" for name in expected}  # each reads a tensor of its own


def test_scale_is_smoothquants_formula():
    peaks, weight = torch.tensor([4.0, 1.0, 0.0]), torch.tensor([[0.5, 2.0, 1.0], [-1.0, 0.0, 0.0]])
    expected = [4.0**0.8 / 1.0**0.2, 1.0**0.8 / 2.0**0.2, 1e-5**0.8 / 1.0]
    rounding = 16 * 2**-24  # two powers and a division in float32; libraries of powers are right to a few last digits
    np.testing.assert_allclose(smoothing_scale(peaks, weight, 0.8).numpy(), expected, rtol=rounding)
    torch.testing.assert_close(smoothing_scale(peaks[:2], weight[:, :2], 1.0), peaks[:2])  # all moves into the weight


def test_smoothed_inputs_and_weights_share_the_outliers():
    """At alpha 0.5 every channel's largest input and largest weight become the same number: sqrt(max|x| max|W|)."""
    denoiser = class_conditional_denoiser()
    rewritten, example = rewrite(denoiser, smooth_quant=0.5)
    layers = find_layers(rewritten, example, ())
    peaks = channel_peaks(rewritten, layers, LABELS, SEEDS, 4, silent)["attention.to_out.linear"]
    weight = rewritten.network.attention.to_out.linear.weight.abs().amax(dim=0)
    np.testing.assert_allclose(peaks.numpy(), weight.detach().numpy(), rtol=1e-3)


def test_peaks_do_not_depend_on_the_batch():
    denoiser = class_conditional_denoiser()
    layers = find_layers(denoiser, next(denoiser.walk(LABELS, SEEDS)), ())
    whole = channel_peaks(denoiser, layers, LABELS, SEEDS, 4, silent)
    parts = channel_peaks(denoiser, layers, LABELS, SEEDS, 3, silent)
    assert whole.keys() == parts.keys()
    for site in whole:
        np.testing.assert_allclose(parts[site].numpy(), whole[site].numpy(), rtol=1e-3, atol=1e-5)
