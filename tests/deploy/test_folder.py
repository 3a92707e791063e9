"""What lies in the output folder: names, types, free axes, numbers, and bytes that say nothing of this machine."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
from deploy.conftest import ExportedFolder
from models.tiny_pipelines import TOKENS
from transformers import CLIPTokenizer

from pcr_export.deploy.folder import (
    model_index,
    unet_files,
    write_configs,
    write_tokenizer,
    write_unet_folder,
    written_files,
)
from pcr_export.deploy.onnx_parts import export_text_encoder
from pcr_export.deploy.run import load_exported_pipeline
from pcr_export.errors import PcrExportError
from pcr_export.models.catalog import resolve
from pcr_export.models.load import load_float_pipeline

ROUNDING = 10 * 144 * 2**-24  # float32: sums of up to 144 in another order than torch's, ten of them one after another


def ports(path: Path) -> tuple[dict[str, tuple[str, list[object]]], dict[str, list[object]]]:
    session = ort.InferenceSession(path)
    inputs = {value.name: (value.type, value.shape) for value in session.get_inputs()}
    return inputs, {value.name: value.shape for value in session.get_outputs()}


def test_every_file_is_there(sdxl: ExportedFolder, lcm: ExportedFolder) -> None:
    for exported in (sdxl, lcm):
        assert all(path.is_file() for path in written_files(exported.model.pipeline, exported.folder))
        assert not [path for path in exported.folder.rglob("*") if "tmp" in path.name or path.name.startswith(".")]


def test_names_types_and_axes_are_those_of_optimum(sdxl: ExportedFolder) -> None:
    ids = {"input_ids": ("tensor(int64)", ["batch", TOKENS])}
    inputs, outputs = ports(sdxl.folder / "text_encoder" / "model.onnx")
    assert inputs == ids
    assert list(outputs) == ["last_hidden_state", "pooler_output", "hidden_states.0", "hidden_states.1"]
    inputs, outputs = ports(sdxl.folder / "text_encoder_2" / "model.onnx")
    assert inputs == ids
    assert list(outputs) == ["text_embeds", "last_hidden_state", "hidden_states.0", "hidden_states.1"]
    assert outputs["text_embeds"] == ["batch", 32]
    inputs, outputs = ports(sdxl.folder / "vae_decoder" / "model.onnx")
    assert inputs == {"latent_sample": ("tensor(float)", ["batch", 4, "height", "width"])}
    assert outputs == {"sample": ["batch", 3, "2*height", "2*width"]}
    inputs, outputs = ports(sdxl.folder / "vae_encoder" / "model.onnx")
    assert inputs == {"sample": ("tensor(float)", ["batch", 3, "height", "width"])}
    assert outputs == {"latent_parameters": ["batch", 8, "(height//2)", "(width//2)"]}


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", ["text_encoder", "text_encoder_2"])
def test_text_encoder_equals_torch(sdxl: ExportedFolder, name: str, batch: int) -> None:
    encoder, tokenizer = getattr(sdxl.model.pipeline, name), sdxl.model.pipeline.tokenizer
    ids = tokenizer(
        ["a red star", "", "x"][:batch], padding="max_length", max_length=TOKENS, return_tensors="pt"
    ).input_ids
    expected = encoder(ids, output_hidden_states=True)
    session = ort.InferenceSession(sdxl.folder / name / "model.onnx")
    for output, array in zip(session.get_outputs(), session.run(None, {"input_ids": ids.numpy()}), strict=True):
        key, _, layer = output.name.partition(".")
        wanted = expected[key][int(layer)] if layer else expected[key]
        np.testing.assert_allclose(array, wanted.numpy(), atol=ROUNDING, rtol=0)


@pytest.mark.parametrize("shape", [(1, 4, 8, 8), (3, 4, 6, 10)])
def test_vae_decoder_equals_torch(sdxl: ExportedFolder, shape: tuple[int, ...]) -> None:
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    session = ort.InferenceSession(sdxl.folder / "vae_decoder" / "model.onnx")
    (images,) = session.run(None, {"latent_sample": latents.numpy()})
    expected = sdxl.model.pipeline.vae.decode(latents, return_dict=False)[0]
    np.testing.assert_allclose(images, expected.numpy(), atol=ROUNDING, rtol=0)


@pytest.mark.parametrize("shape", [(1, 3, 16, 16), (3, 3, 12, 20)])
def test_vae_encoder_equals_torch(sdxl: ExportedFolder, shape: tuple[int, ...]) -> None:
    images = torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    session = ort.InferenceSession(sdxl.folder / "vae_encoder" / "model.onnx")
    (parameters,) = session.run(None, {"sample": images.numpy()})
    expected = sdxl.model.pipeline.vae.encode(images).latent_dist.parameters
    np.testing.assert_allclose(parameters, expected.numpy(), atol=ROUNDING, rtol=0)


def test_configs_that_optimum_reads(sdxl: ExportedFolder) -> None:
    def read(name: str) -> dict[str, object]:
        return json.loads((sdxl.folder / name).read_text("utf-8"))

    assert read("unet/config.json")["time_cond_proj_dim"] is None
    assert read("vae_decoder/config.json")["scaling_factor"] == 0.18215
    assert read("text_encoder/config.json")["num_hidden_layers"] == 2
    index = read("model_index.json")
    assert index["_class_name"] == "StableDiffusionXLPipeline"
    assert index["unet"] == ["diffusers", "UNet2DConditionModel"]
    assert index["force_zeros_for_empty_prompt"] is True
    assert read("scheduler/scheduler_config.json")["_class_name"] == "EulerDiscreteScheduler"


def test_the_unet_alone_takes_the_place_of_a_whole_folder(sdxl: ExportedFolder, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sdxl.folder, tmp_path / "copy"))
    write_unet_folder(sdxl.model.pipeline, folder)
    there = sorted(path.name for path in folder.iterdir())
    assert there == ["manifest.json", "model_index.json", "scheduler", "unet"]  # the first one is of the whole folder
    assert all(path.is_file() for path in unet_files(folder))
    index = json.loads((folder / "model_index.json").read_text("utf-8"))
    absent = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "vae")
    assert {name for name in index if index[name] == [None, None]} >= set(absent)
    assert index["unet"] == ["diffusers", "UNet2DConditionModel"]
    with pytest.raises(PcrExportError, match=f"has no {', '.join(absent)}, as an export with --strip-encoders"):
        load_exported_pipeline(folder)


def test_left_out_parts_are_null(lcm: ExportedFolder) -> None:
    index = model_index(lcm.model.pipeline)
    assert index["safety_checker"] == [None, None]
    assert index["requires_safety_checker"] is False


def test_tokenizer_reads_the_same(sdxl: ExportedFolder) -> None:
    texts = ["a red circle above a blue square", "RED, red. re-d", "ü"]
    expected = sdxl.model.pipeline.tokenizer_2(texts, padding="max_length", max_length=TOKENS).input_ids
    tokenizer = CLIPTokenizer.from_pretrained(sdxl.folder / "tokenizer_2")
    assert tokenizer.model_max_length == TOKENS
    assert tokenizer(texts, padding="max_length", max_length=TOKENS).input_ids == expected


def test_tokenizer_from_vocabulary_and_merges_alone(sdxl: ExportedFolder, tmp_path: Path) -> None:
    write_tokenizer(sdxl.model.pipeline.tokenizer, tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    text = "a red circle"
    assert CLIPTokenizer.from_pretrained(tmp_path)(text).input_ids == sdxl.model.pipeline.tokenizer(text).input_ids


def test_same_pipeline_same_bytes_wherever_it_lies_and_whatever_it_did(lcm: ExportedFolder, tmp_path: Path) -> None:
    moved = shutil.copytree(lcm.model.entry.source, tmp_path / "moved")
    pipeline = load_float_pipeline(resolve(str(moved)))
    pipeline.set_progress_bar_config(disable=True)
    pipeline("a star", num_inference_steps=1, output_type="latent")
    write_configs(pipeline, tmp_path / "again")
    export_text_encoder(pipeline.text_encoder, TOKENS, tmp_path / "again" / "text_encoder" / "model.onnx")
    files = [path for path in (tmp_path / "again").rglob("*") if path.is_file()]
    assert len(files) == 12
    for path in files:
        assert path.read_bytes() == (lcm.folder / path.relative_to(tmp_path / "again")).read_bytes(), path.name


def test_no_path_of_this_machine_is_written(sdxl: ExportedFolder) -> None:
    here = [str(sdxl.folder.parent).encode(), b"site-packages", str(Path(__file__).parents[2]).encode()]
    for path in sdxl.folder.rglob("*.*"):
        if path.parent.name != "unet" or path.suffix == ".json":
            assert not [text for text in here if text in path.read_bytes()], path
