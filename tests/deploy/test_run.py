"""Running from the folder alone gives the torch pipeline's images."""

from __future__ import annotations

import json
import random
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from deploy.conftest import ExportedFolder
from diffusers import DPMSolverMultistepScheduler
from engines.small_qdq import save_small_graph

from pcr_export.deploy.parts import ExportedUnet
from pcr_export.deploy.pipeline import load_exported_pipeline, load_pipeline
from pcr_export.deploy.run import generate, load_exported_model, with_guidance
from pcr_export.engines.build_request import BuildRequest
from pcr_export.engines.engine_folder import tensorrt_onnx
from pcr_export.engines.flavours import gpu_target
from pcr_export.engines.onnx_files import input_axes
from pcr_export.engines.tensorrt import build_engine
from pcr_export.errors import PcrExportError, PromptWarning
from pcr_export.manifest import write_manifest
from pcr_export.models.catalog import CatalogEntry
from pcr_export.models.denoiser import Inputs, sample
from pcr_export.models.pipelines import denoiser_from_pipeline
from pcr_export.recipe import Recipe
from pcr_export.scheduler_setting import INSTEAD

PROMPTS, SEEDS = ["a red circle", "a star"], [5, 6]
# float32: sums of up to 1152 in another order than torch's (7e-5 of their values, which are of order 1), guided: 5 + 4 times that
ROUNDING = 9 * 1152 * 2**-24
SETTINGS = {"num_inference_steps": 4, "guidance_scale": 5.0, "height": 16, "width": 16}


@pytest.fixture
def copy(sdxl: ExportedFolder, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sdxl.folder, tmp_path / "copy"))


def test_folder_walks_as_the_torch_pipeline_does(sdxl: ExportedFolder) -> None:
    with_torch = denoiser_from_pipeline(sdxl.model.pipeline, **SETTINGS)
    with_onnx = denoiser_from_pipeline(load_exported_pipeline(sdxl.folder, threads=1), **SETTINGS)
    latents = [sample(denoiser, denoiser, PROMPTS, SEEDS) for denoiser in (with_torch, with_onnx)]
    torch.testing.assert_close(latents[1], latents[0], atol=ROUNDING, rtol=0)
    images = [d.decode(x) for d, x in zip((with_torch, with_onnx), latents, strict=True) if d.decode is not None]
    torch.testing.assert_close(images[1], images[0], atol=ROUNDING, rtol=0)


@pytest.mark.parametrize("name", ["sdxl", "lcm"])
def test_walk_starts_from_the_same_noise_and_text(name: str, request: pytest.FixtureRequest) -> None:
    exported = request.getfixturevalue(name)
    with_torch = denoiser_from_pipeline(exported.model.pipeline, **SETTINGS)
    with_onnx = denoiser_from_pipeline(load_exported_pipeline(exported.folder, threads=1), **SETTINGS)
    assert with_onnx.dynamic_axes == with_torch.dynamic_axes
    assert with_onnx.timesteps == with_torch.timesteps
    first = [next(denoiser.walk(PROMPTS, SEEDS)) for denoiser in (with_torch, with_onnx)]
    assert list(first[1]) == list(first[0])
    assert torch.equal(first[1]["sample"], first[0]["sample"])
    for key, tensor in first[0].items():
        torch.testing.assert_close(first[1][key], tensor, atol=ROUNDING, rtol=0)


def test_latent_consistency_unet_is_given_the_guidance(lcm: ExportedFolder) -> None:
    denoiser = denoiser_from_pipeline(load_exported_pipeline(lcm.folder, threads=1), **SETTINGS)
    inputs = next(denoiser.walk(PROMPTS, SEEDS))
    expected = inputs["sample"] * inputs["timestep"] / 1000
    expected = expected + inputs["encoder_hidden_states"].mean() + inputs["timestep_cond"].mean()
    torch.testing.assert_close(denoiser(inputs), expected, atol=ROUNDING, rtol=0)
    assert generate(lcm.folder, "a star", steps=2).shape == (16, 16, 3)


def test_diffusers_own_call_works(sdxl: ExportedFolder) -> None:
    images = []
    for pipeline in (sdxl.model.pipeline, load_exported_pipeline(sdxl.folder, threads=1)):
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(1)
        images.append(pipeline(PROMPTS[0], num_inference_steps=3, generator=generator, output_type="np").images[0])
    np.testing.assert_allclose(images[1], images[0], atol=ROUNDING, rtol=0)


def test_generate(sdxl: ExportedFolder) -> None:
    image = generate(sdxl.folder, "a red circle", seed=1, steps=2)
    assert (image.shape, image.dtype) == ((16, 16, 3), np.uint8)
    assert np.array_equal(image, generate(sdxl.folder, "a red circle", seed=1, steps=2))
    for other in (
        generate(sdxl.folder, "a red circle", seed=2, steps=2),
        generate(sdxl.folder, "a red circle", seed=1, steps=3),
        generate(sdxl.folder, "a red circle", seed=1, steps=2, guidance_scale=1.0),
        generate(sdxl.folder, "a red circle", seed=1, steps=2, negative_prompt="red"),
    ):
        assert not np.array_equal(image, other)


def test_settings_come_from_the_recipe(copy: Path) -> None:
    assert load_exported_model(copy).entry.num_inference_steps == 50
    recipe = Recipe(model="x", num_inference_steps=3, guidance_scale=2.0, height=24, width=32)
    (copy / "recipe.json").write_text(recipe.to_json(), "utf-8")
    write_manifest(copy)
    entry = load_exported_model(copy).entry
    assert (entry.num_inference_steps, entry.guidance_scale, entry.height, entry.width) == (3, 2.0, 24, 32)
    assert generate(copy, "a star").shape == (24, 32, 3)


def test_no_torch_weights_are_read(copy: Path) -> None:
    assert not list(copy.rglob("*.safetensors"))


def test_prompts_that_are_cut_are_said(sdxl: ExportedFolder) -> None:
    long = "a b c d e f g h i j k l m n o p"
    with pytest.warns(PromptWarning) as caught:
        generate(sdxl.folder, long, steps=1, negative_prompt=long)
    assert [str(warning.message).split(":")[0] for warning in caught if warning.category is PromptWarning] == [
        f"1 of 1 {what} are longer than 16 tokens, and what comes after is not read"
        for what in ("prompts", "negative prompts")
    ]


def test_zero_steps_are_refused(sdxl: ExportedFolder) -> None:
    with pytest.raises(PcrExportError, match="0 steps can't be sampled"):
        generate(sdxl.folder, "a star", steps=0)


def test_pipeline_that_was_not_exported(sdxl: ExportedFolder) -> None:
    source = sdxl.model.entry.source
    with pytest.raises(PcrExportError, match=f"is no exported folder: make one with `pcr-export {re.escape(source)}`"):
        generate(Path(source), "a star")
    with pytest.raises(PcrExportError, match=r"no unet/model\.onnx, so it is no exported folder: make one with"):
        load_exported_pipeline(Path(source))


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(PcrExportError, match="is no folder: give one that an export wrote"):
        generate(tmp_path / "nowhere", "a star")


def test_folder_of_something_else(tmp_path: Path) -> None:
    with pytest.raises(PcrExportError, match="is no exported folder: make one with `pcr-export MODEL`"):
        generate(tmp_path, "a star")
    with pytest.raises(PcrExportError, match=r"has no model_index\.json"):
        load_exported_pipeline(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "vae_decoder/model.onnx",
        "text_encoder_2/config.json",
        "tokenizer_2/tokenizer.json",
        "scheduler/scheduler_config.json",
    ],
)
def test_missing_part_is_named(copy: Path, name: str) -> None:
    (copy / name).unlink()
    (copy / "tokenizer_2" / "vocab.json").unlink()
    write_manifest(copy)
    with pytest.raises(PcrExportError, match=f"{name} .*: .*export") as caught:
        generate(copy, "a star")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["unet/model.onnx", "text_encoder/model.onnx_data", "vae_decoder/model.onnx"])
def test_damaged_graph_is_named(copy: Path, name: str) -> None:
    (copy / name).write_bytes((copy / name).read_bytes()[:100])
    write_manifest(copy)  # as of an export that wrote it so
    with pytest.raises(
        PcrExportError, match=rf"cannot load .*{name.removesuffix('_data')} .*export the model again"
    ) as caught:
        generate(copy, "a star")
    assert "\n" not in str(caught.value)


def test_damaged_recipe(copy: Path) -> None:
    (copy / "recipe.json").write_text("{}", "utf-8")
    write_manifest(copy)
    with pytest.raises(PcrExportError, match="export again"):
        generate(copy, "a star")


def test_scheduler_must_be_one_of_diffusers(copy: Path) -> None:
    path = copy / "model_index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "scheduler": ["diffusers", "DiffusionPipeline"]}))
    write_manifest(copy)
    with pytest.raises(PcrExportError, match="has no scheduler DiffusionPipeline: choose another"):
        generate(copy, "a star")


def test_an_engine_that_is_not_there_is_named(sdxl: ExportedFolder) -> None:
    with pytest.raises(
        PcrExportError, match=r"has no engine for sm89 \(there: none\): export again with .*--target sm89"
    ):
        generate(sdxl.folder, "a star", engine="sm89")


@pytest.mark.skipif(gpu_target() is not None, reason="this machine has a GPU")
def test_an_engine_without_a_gpu_says_what_to_do(copy: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    request = BuildRequest(
        onnx_path=save_small_graph(tensorrt_onnx(copy)),
        engine_path=copy / "unet" / "sm89.engine",
        flavour="tensorrt-rtx",
        target="sm89",
        axes={"batch": (2, 2, 2), "height": (16, 16, 16), "width": (16, 16, 16)},
    )
    build_engine(request)
    with pytest.raises(PcrExportError, match="no CUDA GPU here: run the onnxruntime engine, or copy the folder"):
        load_exported_pipeline(copy, engine="sm89")
    with pytest.raises(PcrExportError, match="no CUDA GPU here: run the onnxruntime engine"):
        load_pipeline(copy, backend="tensorrt-rtx", target="sm89")
    with pytest.raises(PcrExportError, match="has an engine of tensorrt-rtx for sm89: give backend='tensorrt-rtx'"):
        load_pipeline(copy, backend="tensorrt", target="sm89")
    assert load_exported_pipeline(copy, threads=1).unet is not None  # which still has its own graph


def test_any_network_stands_in_for_the_unet(sdxl: ExportedFolder) -> None:
    """What the engine is given: every input by name, the timestep float32 of rank 0; what comes back is of sample's type."""
    seen: list[Inputs] = []

    def network(inputs: Inputs) -> torch.Tensor:
        seen.append(inputs)
        return inputs["sample"].half()

    unet = ExportedUnet(sdxl.folder / "unet", network, input_axes(sdxl.folder / "unet" / "model.onnx"))
    sample, added = torch.ones(2, 4, 8, 8), {"text_embeds": torch.ones(2, 32), "time_ids": torch.ones(2, 6)}
    (output,) = unet(sample, torch.tensor(7), torch.ones(2, 16, 32), added_cond_kwargs=added, return_dict=False)
    assert list(seen[0]) == ["sample", "timestep", "encoder_hidden_states", "text_embeds", "time_ids"]
    assert (seen[0]["timestep"].dtype, seen[0]["timestep"].shape) == (torch.float32, ())
    assert output.dtype == sample.dtype
    assert torch.equal(output, sample)


def set_global_random_state(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


@pytest.mark.filterwarnings("ignore::pcr_export.errors.ScheduleWarning")
@pytest.mark.parametrize("scheduler", [None, "EulerAncestralDiscreteScheduler", INSTEAD["DPMSolverSDEScheduler"][1]])
def test_the_same_seed_gives_the_same_image(sdxl: ExportedFolder, scheduler: str | None) -> None:
    images = []
    for state in (1, 2):
        set_global_random_state(state)
        images.append(generate(sdxl.folder, "a star", seed=3, steps=3, scheduler=scheduler))
    assert np.array_equal(*images)


@pytest.mark.filterwarnings("ignore::pcr_export.errors.ScheduleWarning")
def test_generate_with_another_scheduler_and_rescaled_guidance(sdxl: ExportedFolder) -> None:
    asked = {"timestep_spacing": "trailing", "use_karras_sigmas": True}
    pipeline = load_pipeline(sdxl.folder)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config, **asked)
    kwargs = {"guidance_scale": 5.0, "height": 16, "width": 16, "generator": torch.Generator().manual_seed(3)}
    (image,) = pipeline("a star", num_inference_steps=3, guidance_rescale=0.7, output_type="np", **kwargs).images
    drawn = generate(
        sdxl.folder,
        "a star",
        seed=3,
        steps=3,
        guidance_rescale=0.7,
        scheduler="DPMSolverMultistepScheduler:timestep_spacing=trailing,use_karras_sigmas=true",
    )
    assert np.array_equal(drawn, (image * 255).round().astype(np.uint8))


def test_a_scheduler_is_refused_before_networks_are_read(copy: Path) -> None:
    (copy / "unet" / "model.onnx").write_bytes(b"")
    write_manifest(copy)
    with pytest.raises(PcrExportError, match="EulerDiscreteScheduler has no karras: choose of"):
        generate(copy, "a star", scheduler="EulerDiscreteScheduler:karras=true")


def test_rescaling_of_the_recipe_goes_where_guidance_does() -> None:
    entry = CatalogEntry(name="a", source="a", guidance_scale=5.0, guidance_rescale=0.7)
    assert with_guidance(entry, None).guidance_rescale == 0.7
    assert with_guidance(entry, 1.0).guidance_rescale == 0.0
    assert with_guidance(entry, 1.0, 0.5).guidance_rescale == 0.5  # asked for: refused by the walk
    assert with_guidance(entry, 3.0, 0.0) == CatalogEntry(name="a", source="a", guidance_scale=3.0)
