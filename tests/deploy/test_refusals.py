"""Nothing that is asked of an exported pipeline is dropped without a word: it works, or one line names it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from deploy.conftest import ExportedFolder
from diffusers import ControlNetModel, T2IAdapter
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from PIL import Image
from safetensors.torch import save_file

import pcr_export
from pcr_export.deploy.pipeline import load_pipeline
from pcr_export.errors import PcrExportError
from pcr_export.models.pipelines import Pipeline

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8))
ROUNDING = 1e-4  # float32, another order of summation than torch's; values of order 1


@pytest.fixture(scope="module")
def pipelines(sd: ExportedFolder, sdxl: ExportedFolder) -> dict[str, Pipeline]:
    loaded = {"sd": load_pipeline(sd.folder, threads=1), "sdxl": load_pipeline(sdxl.folder, threads=1)}
    for pipeline in loaded.values():
        pipeline.set_progress_bar_config(disable=True)
    return loaded


def refused(action: Callable[[], Any], match: str) -> None:
    with pytest.raises(PcrExportError, match=match) as caught:
        action()
    assert "\n" not in str(caught.value)


def draw(pipeline: Pipeline, **arguments: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    settings: dict[str, Any] = {"prompt": "a red star", "num_inference_steps": 1, "height": 16, "width": 16}
    generator = torch.Generator().manual_seed(0)
    return pipeline(**{**settings, "generator": generator, "output_type": "np", **arguments}).images


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_controlnet_is_refused_by_the_argument_that_it_gives(
    name: str, pipelines: dict[str, Pipeline], request: pytest.FixtureRequest
) -> None:
    exported: ExportedFolder = request.getfixturevalue(name)
    control = ControlNetModel.from_unet(exported.model.pipeline.unet, conditioning_embedding_out_channels=(8, 8)).eval()
    kind = {"sd": "StableDiffusionControlNetPipeline", "sdxl": "StableDiffusionXLControlNetPipeline"}[name]
    pipeline = getattr(diffusers, kind)(**pipelines[name].components, controlnet=control)
    refused(lambda: draw(pipeline, image=PICTURE), "no input for down_block_additional_residuals: a ControlNet")
    refused(lambda: ControlNetModel.from_unet(pipelines[name].unet), r"is a graph and has no \w+: paint with the float")


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_t2i_adapter_is_refused(name: str, pipelines: dict[str, Pipeline]) -> None:
    adapter = T2IAdapter(in_channels=3, channels=[32, 64], num_res_blocks=1, downscale_factor=2).eval()
    kind = {"sd": "StableDiffusionAdapterPipeline", "sdxl": "StableDiffusionXLAdapterPipeline"}[name]
    parts = {**pipelines[name].components, "adapter": adapter}
    if name == "sd":
        parts = {part: value for part, value in parts.items() if part != "image_encoder"}
        parts["requires_safety_checker"] = False
    pipeline = getattr(diffusers, kind)(**parts)
    refused(
        lambda: draw(pipeline, image=PICTURE),
        "no input for down_intrablock_additional_residuals: a T2I-Adapter changes",
    )


def test_ip_adapter_is_refused(pipelines: dict[str, Pipeline]) -> None:
    pipeline = pipelines["sd"]
    embeds = [torch.zeros(2, 1, 8)]
    refused(lambda: draw(pipeline, ip_adapter_image_embeds=embeds), "no input for image_embeds: an IP-Adapter needs")
    refused(lambda: draw(pipeline, ip_adapter_image=PICTURE), "has no encoder_hid_proj: an IP-Adapter needs")
    weights = {"image_proj": {"proj.weight": torch.zeros(1)}, "ip_adapter": {"1.to_k_ip.weight": torch.zeros(1)}}
    load = {"subfolder": "", "weight_name": "", "image_encoder_folder": None}
    refused(lambda: pipeline.load_ip_adapter(weights, **load), "an IP-Adapter needs weights that the graph lacks")
    refused(
        lambda: pipeline.set_ip_adapter_scale(0.5), r"the exported UNet is a graph and has no \w+: paint with the float"
    )
    pipeline.register_modules(feature_extractor=None)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (
            {"cross_attention_kwargs": {"scale": 0.5}},
            "no input for cross_attention_kwargs: give LoRA files to the export",
        ),
        ({"class_labels": torch.zeros(2)}, "no input for class_labels"),
        ({"encoder_attention_mask": torch.ones(2, 16)}, "no input for encoder_attention_mask"),
        ({"attention_mask": torch.ones(2, 16)}, "no input for attention_mask"),
        ({"mid_block_additional_residual": torch.zeros(2)}, "no input for mid_block_additional_residual: a ControlNet"),
        ({"timestep_cond": torch.zeros(2, 4)}, "no input for timestep_cond"),
        ({"added_cond_kwargs": None}, "lacks its input text_embeds: call it as the pipeline's class does"),
        ({"timestep": torch.tensor([5.0, 6.0])}, "one timestep for all rows of a call"),
        ({"sample": torch.zeros(2, 9, 8, 8)}, r"takes sample as \[batch, 4, height, width\], not \[2, 9, 8, 8\]"),
        (
            {"encoder_hidden_states": torch.zeros(3, 16, 32)},
            r"takes encoder_hidden_states as \[2, tokens, 32\], not \[3",
        ),
        ({"sample": torch.zeros(2, 4, 8, 8, requires_grad=True)}, "gives no gradients"),
        ({"sample": torch.zeros(2, 4, 8, 9)}, "a 16x18 picture can't be made: .* multiples of 4"),
    ],
)
def test_the_unet_takes_what_its_graph_has_an_input_for(
    pipelines: dict[str, Pipeline], arguments: dict[str, Any], match: str
) -> None:
    refused(lambda: pipelines["sdxl"].unet(**{**unet_call(), **arguments}), match)


def unet_call() -> dict[str, Any]:
    added = {"text_embeds": torch.ones(2, 32), "time_ids": torch.ones(2, 6)}
    text = torch.ones(2, 16, 32)
    return {"sample": torch.ones(2, 4, 8, 8), "timestep": 7, "encoder_hidden_states": text, "added_cond_kwargs": added}


def test_what_changes_nothing_is_taken(pipelines: dict[str, Pipeline]) -> None:
    unet = pipelines["sdxl"].unet
    plain = unet(**unet_call())
    assert isinstance(plain, UNet2DConditionOutput)
    nothing = {"cross_attention_kwargs": {}, "down_block_additional_residuals": None, "class_labels": None}
    (again,) = unet(**{**unet_call(), **nothing, "timestep": torch.tensor([7, 7])}, return_dict=False)
    assert torch.equal(again, plain.sample)
    half = unet(**{**unet_call(), "sample": torch.ones(2, 4, 8, 8).half()}).sample
    assert torch.equal(half, plain.sample.half())


def test_text_encoders_take_ids_alone(pipelines: dict[str, Pipeline], sdxl: ExportedFolder) -> None:
    ids = torch.full((1, 16), 3)
    for name in ("text_encoder", "text_encoder_2"):
        encoder, float_encoder = getattr(pipelines["sdxl"], name), getattr(sdxl.model.pipeline, name)
        for given in ("attention_mask", "position_ids"):
            refused(lambda encoder=encoder, given=given: encoder(ids, **{given: ids}), f"no input for {given}")
        refused(lambda encoder=encoder: encoder(ids, output_attentions=True), "no input for output_attentions")
        for options in ({}, {"output_hidden_states": True}, {"output_hidden_states": True, "return_dict": False}):
            found, expected = encoder(ids, **options), float_encoder(ids, **options)
            assert len(found) == len(expected)
            assert getattr(found, "keys", list)() == getattr(expected, "keys", list)()
            torch.testing.assert_close(found[0], expected[0], atol=ROUNDING, rtol=0)
    refused(
        lambda: pipelines["sdxl"].text_encoder(torch.full((1, 16), 999)), "the prompt has token 999: load the textual"
    )
    refused(lambda: pipelines["sdxl"].text_encoder(ids[:, :9]), r"takes input_ids as \[batch, 16\], not \[1, 9\]")


def test_clip_skip_works_where_hidden_states_are_all_it_needs(
    pipelines: dict[str, Pipeline], sdxl: ExportedFolder
) -> None:
    images = [draw(pipeline, clip_skip=1) for pipeline in (pipelines["sdxl"], sdxl.model.pipeline)]
    np.testing.assert_allclose(images[0], images[1], atol=ROUNDING, rtol=0)
    refused(
        lambda: draw(pipelines["sd"], clip_skip=1), "the exported text encoder .*has no text_model: leave clip_skip out"
    )


def test_the_vae_answers_as_an_autoencoder_does(pipelines: dict[str, Pipeline], sdxl: ExportedFolder) -> None:
    latents = torch.ones(1, 4, 8, 8)
    vaes = pipelines["sdxl"].vae, sdxl.model.pipeline.vae
    decoded = [vae.decode(latents, generator=torch.Generator()) for vae in vaes]
    torch.testing.assert_close(decoded[0].sample, decoded[1].sample, atol=ROUNDING, rtol=0)
    refused(lambda: vaes[0].decode(torch.ones(1, 16, 8, 8)), r"VAE decoder takes latent_sample as \[batch, 4, height")
    for call in ("enable_tiling", "enable_slicing"):
        refused(
            lambda call=call: getattr(vaes[0], call)(),
            r"the exported VAE decoder is a graph and has no enable_\w+: ask for",
        )


@pytest.mark.parametrize("name", ["sd", "sdxl"])
@pytest.mark.parametrize(
    ("action", "match"),
    [
        (lambda p: p.to("cuda"), r"float32 on the CPU: leave \.to\(\) out; for a GPU, load_pipeline"),
        (lambda p: p.to(torch.float16), r"float32 on the CPU: leave \.to\(\) out"),
        (lambda p: p.unet.half(), "the exported UNet takes float32 on the CPU"),
        (lambda p: p.unet.to(memory_format=torch.channels_last), "the exported UNet takes float32 on the CPU"),
        (lambda p: p.enable_freeu(0.9, 0.2, 1.2, 1.4), "has no enable_freeu: leave the call out"),
        (lambda p: p.enable_attention_slicing(), "has no attention slicing: leave the call out"),
        (lambda p: p.set_use_memory_efficient_attention_xformers(True), "no attention of xformers: leave the call out"),
        (lambda p: p.fuse_qkv_projections(), "has no fuse_qkv_projections: paint with the float pipeline"),
        (lambda p: p.unet.set_attn_processor(None), "has no set_attn_processor"),
        (lambda p: draw(p, cross_attention_kwargs={"scale": 0.5}), "give LoRA files to the export"),
        (lambda p: p.save_pretrained("nowhere"), "copy the exported folder"),
        (lambda p: p.enable_model_cpu_offload(device="cpu"), "no weights to move to and fro: leave the call out"),
    ],
)
def test_calls_of_the_pipeline_object(
    name: str,
    action: Callable[[Pipeline], Any],
    match: str,
    pipelines: dict[str, Pipeline],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    refused(lambda: action(pipelines[name]), match)


def test_calls_that_change_nothing_work(pipelines: dict[str, Pipeline]) -> None:
    pipeline = pipelines["sdxl"]
    expected = draw(pipeline)
    pipeline.to("cpu").to(torch.float32).to("cpu", torch.float32)
    pipeline.disable_attention_slicing()
    pipeline.unet.eval().requires_grad_(False)
    assert hasattr(pipeline.unet, "config")
    assert not hasattr(pipeline.unet, "attn_processors")
    assert np.array_equal(draw(pipeline), expected)


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_weights_are_loaded_before_the_export(name: str, pipelines: dict[str, Pipeline], tmp_path: Any) -> None:
    pipeline = pipelines[name]
    lora = {f"unet.mid_block.attentions.0.proj_in.lora_{end}.weight": torch.zeros(1, 1) for end in "AB"}
    save_file(lora, tmp_path / "lora.safetensors")
    refused(lambda: pipeline.load_lora_weights(tmp_path / "lora.safetensors"), r"--lora FILE\[:SCALE\]")
    save_file({"<cat>": torch.zeros(1, pipeline.text_encoder.config.hidden_size)}, tmp_path / "cat.safetensors")
    words = pipeline.tokenizer.get_vocab()
    refused(
        lambda: pipeline.load_textual_inversion(tmp_path / "cat.safetensors"), "load the textual inversion into the"
    )
    assert pipeline.tokenizer.get_vocab() == words


def test_prompt_embeds_of_any_length_paint_what_torch_paints(
    pipelines: dict[str, Pipeline], sd: ExportedFolder, sdxl: ExportedFolder
) -> None:
    """Long prompts as compel makes them: two texts of 16 tokens each."""
    for name, exported in (("sd", sd), ("sdxl", sdxl)):
        generator = torch.Generator().manual_seed(0)
        text = {key: torch.randn(1, 32, 32, generator=generator) for key in ("prompt_embeds", "negative_prompt_embeds")}
        if name == "sdxl":
            text |= {key.replace("prompt", "pooled_prompt"): torch.randn(1, 32, generator=generator) for key in text}
        images = [draw(p, prompt=None, **text) for p in (pipelines[name], exported.model.pipeline)]
        np.testing.assert_allclose(images[0], images[1], atol=ROUNDING, rtol=0)
        assert not np.allclose(images[0], draw(pipelines[name]), atol=ROUNDING)


def test_public_names_are_there() -> None:
    assert issubclass(pcr_export.PromptWarning, UserWarning)
