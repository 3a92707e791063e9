"""The baselines: which steps they see and how they make one row of them."""

import dataclasses

import numpy as np
import pytest
import torch
from class_conditional import class_conditional_denoiser

from pcr_export.calibrate.float_trajectory import observed_steps
from pcr_export.calibrate.layers import find_layers
from pcr_export.calibrate.progressive import calibrate
from pcr_export.calibrate.ranges import ActivationHistogram
from pcr_export.calibrate.simulate import Simulation
from pcr_export.errors import PcrExportError
from pcr_export.recipe import Recipe

LABELS, SEEDS = [0, 1, 2, 3], [10, 11, 12, 13]


def recipe(**changes):
    return Recipe(model="toy", num_inference_steps=5, guidance_scale=1.0, height=16, width=16, **changes)


def run(**changes):
    denoiser = class_conditional_denoiser()
    layers = find_layers(denoiser, next(denoiser.walk(LABELS, SEEDS)), ("conv_in", "conv_out"))
    return calibrate(denoiser, layers, LABELS, SEEDS, recipe(**changes)), layers


def peaks_of(batch):
    """max|x| of every (site, step, call) on the float trajectories, float64 [sites, 5, calls], and the sites."""
    denoiser = class_conditional_denoiser()
    layers = find_layers(denoiser, next(denoiser.walk(LABELS, SEEDS)), ("conv_in", "conv_out"))
    sites = list(dict.fromkeys(layer.site for layer in layers if layer.site))
    peaks = np.zeros((len(sites), 5, len(LABELS) // batch))
    with Simulation(denoiser, layers, None) as simulation:
        for call in range(len(LABELS) // batch):
            part = slice(call * batch, (call + 1) * batch)
            walk = denoiser.walk(LABELS[part], SEEDS[part])
            inputs = next(walk)
            for step in range(5):

                def visit(site, x, step=step, call=call):
                    peaks[sites.index(site), step, call] = x.abs().max().item()
                    return x, 1.0

                output = simulation.run(inputs, visit)
                if step < 4:
                    inputs = walk.send(output)
    return peaks, sites


def test_uniform_steps_hold_both_ends_and_each_once():
    assert observed_steps(recipe(scheme="static", observed_steps="uniform:3"), 5) == {0: 1, 2: 1, 4: 1}
    assert observed_steps(recipe(), 5) == dict.fromkeys(range(5), 1)


def test_normal_steps_lean_to_the_clean_end_and_repeat_with_their_seed():
    settings = {"model": "toy", "num_inference_steps": 50, "guidance_scale": 1.0, "height": 16, "width": 16}
    big = Recipe(**settings, scheme="static", observed_steps="normal:4000")
    drawn = observed_steps(big, 50)
    assert sum(drawn.values()) == 4000
    assert drawn == observed_steps(big, 50)
    assert drawn != observed_steps(dataclasses.replace(big, seed=1), 50)
    mean = sum(step * count for step, count in drawn.items()) / 4000
    # of N(0.4, 0.4) cut to [0, 1): 0.4 + 0.4 (phi(-1) - phi(1.5)) / (Phi(1.5) - Phi(-1)) = 0.4579 of the way from clean to noisy
    assert mean == pytest.approx(49.5 - 50 * 0.4579, abs=0.7)


def test_static_counts_only_the_observed_steps():
    """The last step alone and the first alone give other ranges than all, and min-max of all holds both."""
    everything, _ = run(scheme="static", ranges="minmax", affine=False)
    few, _ = run(scheme="static", ranges="minmax", affine=False, observed_steps="uniform:1")
    assert (few.scale <= everything.scale).all()
    assert (few.scale < everything.scale).any()


def test_a_step_drawn_twice_counts_twice():
    drawn = observed_steps(recipe(scheme="static", observed_steps="normal:9"), 5)
    assert max(drawn.values()) > 1
    x = torch.tensor([0.5, -1.0, 2.0])
    weighted, repeated = ActivationHistogram(), ActivationHistogram()
    weighted.update(x, 3)
    for _ in range(3):
        repeated.update(x)
    assert torch.equal(weighted.counts, repeated.counts)


def test_minmax_is_the_largest_peak_of_all_steps():
    scales, _ = run(scheme="static", ranges="minmax", affine=False)
    peaks, sites = peaks_of(4)
    largest = peaks.max(axis=(1, 2))
    columns = [scales.sites.index(site) for site in sites]
    assert (scales.scale[0, columns] <= largest / 127 * (1 + 1e-6)).all()
    assert (scales.scale[0, columns] >= largest / 128 * (1 - 1e-6)).all()


def test_min_mean_is_the_least_over_steps_of_the_mean_over_calls_for_convolutions_alone():
    scales, layers = run(scheme="static", ranges="minmax", affine=False, reduce="min-mean", calib_batch=2)
    peaks, sites = peaks_of(2)
    convolutions = {layer.site for layer in layers if layer.op == "Conv2d" and layer.site}
    assert 0 < len(convolutions) < len(sites)
    for i, site in enumerate(sites):
        scale = scales.scale[0, scales.sites.index(site)]
        expected = peaks[i].mean(axis=1).min() if site in convolutions else peaks[i].max()
        # one rounding to float32; the largest of |x| counts by 128 where it is negative
        np.testing.assert_allclose(scale, expected / 127, rtol=2**-23 if site in convolutions else 1 / 128 + 2**-23)
    assert (scales.zero_point == 128).all()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"observed_steps": "uniform:6", "scheme": "static"}, "1 to 5 steps"),
        ({"observed_steps": "some", "scheme": "static"}, "write all, uniform:10"),
        ({"observed_steps": "normal:0", "scheme": "static"}, "1 or more"),
        ({"observed_steps": "uniform:2"}, "needs --scheme static"),
        ({"reduce": "min-mean"}, "needs --scheme static"),
        ({"reduce": "mean"}, "--reduce mean is unknown"),
        ({"smooth_quant": 1.5}, r"--smooth-quant must lie in \[0, 1\]"),
    ],
)
def test_settings_of_baselines_are_checked(change, match):
    with pytest.raises(PcrExportError, match=match):
        recipe(**change)
