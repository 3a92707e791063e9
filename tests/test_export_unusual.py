"""The job on a network as people write them: what can be quantized is, in the graph as in the simulation, and the rest is told."""

import pytest
import torch
from calibrate.unusual_networks import unusual_denoiser
from models.tiny_pipelines import tiny_sd

from pcr_export import Job, PcrExportError, Recipe, export_denoiser
from pcr_export.export_pipeline import export_pipeline, pipeline_job
from pcr_export.models.catalog import resolve
from pcr_export.models.load import load_model
from pcr_export.step_scales import read_step_scales


def recipe(**changes) -> Recipe:
    return Recipe(model="unusual", num_inference_steps=4, guidance_scale=1.0, height=8, width=8, **changes)


def test_an_unusual_network_is_exported_as_it_is_simulated(tmp_path):
    denoiser = unusual_denoiser()
    example = next(denoiser.walk([0, 1], [0, 1]))
    with torch.no_grad():
        before = denoiser(example)
    report = export_denoiser(Job(denoiser=denoiser, recipe=recipe(), conditions=list(range(6)), folder=tmp_path))
    quantized = {row["name"] for row in report["sites"] if row["quantized"]}
    assert quantized == {"time", "down", "named", "scaled", "one", "other"}
    assert set(read_step_scales(tmp_path / "step_scales.safetensors").layers) == quantized
    assert all(
        value is None or value > 35 for value in report["fidelity"]["per_step"]
    )  # flips at rounding edges, no more
    assert report["fidelity"]["simulation_vs_fp32_sqnr_db"] > 25
    with torch.no_grad():
        assert torch.equal(denoiser(example), before)


def test_a_skip_that_matches_nothing_is_refused_before_a_folder_is_made(tmp_path):
    skip = ("conv_in", "conv_out", "to_pixel")
    job = Job(denoiser=unusual_denoiser(), recipe=recipe(skip=skip), conditions=[0, 1], folder=tmp_path / "out")
    with pytest.raises(PcrExportError, match="--skip to_pixel matches no Linear or Conv2d: near it are to_pixels"):
        export_denoiser(job)
    assert not (tmp_path / "out").exists()


def test_a_pipelines_skip_is_looked_at_before_its_folder_is_made(tmp_path):
    model = load_model(resolve(str(tiny_sd(tmp_path / "model"))))
    skip = ("conv_in", "conv_out", "mid_block")
    job = pipeline_job(model, recipe(skip=skip), ["a cat", "a dog"], tmp_path / "out")
    with pytest.raises(
        PcrExportError, match=r"--skip mid_block is the path of a block: write mid_block\.\* for all layers in it"
    ):
        export_pipeline(job, model, ["a cat", "a dog"])
    assert not (tmp_path / "out").exists()
