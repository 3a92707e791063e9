"""A correct export passes whatever its model's configuration is."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from deploy.conftest import ExportedFolder
from diffusers import UNet2DConditionModel

from pcr_export.deploy.signatures import check_signatures, text_width
from pcr_export.errors import PcrExportError
from pcr_export.graph.to_onnx import export_float_onnx
from pcr_export.models.pipelines import unet_axes


def test_a_unet_that_projects_its_text_itself(sd: ExportedFolder, tmp_path: Path) -> None:
    """The text is 32 wide as its encoder gives it, and 16 where attention reads it."""
    folder = Path(shutil.copytree(sd.folder, tmp_path / "copy"))
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8,),
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        layers_per_block=1,
        attention_head_dim=2,
        cross_attention_dim=16,
        encoder_hid_dim=32,
        norm_num_groups=4,
    ).eval()
    pipeline = type(sd.model.pipeline)(**{**sd.model.pipeline.components, "unet": unet}, requires_safety_checker=False)
    denoiser = replace(sd.model, pipeline=pipeline).denoiser()
    assert denoiser.dynamic_axes == unet_axes(pipeline)
    export_float_onnx(denoiser, next(denoiser.walk(["a", "b"], [0, 1])), folder / "unet" / "model.onnx")
    (folder / "unet" / "config.json").write_text(unet.to_json_string(), "utf-8")
    assert "unet: sample, timestep, encoder_hidden_states -> out_sample" in check_signatures(folder)
    with torch.no_grad():
        assert unet(torch.zeros(1, 4, 8, 8), 1, torch.zeros(1, 16, 32)).sample.shape == (1, 4, 8, 8)


@pytest.mark.parametrize(
    ("config", "width"),
    [
        ({"cross_attention_dim": 768}, 768),
        ({"cross_attention_dim": [768, 768, 768]}, 768),
        ({"cross_attention_dim": [320, 640]}, None),
        ({"cross_attention_dim": 768, "encoder_hid_dim": 1024, "encoder_hid_dim_type": "text_proj"}, 1024),
        ({"cross_attention_dim": [320, 640], "encoder_hid_dim": 1024}, 1024),
        ({"cross_attention_dim": 768, "encoder_hid_dim": 1024, "encoder_hid_dim_type": "ip_image_proj"}, 768),
        ({}, None),
    ],
)
def test_width_of_a_text(config: dict[str, object], width: int | None) -> None:
    assert text_width(config) == width


def test_another_width_is_still_refused(sd: ExportedFolder, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sd.folder, tmp_path / "copy"))
    path = folder / "unet" / "config.json"
    for changed in ({"encoder_hid_dim": 48}, {"cross_attention_dim": [48, 48]}):
        path.write_text(
            json.dumps({**json.loads((sd.folder / "unet" / "config.json").read_text()), **changed}), "utf-8"
        )
        with pytest.raises(PcrExportError, match=r"where FLOAT \[any, any, 48\] is needed"):
            check_signatures(folder)


def test_a_vae_of_pictures_with_four_channels(sd: ExportedFolder, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sd.folder, tmp_path / "copy"))
    path = folder / "vae_decoder" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "out_channels": 4}), "utf-8")
    with pytest.raises(PcrExportError, match=r"output sample as .* where FLOAT \[any, 4, any, any\] is needed"):
        check_signatures(folder)
