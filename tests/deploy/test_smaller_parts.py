"""Text encoders and VAE stored smaller: their numbers against torch with rounded weights, and which form is taken."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from deploy.conftest import ExportedFolder
from exported_tiny_sdxl import export_from
from torch import nn

from pcr_export.calibrate.weights.nearest import quantize_weight
from pcr_export.deploy import smaller_parts
from pcr_export.deploy.smaller_parts import FEWEST_ELEMENTS, part_inputs, shrink_parts, store_smaller
from pcr_export.deploy.triton_repository import check_triton_repository
from pcr_export.deploy.verify import verify_folder
from pcr_export.graph.to_onnx import save_model
from pcr_export.manifest import read_manifest
from pcr_export.models.catalog import read_json

ROUNDING = (
    3 * 144 * 2**-24
)  # float32: sums of up to 144 in another order than torch's; ten after another add up as their root
PROMPTS = ["a red star", "", "two blue moons"]
PARTS = ("text_encoder", "text_encoder_2", "vae_encoder", "vae_decoder")


def half(weight: torch.Tensor) -> torch.Tensor:
    return weight.half().float()


def dequantized(weight: torch.Tensor) -> torch.Tensor:
    integers, scales = quantize_weight(weight.numpy())
    return torch.from_numpy(integers * scales.reshape(-1, *[1] * (weight.ndim - 1)))


def rounded(module: nn.Module, layer_weight: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    module = copy.deepcopy(module)
    for name, each in module.named_modules():
        if isinstance(each, nn.Linear | nn.Conv2d) and each.weight.numel() >= FEWEST_ELEMENTS:
            each.weight.data = layer_weight(each.weight.data)
        elif name.endswith("token_embedding"):
            each.weight.data = half(each.weight.data)
    return module


@pytest.fixture(scope="module")
def inputs(sdxl: ExportedFolder) -> dict[str, dict[str, np.ndarray]]:
    latents = torch.randn((3, 4, 8, 8), generator=torch.Generator().manual_seed(0))
    return part_inputs(sdxl.model.pipeline, PROMPTS, latents)


@pytest.fixture
def folder(sdxl: ExportedFolder, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sdxl.folder, tmp_path / "copy"))


def first_output(path: Path, feed: dict[str, np.ndarray]) -> np.ndarray:
    return np.asarray(ort.InferenceSession(path).run(None, feed)[0])


@pytest.mark.parametrize(("form", "layer_weight"), [("fp16", half), ("int8", dequantized)])
def test_numbers_are_torchs_with_rounded_weights(
    sdxl: ExportedFolder, inputs: Any, tmp_path: Path, form: str, layer_weight: Any
) -> None:
    found = {}
    for name in PARTS:
        model = ir.load(sdxl.folder / name / "model.onnx")
        store_smaller(model, form)
        save_model(model, tmp_path / name / "model.onnx")
        found[name] = first_output(tmp_path / name / "model.onnx", inputs[name])
    pipeline = sdxl.model.pipeline
    ids = {name: torch.from_numpy(inputs[name]["input_ids"]) for name in PARTS[:2]}
    vae = rounded(pipeline.vae, layer_weight)
    with torch.no_grad():
        expected = {
            "text_encoder": rounded(pipeline.text_encoder, layer_weight)(ids["text_encoder"]).last_hidden_state,
            "text_encoder_2": rounded(pipeline.text_encoder_2, layer_weight)(ids["text_encoder_2"]).text_embeds,
            "vae_encoder": vae.encode(torch.from_numpy(inputs["vae_encoder"]["sample"])).latent_dist.parameters,
            "vae_decoder": vae.decode(torch.from_numpy(inputs["vae_decoder"]["latent_sample"]))[0],
        }
    for name in PARTS:
        np.testing.assert_allclose(found[name], expected[name].numpy(), atol=ROUNDING, rtol=0, err_msg=name)
        floats = first_output(sdxl.folder / name / "model.onnx", inputs[name])
        assert np.abs(floats - found[name]).max() > 4 * ROUNDING, name  # the weights were rounded


def test_weights_take_the_bytes_that_they_should(sdxl: ExportedFolder, inputs: Any, folder: Path) -> None:
    facts = shrink_parts(folder, "fp16", inputs, lambda _count: None)
    assert list(facts) == list(PARTS)
    for name in PARTS:
        kinds = {x.const_value.dtype for x in ir.load(folder / name / "model.onnx").graph.initializers.values()}
        assert ir.DataType.FLOAT16 in kinds
        assert facts[name]["form"] == "fp16"
        assert facts[name]["sqnr_db"]["fp16"] > 50
        own = [folder / name / file for file in ("model.onnx", "model.onnx_data")]
        assert facts[name]["bytes"] == sum(file.stat().st_size for file in own) < facts[name]["float_bytes"]
        assert sorted(path.name for path in (folder / name).iterdir()) == [
            "config.json",
            "model.onnx",
            "model.onnx_data",
        ]


def test_a_form_that_is_not_safe_is_not_taken(inputs: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bars = {"text_encoder": 0.0, "text_encoder_2": 0.0, "vae_encoder": 1000.0, "vae_decoder": 60.0}
    monkeypatch.setattr(smaller_parts, "SAFE_DB", bars)
    before = {name: (folder / name / "model.onnx").read_bytes() for name in PARTS}
    facts = shrink_parts(folder, "int8", inputs, lambda _count: None)
    assert {name: fact["form"] for name, fact in facts.items()} == {
        "text_encoder": "int8",
        "text_encoder_2": "int8",
        "vae_encoder": "fp32",
        "vae_decoder": "fp16",
    }
    assert {name for name in PARTS if (folder / name / "model.onnx").read_bytes() == before[name]} == {"vae_encoder"}
    assert list(facts["vae_encoder"]["sqnr_db"]) == ["int8", "fp16"]
    assert facts["vae_decoder"]["sqnr_db"]["int8"] < 60 < facts["vae_decoder"]["sqnr_db"]["fp16"]


@pytest.mark.slow
def test_an_export_with_smaller_parts(exported: Path, tmp_path: Path) -> None:
    source = exported.parents[1] / "models" / "random"
    folder = export_from(source, tmp_path, "--parts", "int8")
    forms = {name: part["form"] for name, part in read_json(folder / "report.json")["parts"].items()}
    assert set(forms) == set(PARTS)
    assert "int8" in forms.values()
    assert "painted again" in list(verify_folder(folder))[-1][1]
    check_triton_repository(folder)
    unet, smaller = folder / "unet" / "model.onnx_data", (folder / "text_encoder" / "model.onnx_data").stat().st_size
    assert unet.read_bytes() == (exported / "unet" / "model.onnx_data").read_bytes()
    export_from(source, tmp_path)
    ours, theirs = (read_manifest(each).files for each in (folder, exported))
    assert ours.keys() == theirs.keys()
    assert {name for name in ours if ours[name] != theirs[name]} == {
        "report.json",
        "unet/sm89.json",
    }  # which have times
    assert (folder / "text_encoder" / "model.onnx_data").stat().st_size > smaller
