"""The sizes that a UNet can't do are refused alike before the export, in a walk and by an exported UNet."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from models.tiny_pipelines import CROSS_ATTENTION, tiny_sd

from pcr_export.errors import PcrExportError
from pcr_export.models.picture_sizes import check_picture_size, latent_factor, size_factor
from pcr_export.models.pipelines import denoiser_from_pipeline

SD15 = {"block_out_channels": [320, 640, 1280, 1280]}
SDXL = {"block_out_channels": [320, 640, 1280]}


@pytest.mark.parametrize(("unet", "factor"), [(SD15, 64), (SDXL, 32), ({"block_out_channels": [8]}, 8), ({}, 8)])
def test_factor_in_pixels(unet: dict[str, list[int]], factor: int) -> None:
    assert size_factor(unet, 8) == factor
    assert latent_factor(unet) * 8 == factor


def test_diffusers_own_unit_holds_for_small_ones_too() -> None:
    assert size_factor({"block_out_channels": [32, 64]}, 2) == 8


@pytest.mark.parametrize(("height", "width"), [(512, 680), (500, 512), (0, 64), (64, -64)])
def test_other_sizes_are_refused(height: int, width: int) -> None:
    check_picture_size(512, 704, 64)
    with pytest.raises(PcrExportError, match=f"a {height}x{width} picture can't be made: .* multiples of 64"):
        check_picture_size(height, width, 64)


def test_a_walk_knows_how_often_its_unet_halves(tmp_path: Path) -> None:
    """diffusers paints at this size by other upsampling, which the exported graph has not."""
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd(tmp_path))
    down = ("DownBlock2D",) * 3 + ("CrossAttnDownBlock2D",)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8,) * 4,
        down_block_types=down,
        up_block_types=("CrossAttnUpBlock2D",) + ("UpBlock2D",) * 3,
        layers_per_block=1,
        attention_head_dim=2,
        cross_attention_dim=CROSS_ATTENTION,
        norm_num_groups=4,
    )
    pipeline.register_modules(unet=unet)
    settings = {"num_inference_steps": 2, "guidance_scale": 5.0}
    denoiser = denoiser_from_pipeline(pipeline, height=32, width=16, **settings)
    assert next(denoiser.walk(["a"], [0]))["sample"].shape == (2, 4, 16, 8)
    with pytest.raises(PcrExportError, match=r"a 24x16 picture can't be made: .* multiples of 16"):
        denoiser_from_pipeline(pipeline, height=24, width=16, **settings)
    sample, text = torch.zeros(2, 4, 12, 8), torch.zeros(2, 16, CROSS_ATTENTION)
    assert unet(sample, 1, text).sample.shape == sample.shape
