"""Exported folders, made once: SD 1.x and SDXL with float UNets, a consistency model whose UNet is a few sums of its inputs."""

from __future__ import annotations

import functools
import shutil
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx.parser
import pytest
from models.tiny_pipelines import TOKENS, tiny_sd, tiny_sdxl
from shared_folder import make_once

from pcr_export.deploy.folder import write_configs, write_pipeline_folder
from pcr_export.deploy.onnx_parts import export_text_encoder
from pcr_export.graph.to_onnx import export_float_onnx
from pcr_export.manifest import write_manifest
from pcr_export.models.catalog import resolve
from pcr_export.models.load import LoadedModel, load_model


@dataclass(frozen=True)
class ExportedFolder:
    model: LoadedModel  # what was exported
    folder: Path


TOY_UNET = """
<ir_version: 10, opset_import: ["" : 21]>
unet (float[batch, 4, height, width] sample, float timestep, float[batch, tokens, 32] encoder_hidden_states,
      float[batch, 24] timestep_cond) => (float[batch, 4, height, width] out_sample)
{
    context = ReduceMean <keepdims = 0> (encoder_hidden_states)
    guidance = ReduceMean <keepdims = 0> (timestep_cond)
    thousand = Constant <value_float = 1000.0> ()
    time = Div (timestep, thousand)
    a = Mul (sample, time)
    b = Add (a, context)
    out_sample = Add (b, guidance)
}
"""


def write_float_unet(model: LoadedModel, folder: Path) -> None:
    """The UNet as it is, so that what is drawn can be compared with torch."""
    denoiser = model.denoiser()
    example = next(denoiser.walk(["a", "b"], [0, 1]))
    export_float_onnx(denoiser, example, folder / "unet" / "model.onnx")


def write_other_parts(model: LoadedModel, sdxl: ExportedFolder, folder: Path) -> None:
    """What `write_pipeline_folder` writes of an SD 1.x pipeline; the same seed made SDXL's VAE, which is not traced again."""
    for half in ("vae_encoder", "vae_decoder"):
        shutil.copytree(sdxl.folder / half, folder / half)
    write_configs(model.pipeline, folder)
    export_text_encoder(model.pipeline.text_encoder, TOKENS, folder / "text_encoder" / "model.onnx")


def write_sdxl(folder: Path) -> None:
    model = load_model(resolve(str(tiny_sdxl(folder / "source"))))
    write_pipeline_folder(model.pipeline, folder / "exported")
    write_float_unet(model, folder / "exported")
    write_manifest(folder / "exported")


def write_sd(sdxl: ExportedFolder, folder: Path) -> None:
    model = load_model(resolve(str(tiny_sd(folder / "source"))))
    write_other_parts(model, sdxl, folder / "exported")
    write_float_unet(model, folder / "exported")
    write_manifest(folder / "exported")


def write_lcm(sdxl: ExportedFolder, folder: Path) -> None:
    model = load_model(resolve(str(tiny_sd(folder / "source", scheduler="LCMScheduler", time_cond_proj_dim=24))))
    write_other_parts(model, sdxl, folder / "exported")
    onnx.save(onnx.parser.parse_model(TOY_UNET), folder / "exported" / "unet" / "model.onnx")
    write_manifest(folder / "exported")


def read_folder(folder: Path) -> ExportedFolder:
    return ExportedFolder(load_model(resolve(str(folder / "source"))), folder / "exported")


@pytest.fixture(scope="session")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> ExportedFolder:
    return read_folder(make_once(tmp_path_factory, "sdxl", write_sdxl))


@pytest.fixture(scope="session")
def sd(sdxl: ExportedFolder, tmp_path_factory: pytest.TempPathFactory) -> ExportedFolder:
    return read_folder(make_once(tmp_path_factory, "sd", functools.partial(write_sd, sdxl)))


@pytest.fixture(scope="session")
def lcm(sdxl: ExportedFolder, tmp_path_factory: pytest.TempPathFactory) -> ExportedFolder:
    return read_folder(make_once(tmp_path_factory, "lcm", functools.partial(write_lcm, sdxl)))
