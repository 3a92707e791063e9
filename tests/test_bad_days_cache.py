"""Settings x stages: changing a setting runs again exactly the stages that depend on it, and the log says which setting it was."""

from __future__ import annotations

import functools
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import pytest
from class_conditional import class_conditional_denoiser
from models.tiny_pipelines import tiny_sd
from test_export import LABELS, float_graph

from pcr_export.export import export_denoiser
from pcr_export.export_job import Job
from pcr_export.export_pipeline import export_pipeline, pipeline_job
from pcr_export.graph.to_onnx import trace_float_onnx
from pcr_export.models.catalog import resolve
from pcr_export.models.load import load_model
from pcr_export.recipe import ONLY_WITH, Lora, Recipe

ALL = {"calibrate", "quantize", "validate"}  # the scales, the graph that holds them, and what that is compared with
NONE: set[str] = set()
BLOCKS = {"inputs", "block_"}  # of learned weights


@dataclass(frozen=True)
class Change:
    """A setting's other value, and what it runs again in an export with the settings `base`."""

    value: Any
    stages: set[str]
    base: Mapping[str, Any] | tuple = ()


STATIC = {"scheme": "static"}
GPTQ = {"weight_bits": 4, "weights": "gptq", "weight_samples": 8}
ADAROUND = {**GPTQ, "weights": "adaround", "adaround_iterations": 2}
# Every setting of a recipe; one that is new has to be added with what depends on it.
TABLE: dict[str, list[Change]] = {
    "model": [Change("another name", NONE)],  # the weights themselves are hashed
    "num_inference_steps": [],  # of a Denoiser its timesteps say; another number is refused
    "guidance_scale": [Change(2.0, ALL)],
    "guidance_rescale": [Change(0.5, ALL, {"guidance_scale": 2.0})],
    "scheduler": [Change("DDIMScheduler", ALL)],
    "height": [Change(24, ALL)],
    "width": [Change(24, ALL)],
    "weight_bits": [Change(7, ALL)],
    "activation_bits": [Change(9, ALL)],
    "scheme": [Change("float-trajectory", ALL)],
    "ranges": [Change("minmax", ALL)],
    "percentile": [Change(99.0, NONE), Change(99.0, ALL, {"ranges": "percentile"})],
    "affine": [Change(False, ALL)],
    "observed_steps": [Change("uniform:2", ALL, STATIC)],
    "reduce": [Change("min-mean", ALL, {**STATIC, "ranges": "minmax", "affine": False})],
    "smooth_quant": [Change(0.5, ALL)],
    "split_shortcut": [Change(True, ALL)],
    "first_token": [Change("together", NONE)],  # as "auto" finds it
    "relax": [Change("first:40%", ALL), Change("first:40%", ALL, GPTQ)],  # and no weight is learned again
    "relax_bits": [Change(11, NONE), Change(11, ALL, {"relax": "first:40%"})],
    "weights": [Change("adaround", ALL | BLOCKS, {**GPTQ, "adaround_iterations": 2})],
    "keep": [Change("1", ALL | BLOCKS, GPTQ)],
    "weight_samples": [Change(99, NONE), Change(6, ALL | BLOCKS, GPTQ)],
    "weight_rounds": [Change(2, NONE), Change(2, ALL | BLOCKS, GPTQ)],
    "adaround_iterations": [Change(3, NONE), Change(3, NONE, GPTQ), Change(3, ALL | BLOCKS, ADAROUND)],
    "lora": [Change((Lora(name="a.safetensors", sha256="0" * 64, scale=0.5),), ALL)],
    "skip": [Change(("conv_in", "conv_out", "time"), ALL)],
    "calib_size": [Change(32, NONE)],  # the prompts themselves are hashed
    "calib_batch": [
        Change(2, NONE),
        Change(2, ALL, {**STATIC, "ranges": "minmax", "affine": False, "reduce": "min-mean"}),
    ],
    "seed": [Change(1, ALL)],
    "min_sqnr_db": [Change(19.0, NONE)],
}


def job(folder: Path, lines: list[str], **settings: Any) -> Job:
    sampling = {"model": "toy", "num_inference_steps": 5, "guidance_scale": 1.0, "height": 16, "width": 16}
    return Job(
        denoiser=class_conditional_denoiser(),
        recipe=Recipe(**{**sampling, **settings}),
        conditions=LABELS,
        folder=folder,
        float_graph=float_graph,
        log=lines.append,
    )


@pytest.fixture(scope="module")
def finished() -> Iterator[Any]:
    """(settings as items) -> a finished export, made once."""
    with tempfile.TemporaryDirectory() as parent:

        @functools.cache
        def make(base: tuple[tuple[str, Any], ...]) -> Path:
            folder = Path(parent) / str(make.cache_info().misses)
            export_denoiser(job(folder, [], **dict(base)))
            return folder

        yield make


def test_every_setting_has_its_row() -> None:
    assert set(TABLE) == {field.name for field in fields(Recipe)}


def ran(lines: list[str]) -> set[str]:
    """The stages that ran again by the log."""
    return {re.sub(r"\d+$", "", line.split(":")[0]) for line in lines if "running again" in line}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "change"),
    [pytest.param(name, change, id=f"{name}-{i}") for name in TABLE for i, change in enumerate(TABLE[name])],
)
def test_a_setting_runs_its_stages_again(name: str, change: Change, finished: Any, tmp_path: Path) -> None:
    base = dict(change.base)
    folder = shutil.copytree(finished(tuple(base.items())), tmp_path / "toy")
    lines: list[str] = []
    export_denoiser(job(folder, lines, **{**base, name: change.value}))
    assert ran(lines) == change.stages, lines
    again = [line for line in lines if line.startswith("calibrate: running again")]
    assert all(re.search(rf"\brecipe {name}\b", line) for line in again), again  # the log names the setting
    parts = {part for line in again for part in line.split(": ")[-1].split(", ")}
    noise = {"calibration set", "walk"} if name == "seed" else set()
    assert parts <= {f"recipe {each}" for each in (name, *ONLY_WITH)} | noise


def test_other_weights_and_prompts_run_everything_again(finished: Any, tmp_path: Path) -> None:
    folder = shutil.copytree(finished(()), tmp_path / "toy")
    lines: list[str] = []
    export_denoiser(replace(job(folder, lines), conditions=LABELS[1:]))
    assert ran(lines) == ALL
    assert (
        "calibrate: running again, changed: calibration set, walk" in lines
    )  # the walk is that of the first condition
    lines.clear()
    changed = class_conditional_denoiser()
    changed.network.get_submodule("merge").bias.data[0] += 1e-4
    export_denoiser(replace(job(folder, lines), conditions=LABELS[1:], denoiser=changed))
    assert "calibrate: running again, changed: weights" in lines


PIPELINE = {
    "affine": (False, {"calibrate", "quantize", "validate", "images-int", "quality"}),
    "guidance_scale": (2.0, {"calibrate", "quantize", "validate", "images-float", "images-int", "quality"}),
    "seed": (1, {"calibrate", "quantize", "validate", "images-float", "images-int", "quality"}),
    "min_sqnr_db": (10.0, NONE),
}


@pytest.mark.slow
def test_settings_of_a_pipeline(tmp_path: Path) -> None:
    """What has nothing to do with the UNet's scales stays: the packaged parts always, the float model's images where they may."""
    sampling = {"num_inference_steps": 3, "guidance_scale": 1.5, "height": 16, "width": 16}
    model = load_model(replace(resolve(str(tiny_sd(tmp_path / "random"))), **sampling))
    prompts = ["a red cat", "a dog", "a tree", "a blue sea"]
    base = Recipe(model="r", **sampling, calib_size=4, min_sqnr_db=0.0)

    denoiser = pipeline_job(model, base, prompts, tmp_path / "out").denoiser
    graph = trace_float_onnx(denoiser, next(denoiser.walk(prompts[:2], [0, 1])))

    def export(recipe: Recipe) -> list[str]:
        lines: list[str] = []
        job = pipeline_job(model, recipe, prompts, tmp_path / "out")
        export_pipeline(replace(job, float_graph=lambda: graph, log=lines.append), model, prompts[:2])
        return lines

    assert ran(export(base)) == NONE
    for name, (value, stages) in PIPELINE.items():
        assert ran(export(replace(base, **{name: value}))) == stages, name
        export(base)
    assert all("nothing changed" in line for line in export(base))
