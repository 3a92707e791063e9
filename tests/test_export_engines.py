"""Engines in the job, built by the real TensorRT-RTX: three GPUs at once, skipped when current, refused when asked wrongly."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from class_conditional import class_conditional_denoiser

from pcr_export import Job, Recipe, export_denoiser
from pcr_export.engine_settings import EngineSettings
from pcr_export.engines.compare import compare_folder
from pcr_export.engines.engine_folder import tensorrt_onnx
from pcr_export.errors import PcrExportError
from pcr_export.export_engines import EngineJob, measure_on_gpu
from pcr_export.graph.to_onnx import trace_float_onnx
from pcr_export.progress import silent
from pcr_export.report import build_commands, summary_rows

TARGETS = ("sm86", "sm89", "sm120")
SETTINGS = EngineSettings(backend="tensorrt-rtx", targets=TARGETS, rebuild_command="pcr-export toy")


def job(folder: Path, engines: EngineSettings, **changes) -> Job:
    recipe = Recipe(
        model="toy", num_inference_steps=5, guidance_scale=1.0, height=16, width=16, relax="first:40%", **changes
    )
    denoiser = class_conditional_denoiser()
    return Job(
        denoiser=denoiser, recipe=recipe, conditions=[0, 1, 2, 3], folder=folder, validate=False, engines=engines
    )


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("engines") / "toy-w8a8"
    return folder, export_denoiser(job(folder, SETTINGS))


def test_three_engines_are_proven_int8_site_by_site(exported):
    folder, report = exported
    layers = {site["name"] for site in report["sites"] if site["quantized"]}
    assert [engine["target"] for engine in report["engines"]] == list(TARGETS)
    for engine in report["engines"]:
        record = json.loads((folder / "unet" / f"{engine['target']}.json").read_text())
        assert record["sites"] == dict.fromkeys(layers, "int8")
        assert engine["int8_layers"] == len(layers)
        assert engine["float_layers"] == {}
        assert (engine["built"], engine["ran"]) == (True, False)
        assert record["axes"] == {"batch": [1, 1, 1], "height": [16, 16, 16], "width": [16, 16, 16]}
        assert (folder / "unet" / engine["file"]).stat().st_size == engine["engine_bytes"]


def test_the_commands_that_build_elsewhere_are_kept(exported):
    folder, _ = exported
    lines = (folder / "unet" / "tensorrt" / "build_commands.txt").read_text().splitlines()
    assert len(lines) == len(TARGETS)
    assert all(line.startswith("tensorrt_rtx --onnx=") for line in lines)


def test_current_engines_are_not_built_again(exported):
    folder, report = exported
    before = [(folder / "unet" / f"{target}.engine").stat().st_mtime_ns for target in TARGETS]
    lines: list[str] = []
    again = export_denoiser(replace(job(folder, SETTINGS), log=lines.append))
    assert [(folder / "unet" / f"{target}.engine").stat().st_mtime_ns for target in TARGETS] == before
    assert again["engines"] == report["engines"]
    assert "sm89: built before, nothing changed" in lines


def test_another_batch_builds_again_and_says_why(exported, tmp_path):
    folder, _ = exported
    lines: list[str] = []
    settings = replace(SETTINGS, targets=("sm89",), batch=(1, 2, 4))
    report = export_denoiser(replace(job(folder, settings), log=lines.append))
    assert report["engines"][0]["axes"]["batch"] == (1, 2, 4)
    assert [line for line in lines if line.startswith("sm89: building, shapes: ")]


def test_the_dialects_agree(exported):
    rows = compare_folder(exported[0], ["sm86"], runs=1).rows
    measured = [row for row in rows if row.sqnr_db is not None]
    assert {row.bits for row in measured} == {8, 10}
    assert all(row.sqnr_db > 30 for row in measured)  # float16 and float32 round a few activations differently
    assert [row.note for row in rows if row.what == "engine sm86"] == ["built, not run: no GPU here"]


def test_a_gpu_gets_a_float16_engine_to_be_timed_against(exported):
    """The whole way but for the GPU itself: where there is none, the comparison says so."""
    folder, _ = exported
    denoiser = class_conditional_denoiser()
    axes = dict.fromkeys(("batch", "height", "width"), (1, 1, 1)) | {"height": (16, 16, 16), "width": (16, 16, 16)}
    engines = EngineJob(settings=SETTINGS, folder=folder, axes=axes, layers=(), track=silent, log=lambda _line: None)
    graph = trace_float_onnx(denoiser, next(denoiser.walk([0, 1], [0, 1])))
    facts = measure_on_gpu(engines, "sm86", lambda: graph)
    assert facts["target"] == "sm86"
    assert facts["distances"][-1]["note"] == "built, not run: no GPU here"
    record = json.loads((folder / "unet" / "sm86-fp16.json").read_text())
    assert not [row for row in record["kernel_table"] if "Int8" in row[1]]
    assert measure_on_gpu(engines, None, lambda: graph) == {}
    assert measure_on_gpu(engines, "sm90", lambda: graph) == {}


def test_only_the_graph(tmp_path):
    settings = replace(SETTINGS, build=False, batch=(1, 1, 8))
    report = export_denoiser(job(tmp_path / "toy", settings))
    assert [(engine["target"], engine["built"]) for engine in report["engines"]] == [(name, False) for name in TARGETS]
    assert len(build_commands(report)) == len(TARGETS)
    assert ("tensorrt-rtx sm89", "not built here") in summary_rows(report)
    commands = (tmp_path / "toy" / "unet" / "tensorrt" / "build_commands.txt").read_text()
    assert "--computeCapabilities=120" in commands
    assert "--maxShapes=x:8x3x16x16" in commands
    assert not list((tmp_path / "toy" / "unet").glob("*.engine"))
    assert tensorrt_onnx(tmp_path / "toy").is_file()
    export_denoiser(job(tmp_path / "toy", EngineSettings(), seed=1))
    assert not tensorrt_onnx(tmp_path / "toy").is_file()  # of other scales: what was built from it is refused


def test_a_target_that_can_not_be_built_for_is_refused(tmp_path):
    with pytest.raises(PcrExportError, match="does not build for sm90: it builds for"):
        export_denoiser(job(tmp_path / "toy", replace(SETTINGS, targets=("sm90",))))
    assert not (tmp_path / "toy").exists()  # before anything is calibrated


@pytest.mark.parametrize("targets", [(), ("current",), ("rtx4090",)])
def test_commands_for_no_known_gpu_are_refused_before_the_calibration(targets, tmp_path):
    with pytest.raises(PcrExportError, match=r"name the GPUs, --target sm86|is no target: write sm86"):
        export_denoiser(job(tmp_path / "toy", replace(SETTINGS, targets=targets, build=False)))
    assert not (tmp_path / "toy").exists()


def test_without_the_extras_the_job_runs_on_onnxruntime():
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('tensorrt', 'tensorrt_rtx', 'polygraphy'))); "
        "import pcr_export.export_pipeline"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
