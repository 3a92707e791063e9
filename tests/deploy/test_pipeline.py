"""`pcr_export.load_pipeline`: pipelines of diffusers over an exported folder."""

from __future__ import annotations

import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from deploy.conftest import ExportedFolder
from deploy.test_schedule import write_scales
from PIL import Image

import pcr_export
from pcr_export.deploy.run import generate
from pcr_export.engines.flavours import gpu_target
from pcr_export.errors import PcrExportError, ScheduleWarning
from pcr_export.models.pipelines import Pipeline
from pcr_export.recipe import Recipe

# float32: sums of up to 1152 in another order than torch's (7e-5 of latents of order 1), guided: 5 + 4 times that
ROUNDING = 9 * 1152 * 2**-24
PROMPT = "a red circle"
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8))
MASK = Image.fromarray(np.repeat(np.repeat(np.array([[0, 255], [255, 255]], np.uint8), 8, 0), 8, 1))
TASKS = {
    "text-to-image": ("Pipeline", {"height": 16, "width": 16}),
    "image-to-image": ("Img2ImgPipeline", {"image": PICTURE, "strength": 0.7}),
    "inpainting": (
        "InpaintPipeline",
        {"image": PICTURE, "mask_image": MASK, "strength": 0.9, "height": 16, "width": 16},
    ),
}


def draw(pipeline: Pipeline, **arguments: object) -> np.ndarray:
    """float32 [1, 16, 16, 3] in 0..1."""
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    return pipeline(PROMPT, num_inference_steps=5, generator=generator, output_type="np", **arguments).images


@pytest.mark.parametrize("name", ["sd", "sdxl"])
@pytest.mark.parametrize("task", TASKS)
def test_each_task_draws_what_torch_draws(name: str, task: str, request: pytest.FixtureRequest) -> None:
    exported: ExportedFolder = request.getfixturevalue(name)
    kind, arguments = TASKS[task]
    class_name = type(exported.model.pipeline).__name__.removesuffix("Pipeline") + kind
    pipeline = pcr_export.load_pipeline(exported.folder, task=task, threads=1)
    assert type(pipeline) is getattr(diffusers, class_name)
    with_torch = type(pipeline).from_pipe(exported.model.pipeline)
    np.testing.assert_allclose(draw(pipeline, **arguments), draw(with_torch, **arguments), atol=ROUNDING, rtol=0)


def test_other_pipelines_of_diffusers_take_the_same_parts(sdxl: ExportedFolder) -> None:
    pipeline = pcr_export.load_pipeline(str(sdxl.folder), threads=1)
    _, arguments = TASKS["image-to-image"]
    expected = draw(pcr_export.load_pipeline(sdxl.folder, task="image-to-image", threads=1), **arguments)
    of_components = diffusers.StableDiffusionXLImg2ImgPipeline(**pipeline.components)
    from_pipe = diffusers.AutoPipelineForImage2Image.from_pipe(pipeline)
    for other in (of_components, from_pipe):
        assert other.unet is pipeline.unet
        assert np.array_equal(draw(other, **arguments), expected)


def test_another_scheduler_takes_the_nearest_scales_and_is_warned_of(sdxl: ExportedFolder, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sdxl.folder, tmp_path / "copy"))
    write_scales(folder)
    pipeline = pcr_export.load_pipeline(folder, threads=1)
    pipeline.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    with pytest.warns(ScheduleWarning, match="none of the 4 calibrated ones") as caught:
        first = draw(pipeline)
    assert len([warning for warning in caught if warning.category is ScheduleWarning]) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error", ScheduleWarning)
        assert np.array_equal(draw(pipeline), first)


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_generate_and_load_pipeline_draw_the_same_image(
    name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """To the pixel: noise, text and network are the same calls; only the loop around them is written twice."""
    folder = Path(shutil.copytree(request.getfixturevalue(name).folder, tmp_path / "copy"))
    recipe = Recipe(model="x", num_inference_steps=4, guidance_scale=5.0, height=16, width=24)
    (folder / "recipe.json").write_text(recipe.to_json(), "utf-8")
    pipeline = pcr_export.load_pipeline(folder)
    pipeline.set_progress_bar_config(disable=True)
    for seed in (0, 7):
        (image,) = pipeline(
            PROMPT,
            negative_prompt="x",
            num_inference_steps=4,
            guidance_scale=5.0,
            height=16,
            width=24,
            generator=torch.Generator().manual_seed(seed),
        ).images
        assert np.array_equal(np.asarray(image), generate(folder, PROMPT, seed=seed, negative_prompt="x"))


def test_importing_the_package_stays_light() -> None:
    code = "import sys, pcr_export; print('load_pipeline' in pcr_export.__all__, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False"]


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"task": "img2img"}, "task 'img2img' is unknown: choose one of text-to-image, image-to-image, inpainting"),
        ({"backend": "openvino"}, "backend 'openvino' is unknown: choose one of onnxruntime, tensorrt-rtx"),
        ({"target": "sm89"}, "target 'sm89' is an engine's: give backend='tensorrt-rtx' or 'tensorrt' with it"),
        ({"backend": "tensorrt", "target": "sm89"}, "has no engine for sm89 .*: export again with"),
    ],
)
def test_what_can_not_be_is_refused(sdxl: ExportedFolder, arguments: dict[str, str], match: str) -> None:
    with pytest.raises(PcrExportError, match=match):
        pcr_export.load_pipeline(sdxl.folder, **arguments)


@pytest.mark.skipif(gpu_target() is not None, reason="this machine has a GPU")
def test_tensorrt_without_a_gpu_says_what_to_do(sdxl: ExportedFolder) -> None:
    with pytest.raises(PcrExportError, match=r"no CUDA GPU here for tensorrt-rtx .*: use backend='onnxruntime'"):
        pcr_export.load_pipeline(sdxl.folder, backend="tensorrt-rtx")


def test_a_folder_without_the_encoder_still_draws_from_text(sdxl: ExportedFolder, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sdxl.folder, tmp_path / "copy"))
    shutil.rmtree(folder / "vae_encoder")
    pipeline = pcr_export.load_pipeline(folder, threads=1)
    assert draw(pipeline, height=16, width=16).shape == (1, 16, 16, 3)
    with pytest.raises(PcrExportError, match=r"vae_encoder/model\.onnx is missing, which encodes images: export again"):
        draw(diffusers.StableDiffusionXLImg2ImgPipeline(**pipeline.components), image=PICTURE)
    with pytest.raises(PcrExportError, match=r"vae_encoder/model\.onnx is missing"):
        pcr_export.load_pipeline(folder, task="inpainting")
