"""Every scheduler that can stand in for a pipeline's own: the walk is diffusers' bit for bit, or one line says what to use instead."""

from __future__ import annotations

import dataclasses
import inspect
import json
import random
import shutil
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import safetensors.torch
import torch
from diffusers import EDMEulerScheduler, EulerDiscreteScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import dummy_torch_and_scipy_objects
from models.tiny_pipelines import CROSS_ATTENTION, POOLED, TIME_IDS, tiny_sd, tiny_sdxl

from pcr_export.errors import PcrExportError
from pcr_export.models.catalog import resolve
from pcr_export.models.denoiser import noise_levels, sample
from pcr_export.models.load import LoadedModel, load_float_pipeline, load_model
from pcr_export.models.pipelines import denoiser_from_pipeline
from pcr_export.models.schedulers import check_walk, make_scheduler, read_scheduler
from pcr_export.scheduler_setting import BY_NOISE_SCHEDULE, BY_SIGMA, INSTEAD, parse_scheduler

PROMPTS, SEEDS, STEPS = ["a red circle", "a blue square"], [7, 3], 5
VARIANTS: dict[str, dict[str, str]] = {
    "plain": {},
    "karras": {"use_karras_sigmas": "true"},
    "exponential": {"use_exponential_sigmas": "true"},
    "beta": {"use_beta_sigmas": "true"},
    "trailing": {"timestep_spacing": "trailing"},
    "linspace": {"timestep_spacing": "linspace"},
    "zero-snr": {
        "rescale_betas_zero_snr": "true",
        "timestep_spacing": "trailing",
        "prediction_type": "v_prediction",
    },
    "v": {"prediction_type": "v_prediction"},
    "sde": {"algorithm_type": "sde-dpmsolver++"},
    "prk": {"skip_prk_steps": "false"},
    "continuous": {"timestep_type": "continuous", "prediction_type": "v_prediction"},
    "flow": {"use_flow_sigmas": "true", "prediction_type": "flow_prediction"},
}
NO_STOCHASTIC = ("DEISMultistepScheduler", "SASolverScheduler")  # whose algorithm_type has no other value


def settings_of(name: str) -> list[str]:
    """Every variant that the constructor takes, as --scheduler takes it."""
    taken = inspect.signature(getattr(diffusers, name)).parameters
    return [
        str(parse_scheduler(f"{name}:{','.join(f'{key}={value}' for key, value in values.items())}".rstrip(":")))
        for variant, values in VARIANTS.items()
        if set(values) <= set(taken) and not (variant == "sde" and name in NO_STOCHASTIC)
    ]


MATRIX = [setting for name in BY_NOISE_SCHEDULE for setting in settings_of(name)]
SIGMA_MATRIX = [setting for name in BY_SIGMA for setting in settings_of(name)]


def small_unet(**conditioning: Any) -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        layers_per_block=1,
        attention_head_dim=1,
        cross_attention_dim=CROSS_ATTENTION,
        norm_num_groups=4,
        **conditioning,
    ).eval()


def with_small_unet(folder: Path, make: Any, **conditioning: Any) -> LoadedModel:
    model = load_model(resolve(str(make(folder))))
    model.pipeline.register_modules(unet=small_unet(**conditioning))
    model.pipeline.set_progress_bar_config(disable=True)
    return model


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return with_small_unet(tmp_path_factory.mktemp("sd"), tiny_sd)


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    added = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": TIME_IDS,
        "projection_class_embeddings_input_dim": 6 * TIME_IDS + POOLED,
    }
    return with_small_unet(tmp_path_factory.mktemp("sdxl"), tiny_sdxl, **added)


def set_global_random_state(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def check_equal(model: LoadedModel, setting: str, own: Any = None, **options: Any) -> None:
    """The walk gives the pipeline's own latents, each from another global random state: so neither depends on it."""
    pipeline = model.pipeline
    own = own or pipeline.scheduler
    scheduler = make_scheduler(setting, own.config, type(own).__name__, type(pipeline))
    kwargs = {"num_inference_steps": STEPS, "guidance_scale": 5.0, "height": 16, "width": 16, **options}
    denoiser = denoiser_from_pipeline(pipeline, scheduler=scheduler, **kwargs)
    set_global_random_state(1)
    latents = sample(denoiser, denoiser, PROMPTS, SEEDS)
    set_global_random_state(2)
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    before = pipeline.scheduler
    pipeline.register_modules(scheduler=scheduler)
    try:
        expected = pipeline(prompt=PROMPTS, generator=generators, output_type="latent", **kwargs).images
    finally:
        pipeline.register_modules(scheduler=before)
    assert latents.isfinite().all()
    assert torch.equal(latents, expected)


@pytest.mark.parametrize("setting", MATRIX)
def test_walk_equals_that_of_stable_diffusion(sd: LoadedModel, setting: str) -> None:
    check_equal(sd, setting)


@pytest.mark.parametrize("setting", BY_NOISE_SCHEDULE)
def test_walk_equals_that_of_sdxl(sdxl: LoadedModel, setting: str) -> None:
    check_equal(sdxl, setting)


@pytest.mark.slow
@pytest.mark.parametrize("setting", [setting for setting in MATRIX if ":" in setting])
def test_walk_with_settings_equals_that_of_sdxl(sdxl: LoadedModel, setting: str) -> None:
    check_equal(sdxl, setting)


@pytest.mark.parametrize("setting", SIGMA_MATRIX)
def test_walk_by_sigma(sdxl: LoadedModel, setting: str) -> None:
    """Playground v2.5 is a StableDiffusionXLPipeline with such a scheduler, whose timesteps lie between -2 and 2."""
    check_equal(sdxl, setting, EDMEulerScheduler())


def test_every_compatible_scheduler_is_walked_or_refused(sd: LoadedModel, sdxl: LoadedModel) -> None:
    for model in (sd, sdxl):
        compatible = {each.__name__ for each in model.pipeline.scheduler.compatibles}
        assert compatible <= {*BY_NOISE_SCHEDULE, *BY_SIGMA, *INSTEAD}
    for _, instead in INSTEAD.values():
        check_equal(sd, instead)


@pytest.mark.parametrize("phi", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("guidance_scale", [1.0, 7.5])
def test_rescaled_guidance_is_diffusers_own(sd: LoadedModel, guidance_scale: float, phi: float) -> None:
    if phi and guidance_scale <= 1:
        with pytest.raises(PcrExportError, match="changes nothing without guidance: give a guidance scale above 1"):
            check_equal(sd, "DDIMScheduler", guidance_scale=guidance_scale, guidance_rescale=phi)
    else:
        check_equal(sd, "DDIMScheduler", guidance_scale=guidance_scale, guidance_rescale=phi)


@pytest.mark.parametrize("phi", [-0.1, 1.5, float("nan")])
def test_rescale_out_of_bounds(sd: LoadedModel, phi: float) -> None:
    with pytest.raises(PcrExportError, match="give a number from 0 to 1"):
        check_equal(sd, "DDIMScheduler", guidance_rescale=phi)


@pytest.mark.parametrize("phi", [0.0, 0.7])
@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_negative_prompts_and_rescaling_together(name: str, phi: float, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(name)
    kwargs = {"num_inference_steps": STEPS, "guidance_scale": 5.0, "height": 16, "width": 24, "guidance_rescale": phi}
    denoiser = denoiser_from_pipeline(model.pipeline, negative_prompt="a star", **kwargs)
    generators = [torch.Generator().manual_seed(seed) for seed in (*SEEDS, 5)]
    prompts = [*PROMPTS, ""]
    expected = model.pipeline(
        prompt=prompts, negative_prompt=["a star"] * 3, generator=generators, output_type="latent", **kwargs
    ).images
    assert torch.equal(sample(denoiser, denoiser, prompts, [*SEEDS, 5]), expected)


@pytest.mark.parametrize("name", BY_NOISE_SCHEDULE)
def test_noise_belongs_to_its_image_whatever_is_painted_beside(sd: LoadedModel, name: str) -> None:
    pipeline, own = sd.pipeline, sd.pipeline.scheduler
    scheduler = make_scheduler(name, own.config, type(own).__name__, type(pipeline))
    denoiser = denoiser_from_pipeline(
        pipeline, num_inference_steps=3, guidance_scale=1.0, height=16, width=16, scheduler=scheduler
    )

    def latents(prompts: list[str], seeds: list[int]) -> torch.Tensor:
        return sample(denoiser, lambda inputs: 0.1 * inputs["sample"], prompts, seeds)

    torch.testing.assert_close(latents(PROMPTS, SEEDS)[1:], latents(PROMPTS[1:], SEEDS[1:]))


def test_a_scheduler_that_draws_past_the_seed_is_refused(sd: LoadedModel) -> None:
    class Careless(EulerDiscreteScheduler):
        def step(self, model_output: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            return super().step(model_output + torch.randn_like(model_output), *args, **kwargs)

    with pytest.raises(PcrExportError, match="Careless draws from the global random state, so that the same seed"):
        denoiser_from_pipeline(
            sd.pipeline, num_inference_steps=4, guidance_scale=1.0, height=16, width=16, scheduler=Careless()
        )


def test_the_check_leaves_the_global_random_state(sd: LoadedModel) -> None:
    set_global_random_state(5)
    expected = (torch.rand(1), np.random.random(), random.random())
    set_global_random_state(5)
    check_walk(sd.pipeline.scheduler, 4, StableDiffusionPipeline)
    assert (torch.rand(1), np.random.random(), random.random()) == expected


@pytest.fixture
def weightless(unchanged: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(unchanged, tmp_path / "model"))


@pytest.fixture(scope="module")
def unchanged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline folder whose UNet's file holds no weights, so that what is said of its scheduler is said before they are read."""
    folder = tiny_sd(tmp_path_factory.mktemp("weightless") / "model")
    (folder / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(safetensors.torch.save({}))
    return folder


SDE = r"DPMSolverMultistepScheduler:algorithm_type=sde-dpmsolver\+\+,use_karras_sigmas=true"
REFUSED = [
    ("DPMSolverSDEScheduler", rf"same seed gives another image each time: use --scheduler {SDE}"),
    ("EDMEulerScheduler", "EDMEulerScheduler can't replace PNDMScheduler: choose one of DDIMScheduler"),
    ("EulerScheduler", "unknown scheduler 'EulerScheduler': did you mean Euler.*Scheduler"),
    ("EulerDiscreteScheduler:karras=true", "EulerDiscreteScheduler has no karras: choose of .*use_karras_sigmas"),
    (
        "EulerDiscreteScheduler:timestep_spacing=last",
        "can't have timestep_spacing=last: write linspace or leading or t",
    ),
    ("EulerDiscreteScheduler:use_karras_sigmas=1", "can't have use_karras_sigmas=1: write true or false"),
    ("EulerDiscreteScheduler:trained_betas=1", "can't have trained_betas=1: write none"),
    ("DEISMultistepScheduler:solver_order=2.5", r"can't have solver_order=2\.5: write a whole number"),
    ("UniPCMultistepScheduler:solver_p=x", "can't have solver_p=x: leave it out, it is no text"),
    ("EulerDiscreteScheduler:steps_offset=0", "StableDiffusionPipeline samples with steps_offset=1 only: leave it out"),
    ("EulerDiscreteScheduler:use_karras_sigmas=true,use_beta_sigmas=true", "can't be set up so .Only one of"),
    ("DDIMScheduler:beta_schedule=x", "DDIMScheduler can't be set up so .x is not implemented"),
    (
        "DDIMScheduler:rescale_betas_zero_snr=true,timestep_spacing=trailing",
        "rescale_betas_zero_snr needs a model of p",
    ),
    (
        "DPMSolverMultistepScheduler:use_beta_sigmas=true",
        "50 steps can't be sampled by DPMSolverMultistepScheduler .*out of",
    ),
    (
        "EulerDiscreteScheduler:prediction_type=x",
        r"can't be sampled by EulerDiscreteScheduler \(prediction_type given as x",
    ),
]


@pytest.mark.parametrize(("asked", "match"), REFUSED)
def test_refused_before_weights_are_read(unchanged: Path, asked: str, match: str) -> None:
    with pytest.raises(PcrExportError, match=match) as refusal:
        load_float_pipeline(dataclasses.replace(resolve(str(unchanged)), scheduler=asked))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("DPMSolverSDEScheduler", rf"has a DPMSolverSDEScheduler, which draws .*: add --scheduler {SDE}"),
        ("DDIMInverseScheduler", "DDIMInverseScheduler goes from an image to noise: use another scheduler"),
        (
            "FlowMatchEulerDiscreteScheduler",
            "can't be sampled by FlowMatchEulerDiscreteScheduler .*or choose another with",
        ),
        ("UNet2DModel", "has no scheduler UNet2DModel: choose another with --scheduler"),
    ],
)
def test_a_folders_own_scheduler_is_refused_before_weights_are_read(weightless: Path, name: str, match: str) -> None:
    rename_scheduler(weightless, name)
    with pytest.raises(PcrExportError, match=match):
        load_float_pipeline(resolve(str(weightless)))


def rename_scheduler(folder: Path, name: str) -> None:
    for path, change in (
        ("model_index.json", {"scheduler": ["diffusers", name]}),
        ("scheduler/scheduler_config.json", {}),
    ):
        values = {**json.loads((folder / path).read_text("utf-8")), **change}
        (folder / path).write_text(json.dumps(values), "utf-8")


def test_a_refused_scheduler_can_be_replaced(weightless: Path) -> None:
    rename_scheduler(weightless, "DPMSolverSDEScheduler")
    scheduler = read_scheduler(weightless, INSTEAD["DPMSolverSDEScheduler"][1])
    assert scheduler.config.beta_end == 0.012
    assert scheduler.config.use_karras_sigmas
    check_walk(scheduler, 4, StableDiffusionPipeline)


def test_a_missing_package_is_named(unchanged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What diffusers itself puts in the place of a class where scipy is missing."""
    monkeypatch.setattr(diffusers, "LMSDiscreteScheduler", dummy_torch_and_scipy_objects.LMSDiscreteScheduler)
    with pytest.raises(PcrExportError, match="LMSDiscreteScheduler needs scipy: pip install scipy"):
        load_float_pipeline(dataclasses.replace(resolve(str(unchanged)), scheduler="LMSDiscreteScheduler"))


def test_the_rest_is_as_the_folder_has_it(tmp_path: Path) -> None:
    """As `NAME.from_config(pipeline.scheduler.config, key=value)` makes it, and what the pipeline's constructor makes of that."""
    folder = tiny_sd(tmp_path)
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    values = {"timestep_spacing": "trailing", "use_karras_sigmas": True, "sigma_max": 10.0}
    expected = EulerDiscreteScheduler.from_config(pipeline.scheduler.config, **values)
    asked = "EulerDiscreteScheduler:timestep_spacing=trailing, use_karras_sigmas=True,sigma_max=10"
    scheduler = load_float_pipeline(dataclasses.replace(resolve(str(folder)), scheduler=asked)).scheduler
    assert scheduler.to_json_string() == expected.to_json_string()
    with_none = EulerDiscreteScheduler.from_config(expected.config, sigma_max=None)
    assert make_scheduler(
        "EulerDiscreteScheduler:sigma_max=none", expected.config, "X", StableDiffusionPipeline
    ).config == (with_none.config)


@pytest.mark.parametrize(("steps", "inverted"), [(5, True), (20, True)])
def test_levels_descend_though_the_walk_does_not(sd: LoadedModel, steps: int, inverted: bool) -> None:
    denoiser = denoiser_from_pipeline(
        sd.pipeline,
        num_inference_steps=steps,
        guidance_scale=1.0,
        height=16,
        width=16,
        scheduler="KDPM2AncestralDiscreteScheduler:use_karras_sigmas=true",
    )
    levels = noise_levels(denoiser.timesteps)
    assert (list(dict.fromkeys(denoiser.timesteps)) != levels) == inverted
    assert (np.diff(np.array(levels, np.float32)) < 0).all()  # in the table's float32, too
    walked = []
    sample(denoiser, lambda inputs: walked.append(float(inputs["timestep"])) or inputs["sample"], ["a"], [1])
    assert tuple(walked) == denoiser.timesteps
