"""The walk gives the latents of diffusers' own pipelines, bit for bit."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from models.tiny_pipelines import TOKENS, tiny_sd, tiny_sdxl

from pcr_export.errors import PcrExportError
from pcr_export.models.catalog import resolve
from pcr_export.models.denoiser import sample
from pcr_export.models.load import LoadedModel, load_denoiser, load_model
from pcr_export.models.pipelines import denoiser_from_pipeline

PROMPTS = ["a red circle", "a blue square above a star"]
SEEDS = [7, 3]
STEPS = 4

SCHEDULERS = [
    ("PNDMScheduler", "epsilon"),
    ("PNDMScheduler", "v_prediction"),
    ("DDIMScheduler", "epsilon"),
    ("DDIMScheduler", "v_prediction"),
    ("EulerDiscreteScheduler", "epsilon"),
    ("EulerDiscreteScheduler", "v_prediction"),
    ("EulerAncestralDiscreteScheduler", "epsilon"),
    ("DPMSolverMultistepScheduler", "epsilon"),
    ("DPMSolverMultistepScheduler", "v_prediction"),
    ("LCMScheduler", "epsilon"),
]


@pytest.fixture(scope="module", params=[tiny_sd, tiny_sdxl], ids=["sd", "sdxl"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_model(resolve(str(request.param(tmp_path_factory.mktemp("pipeline")))))


def generators() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in SEEDS]


def pipeline_latents(
    model: LoadedModel, guidance_scale: float, output_type: str = "latent", **options: object
) -> torch.Tensor:
    model.pipeline.set_progress_bar_config(disable=True)
    return model.pipeline(
        prompt=PROMPTS,
        num_inference_steps=STEPS,
        guidance_scale=guidance_scale,
        generator=generators(),
        output_type=output_type,
        **options,
    ).images


def settings(**changes: object) -> dict[str, object]:
    return {"num_inference_steps": STEPS, "guidance_scale": 5.0, "height": 16, "width": 16, **changes}


@pytest.mark.parametrize(("name", "prediction_type"), SCHEDULERS)
def test_walk_equals_pipeline(model: LoadedModel, name: str, prediction_type: str) -> None:
    import diffusers

    config = {**model.pipeline.scheduler.config, "prediction_type": prediction_type}
    model.pipeline.register_modules(scheduler=getattr(diffusers, name).from_config(config))
    denoiser = denoiser_from_pipeline(model.pipeline, **settings())
    latents = sample(denoiser, denoiser, PROMPTS, SEEDS)
    assert torch.equal(latents, pipeline_latents(model, 5.0))
    assert latents.isfinite().all()


@pytest.mark.parametrize("guidance_scale", [0.0, 1.0, 1.5])
def test_guidance(model: LoadedModel, guidance_scale: float) -> None:
    denoiser = denoiser_from_pipeline(model.pipeline, **settings(guidance_scale=guidance_scale))
    inputs = next(denoiser.walk(PROMPTS, SEEDS))
    assert len(inputs["sample"]) == (4 if guidance_scale > 1 else 2)
    assert torch.equal(sample(denoiser, denoiser, PROMPTS, SEEDS), pipeline_latents(model, guidance_scale))


def test_negative_prompt(model: LoadedModel) -> None:
    denoiser = denoiser_from_pipeline(model.pipeline, **settings(negative_prompt="a star"))
    expected = pipeline_latents(model, 5.0, negative_prompt=["a star"] * 2)
    assert torch.equal(sample(denoiser, denoiser, PROMPTS, SEEDS), expected)


def test_other_size(model: LoadedModel) -> None:
    denoiser = denoiser_from_pipeline(model.pipeline, **settings(height=24, width=32))
    latents = sample(denoiser, denoiser, PROMPTS, SEEDS)
    assert latents.shape == (2, 4, 12, 16)
    assert torch.equal(latents, pipeline_latents(model, 5.0, height=24, width=32))


def test_decode_equals_pipeline(model: LoadedModel) -> None:
    denoiser = denoiser_from_pipeline(model.pipeline, **settings())
    assert denoiser.decode is not None
    images = denoiser.decode(sample(denoiser, denoiser, PROMPTS, SEEDS))
    assert images.shape == (2, 3, 16, 16)
    assert torch.equal(images, pipeline_latents(model, 5.0, output_type="pt"))


@pytest.mark.parametrize("make", [tiny_sd, tiny_sdxl], ids=["sd", "sdxl"])
def test_latent_consistency_unet_takes_guidance_as_input(make: object, tmp_path: Path) -> None:
    model = load_model(resolve(str(make(tmp_path, scheduler="LCMScheduler", time_cond_proj_dim=24))))
    assert (model.entry.num_inference_steps, model.entry.guidance_scale, model.entry.relaxed_end) == (4, 8.0, None)
    denoiser = model.denoiser()
    inputs = next(denoiser.walk(PROMPTS, SEEDS))
    assert list(inputs) == list(denoiser.dynamic_axes)
    assert inputs["timestep_cond"].shape == (2, 24)
    assert torch.equal(sample(denoiser, denoiser, PROMPTS, SEEDS), pipeline_latents(model, 8.0))


@pytest.mark.parametrize("scheduler", ["EulerAncestralDiscreteScheduler", "LCMScheduler"])
def test_noise_belongs_to_the_prompt_and_not_to_the_batch(scheduler: str, tmp_path: Path) -> None:
    model = load_model(resolve(str(tiny_sd(tmp_path, scheduler=scheduler))))
    denoiser = model.denoiser()
    together, alone = denoiser.walk(PROMPTS, SEEDS), denoiser.walk(PROMPTS[1:], SEEDS[1:])
    first, second = next(together), next(alone)
    zeros = [torch.zeros_like(inputs["sample"]) for inputs in (first, second)]
    first, second = together.send(zeros[0]), alone.send(zeros[1])
    assert torch.equal(first["sample"].chunk(2)[0][1:], second["sample"].chunk(2)[0])


@pytest.mark.parametrize("scheduler", ["PNDMScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler"])
def test_walk_yields_what_the_denoiser_declares(scheduler: str, tmp_path: Path) -> None:
    denoiser = load_denoiser(str(tiny_sdxl(tmp_path, scheduler=scheduler)))
    assert list(denoiser.dynamic_axes) == ["sample", "timestep", "encoder_hidden_states", "text_embeds", "time_ids"]
    walk = denoiser.walk(PROMPTS[:1], [1])
    inputs, timesteps = next(walk), []
    assert inputs["encoder_hidden_states"].shape == (2, TOKENS, 32)
    assert inputs["time_ids"].tolist() == [[16, 16, 0, 0, 16, 16]] * 2
    while True:
        assert inputs["timestep"].shape == ()
        assert inputs["timestep"].dtype == torch.float32
        timesteps.append(float(inputs["timestep"]))
        try:
            inputs = walk.send(torch.zeros_like(inputs["sample"]))
        except StopIteration:
            break
    assert tuple(timesteps) == denoiser.timesteps


def test_walks_do_not_disturb_each_other(model: LoadedModel) -> None:
    denoiser = denoiser_from_pipeline(model.pipeline, **settings())
    expected = sample(denoiser, denoiser, PROMPTS, SEEDS)
    half_way = denoiser.walk(PROMPTS, SEEDS)
    half_way.send(denoiser(next(half_way)))
    assert torch.equal(sample(denoiser, denoiser, PROMPTS, SEEDS), expected)


@pytest.mark.parametrize(
    ("changes", "advice"),
    [
        ({"num_inference_steps": 0}, "give 1 or more"),
        ({"height": 20}, "multiples of 8"),
        ({"width": 0}, "multiples of 8"),
    ],
)
def test_settings_that_cannot_be_sampled(model: LoadedModel, changes: dict[str, object], advice: str) -> None:
    with pytest.raises(PcrExportError, match=advice):
        denoiser_from_pipeline(model.pipeline, **settings(**changes))


def test_incomplete_entry_is_refused(model: LoadedModel) -> None:
    bare = dataclasses.replace(model, entry=dataclasses.replace(model.entry, guidance_scale=None))
    with pytest.raises(ValueError, match="load_model"):
        bare.denoiser()
