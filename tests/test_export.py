"""The job on a denoiser that is no diffusers model, through the public Python names."""

import json
from pathlib import Path

import pytest
from class_conditional import TIMESTEPS, class_conditional_denoiser

from pcr_export import Job, Recipe, export_denoiser
from pcr_export.errors import PcrExportError

LABELS = [0, 1, 2, 3, 4, 0]
FILES = ("step_scales.safetensors", "recipe.json", "unet/model.onnx", "unet/model.onnx_data")


def job(folder: Path, denoiser=None, resume=True, **changes) -> Job:
    recipe = Recipe(model="toy", num_inference_steps=5, guidance_scale=1.0, height=16, width=16, **changes)
    return Job(
        denoiser=denoiser or class_conditional_denoiser(),
        recipe=recipe,
        conditions=LABELS,
        folder=folder,
        resume=resume,
    )


def read(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in FILES}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "toy-w8a8"
    return folder, export_denoiser(job(folder))


def test_report_says_what_was_done(exported):
    folder, report = exported
    assert report == json.loads((folder / "report.json").read_text())
    assert report["format"] == 1
    assert report["calibration"]["prompts"] == 6
    assert report["calibration"]["unet_batches"] == len(TIMESTEPS)
    assert report["environment"]["onnxruntime"]
    rows = {row["name"]: row for row in report["sites"]}
    assert rows["conv_in"]["reason"] == "skipped by name (conv_in)"
    assert rows["merge"]["bits"] == "w8a8"
    assert rows["merge"]["sqnr_db"] > 20
    assert report["graph"]["onnx_bytes"] > 0
    (engine,) = report["engines"]
    assert engine["ran"]
    assert engine["latency_ms"]["p50"] > 0


def test_artifact_is_the_simulation(exported):
    fidelity = exported[1]["fidelity"]
    assert len(fidelity["per_step"]) == len(fidelity["simulation_vs_fp32_per_step"]) == len(TIMESTEPS)
    assert all(value is None or value > 50 for value in fidelity["per_step"])


def test_same_seed_same_bytes(exported, tmp_path):
    export_denoiser(job(tmp_path / "again"))
    assert read(tmp_path / "again") == read(exported[0])


def test_second_run_calls_the_network_only_to_find_its_layers(exported):
    denoiser = class_conditional_denoiser()
    calls = []
    denoiser.network.register_forward_hook(lambda *_: calls.append(1))
    before = read(exported[0])
    export_denoiser(job(exported[0], denoiser))
    assert len(calls) == 1
    assert read(exported[0]) == before


def test_other_weights_export_again(exported, tmp_path):
    folder = tmp_path / "toy"
    export_denoiser(job(folder))
    export_denoiser(job(folder, class_conditional_denoiser(seed=1)))
    assert read(folder)["unet/model.onnx_data"] != read(exported[0])["unet/model.onnx_data"]


def test_relaxed_steps_run_in_the_artifact(tmp_path):
    plain = export_denoiser(job(tmp_path / "plain"))
    relaxed = export_denoiser(job(tmp_path / "relaxed", relax="first:40%"))
    assert all(value is None or value > 50 for value in relaxed["fidelity"]["per_step"])
    assert plain["recipe"]["relax"] == "none"


def test_artifact_below_the_floor_is_refused_and_kept(tmp_path):
    with pytest.raises(PcrExportError, match="worst sites") as refused:
        export_denoiser(job(tmp_path, min_sqnr_db=1000.0))
    assert refused.value.exit_code == 3
    assert (tmp_path / "report.json").exists()


def test_unwritable_folder_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(PcrExportError, match="choose another folder"):
        export_denoiser(job(tmp_path / "file" / "out"))
