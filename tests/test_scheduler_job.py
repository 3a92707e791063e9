"""`--scheduler` and `--guidance-rescale` from the command line to the image: what is calibrated is what is deployed."""

from __future__ import annotations

import dataclasses
import json
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from class_conditional import class_conditional_denoiser
from models.tiny_pipelines import tiny_sd

from pcr_export import load_pipeline
from pcr_export.cli import main
from pcr_export.deploy.folder import write_configs
from pcr_export.deploy.run import generate
from pcr_export.errors import PcrExportError, ScheduleWarning
from pcr_export.export_job import Job
from pcr_export.export_pipeline import pipeline_job
from pcr_export.models.catalog import resolve
from pcr_export.models.denoiser import noise_levels
from pcr_export.models.load import load_model
from pcr_export.models.pipelines import denoiser_from_pipeline
from pcr_export.models.schedulers import make_scheduler, read_scheduler
from pcr_export.qdiffbench.painters import settings_of
from pcr_export.recipe import Recipe, read_recipe
from pcr_export.step_scales import read_step_scales

ASKED = "KDPM2AncestralDiscreteScheduler:use_karras_sigmas=true"
SETTINGS = {"num_inference_steps": 5, "guidance_scale": 5.0, "height": 16, "width": 16}


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["pcr-export", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        main()
    return int(stop.value.code or 0)


def test_the_scheduler_that_was_asked_for_is_everywhere(tmp_path: Path) -> None:
    """In the walk that calibrates, in the exported folder, and in the float model that evaluate and study paint."""
    source = tiny_sd(tmp_path / "random")
    asked = {**SETTINGS, "scheduler": ASKED, "guidance_rescale": 0.7}
    model = load_model(dataclasses.replace(resolve(str(source)), **asked))
    job = pipeline_job(model, Recipe(model=str(source), calib_size=1, **asked), ["a"], tmp_path)
    write_configs(model.pipeline, tmp_path / "exported")
    of_folder = read_scheduler(tmp_path / "exported")
    assert of_folder.to_json_string() == model.pipeline.scheduler.to_json_string()
    assert type(of_folder).__name__ == ASKED.split(":")[0]
    assert of_folder.config.use_karras_sigmas
    painted = settings_of(job.recipe).load()
    assert painted.timesteps == job.denoiser.timesteps
    outputs = []
    for denoiser in (painted, job.denoiser):
        walk = denoiser.walk(["a"], [1])
        inputs = next(walk)
        noise = torch.randn(inputs["sample"].shape, generator=torch.Generator().manual_seed(0))
        outputs.append(walk.send(noise)["sample"])
    assert torch.equal(*outputs)
    plain = denoiser_from_pipeline(model.pipeline, **SETTINGS).walk(["a"], [1])
    assert not torch.equal(outputs[0], (next(plain), plain.send(noise))[1]["sample"])  # guidance that is not rescaled


@pytest.mark.slow
def test_calibrate_with_what_you_deploy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A scheduler whose timesteps do not descend, with rescaled guidance: exported, drawn, drawn by diffusers, painted in float."""
    source = tiny_sd(tmp_path / "random")
    small = ("--steps", 5, "--guidance-scale", 5, "--calib-size", 2, "--height", 16, "--width", 16, "--no-validate")
    asked = ("--scheduler", ASKED, "--guidance-rescale", 0.7, "--relax", "0:2")
    assert run(monkeypatch, source, "--out", tmp_path, *small, *asked) == 0
    folder = tmp_path / "random-w8a8"
    recipe = read_recipe(folder)
    assert (recipe.scheduler, recipe.guidance_rescale) == (ASKED, 0.7)
    config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text("utf-8"))
    assert (config["_class_name"], config["use_karras_sigmas"]) == ("KDPM2AncestralDiscreteScheduler", True)
    assert json.loads((folder / "model_index.json").read_text("utf-8"))["scheduler"][1] == config["_class_name"]

    denoiser = settings_of(recipe).load()  # as evaluate and study paint the float model
    assert list(dict.fromkeys(denoiser.timesteps)) != noise_levels(denoiser.timesteps)
    scales = read_step_scales(folder / "step_scales.safetensors")
    assert scales.timesteps.tolist() == noise_levels(denoiser.timesteps)
    assert np.flatnonzero(scales.bits > 8).tolist() == [0, 1]

    pipeline = load_pipeline(folder)
    pipeline.set_progress_bar_config(disable=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ScheduleWarning)
        drawn = generate(folder, "a red circle", seed=1)
        torch.manual_seed(5)
        assert np.array_equal(generate(folder, "a red circle", seed=1), drawn)
    generator = torch.Generator().manual_seed(1)
    kwargs = {"generator": generator, "output_type": "np", "guidance_rescale": 0.7, **SETTINGS}
    (image,) = pipeline("a red circle", **kwargs).images
    assert np.array_equal(drawn, (image * 255).round().astype(np.uint8))


def test_two_schedulers_of_equal_settings_are_two_walks(tmp_path: Path) -> None:
    """DPM2 and LMS have the same settings: images and calibrations of one are not kept for the other."""
    model = load_model(dataclasses.replace(resolve(str(tiny_sd(tmp_path / "model"))), **SETTINGS))
    keys = []
    for name in ("KDPM2DiscreteScheduler", "LMSDiscreteScheduler"):
        own = model.pipeline.scheduler
        scheduler = make_scheduler(name, own.config, type(own).__name__, type(model.pipeline))
        model.pipeline.register_modules(scheduler=scheduler)
        job = pipeline_job(model, Recipe(model="x", calib_size=1, **SETTINGS), ["a"], tmp_path)
        keys.append(job.walk_key)
        assert str(tmp_path) not in str(job.walk_key["scheduler"])
    assert keys[0] != keys[1]


def test_relaxed_steps_are_noise_levels(tmp_path: Path) -> None:
    """Of second order there are more than steps, which the job knows; a level that is none of them is refused before calibration."""
    recipe = Recipe(model="x", relax="5:7", **SETTINGS)
    denoiser = class_conditional_denoiser()  # of five
    with pytest.raises(PcrExportError, match="--relax 5:7 names step 6, but the 5 steps are 0 to 4"):
        Job(denoiser=denoiser, recipe=recipe, conditions=[0], folder=tmp_path)
    second_order = dataclasses.replace(denoiser, timesteps=tuple(float(t) for t in range(7, 0, -1)))
    Job(denoiser=second_order, recipe=recipe, conditions=[0], folder=tmp_path)
    with pytest.raises(PcrExportError, match="--relax 9:11 names step 10, but the 5 steps are 0 to 4"):
        Recipe(model="x", relax="9:11", **SETTINGS)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (("--scheduler", "Euler"), "unknown scheduler 'Euler': did you mean EulerDiscreteScheduler"),
        (("--scheduler", "DPMSolverSDEScheduler"), "use --scheduler DPMSolverMultistepScheduler:algorithm_type"),
        (("--guidance-rescale", "2"), "--guidance-rescale must lie in [0, 1], got 2.0"),
        (("--guidance-rescale", "0.5", "--guidance-scale", "1"), "needs guidance: give a --guidance-scale above 1"),
    ],
)
def test_refused_before_anything_is_loaded(
    options: tuple[str, ...],
    line: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(monkeypatch, "tiny-sdxl", "--out", tmp_path / "out", *options) == 2
    (error,) = capsys.readouterr().err.strip().splitlines()
    assert line in error
    assert not (tmp_path / "out").exists()
