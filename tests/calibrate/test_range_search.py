"""`--ranges auto`: every estimator is tried to the final latents, and the best one is what is exported."""

import json

import pytest
import torch
from class_conditional import class_conditional_denoiser

from pcr_export.calibrate.layers import find_layers
from pcr_export.calibrate.progressive import calibrate
from pcr_export.calibrate.range_search import RangeSearch
from pcr_export.calibrate.ranges import ActivationHistogram, find_quantizer
from pcr_export.calibrate.simulate import Simulation, simulated_call
from pcr_export.calibrate.weights.rounding import NEAREST_8
from pcr_export.export import export_denoiser
from pcr_export.export_job import Job
from pcr_export.models.denoiser import sample
from pcr_export.recipe import ESTIMATORS, Recipe
from pcr_export.report import summary_rows

LABELS, SEEDS = [0, 1, 2], [10, 11, 12]
JUDGES = [3, 4], [20, 21]


def recipe(**changes):
    size = {"num_inference_steps": 5, "guidance_scale": 1.0, "height": 16, "width": 16}
    return Recipe(**{"model": "toy", **size, "ranges": "auto", **changes})


def search(folder, denoiser, **changes):
    layers = find_layers(denoiser, next(denoiser.walk(LABELS, SEEDS)), ("conv_in", "conv_out"))
    return RangeSearch(
        denoiser=denoiser,
        layers=layers,
        observed=(LABELS, SEEDS),
        judged=JUDGES,
        recipe=recipe(**changes),
        folder=folder,
        key={"model": "toy"},
    ), layers


def test_each_estimator_is_judged_by_the_final_latents(tmp_path):
    denoiser = class_conditional_denoiser()
    searched, layers = search(tmp_path, denoiser)
    facts = searched.run()
    assert set(facts["range_sqnr_db"]) == set(ESTIMATORS)
    assert facts["range_sqnr_db"][facts["ranges"]] == max(facts["range_sqnr_db"].values())
    reference = sample(denoiser, denoiser, *JUDGES)
    for ranges, expected in facts["range_sqnr_db"].items():
        scales = calibrate(denoiser, layers, LABELS, SEEDS, recipe(ranges=ranges, scheme="float-trajectory"))
        with Simulation(denoiser, layers, NEAREST_8) as simulation:
            found = sample(denoiser, simulated_call(simulation, scales, "t"), *JUDGES)
        error, energy = ((x.double() ** 2).sum(dim=(1, 2, 3)) for x in (found - reference, reference))
        assert (10 * torch.log10(energy / error)).mean().item() == pytest.approx(expected, abs=1e-3)


def test_a_percentile_far_from_the_ends_loses(tmp_path):
    facts = search(tmp_path, class_conditional_denoiser(), percentile=60.0)[0].run()
    assert facts["ranges"] != "percentile"
    facts = search(tmp_path / "all", class_conditional_denoiser(), percentile=100.0)[0].run()
    assert facts["range_sqnr_db"]["percentile"] == pytest.approx(facts["range_sqnr_db"]["minmax"], abs=1.0)


def test_a_finished_search_calls_no_network_again(tmp_path):
    denoiser = class_conditional_denoiser()
    searched, _ = search(tmp_path, denoiser)
    first, calls = searched.run(), []
    denoiser.network.register_forward_hook(lambda *_arguments: calls.append(1))
    assert searched.run() == first
    assert calls == []


def test_an_export_uses_what_was_found(tmp_path):
    def export(ranges):
        job = Job(
            denoiser=class_conditional_denoiser(),
            recipe=recipe(ranges=ranges),
            conditions=LABELS,
            folder=tmp_path / ranges,
            validate=False,
        )
        return export_denoiser(job), (tmp_path / ranges / "step_scales.safetensors").read_bytes()

    report, scales = export("auto")
    chosen = report["calibration"]["ranges"]
    assert export(chosen)[1] == scales
    assert json.loads((tmp_path / "auto" / "recipe.json").read_text())["ranges"] == "auto"
    assert dict(summary_rows(report))["ranges"].startswith(f"{chosen}; final latents")
    again, same = export("auto")
    assert (again["calibration"]["ranges"], same) == (chosen, scales)


def test_auto_is_chosen_before_a_range_is_found():
    histogram = ActivationHistogram()
    histogram.update(torch.ones(3))
    with pytest.raises(ValueError, match="auto is no range estimator"):
        find_quantizer(histogram, ranges="auto", affine=False)
