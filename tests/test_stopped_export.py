"""A re-export that is stopped: no recipe or report beside the graph of another."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir
import pytest
from class_conditional import class_conditional_denoiser

from pcr_export import Job, Recipe, export_denoiser
from pcr_export.errors import PcrExportError
from pcr_export.graph.to_onnx import trace_float_onnx
from pcr_export.progress import Advance, Track, silent
from pcr_export.recipe import read_recipe

LABELS = [0, 1, 2, 3]
FILES = ("step_scales.safetensors", "recipe.json", "unet/model.onnx", "unet/model.onnx_data")


@functools.cache
def float_graph() -> ir.Model:
    denoiser = class_conditional_denoiser()
    return trace_float_onnx(denoiser, next(denoiser.walk(LABELS[:2], [0, 1])))


def job(folder: Path, track: Track = silent, **settings: object) -> Job:
    sampling = {"model": "toy", "num_inference_steps": 5, "guidance_scale": 1.0, "height": 16, "width": 16}
    return Job(
        denoiser=class_conditional_denoiser(),
        recipe=Recipe(**sampling, **settings),  # type: ignore[arg-type]
        conditions=LABELS,
        folder=folder,
        validate=False,
        float_graph=float_graph,
        track=track,
    )


def killed_at(what: str, calls: int = 0) -> Track:
    """Stops at the start of what is tracked under this name, or after so many advances."""

    @contextmanager
    def track(description: str, _total: int) -> Iterator[Advance]:
        left = iter(range(calls))

        def advance(_count: int) -> None:
            if description == what and next(left, None) is None:
                raise KeyboardInterrupt

        if description == what and calls == 0:
            raise KeyboardInterrupt
        yield advance

    return track


def read(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in FILES}


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, bytes]]:
    @functools.cache
    def get(ranges: str) -> dict[str, bytes]:
        folder = tmp_path_factory.mktemp("fresh")
        export_denoiser(job(folder, ranges=ranges))
        return read(folder)

    return get


def test_stopped_while_it_calibrates_the_old_export_is_whole(tmp_path: Path, fresh) -> None:
    export_denoiser(job(tmp_path, ranges="mse"))
    with pytest.raises(KeyboardInterrupt):
        export_denoiser(job(tmp_path, killed_at("calibrating", 2), ranges="minmax"))
    assert read(tmp_path) == fresh("mse")
    assert (tmp_path / "manifest.json").exists()


def test_stopped_between_the_scales_and_the_graph_nobody_reads_the_folder(tmp_path: Path, fresh) -> None:
    export_denoiser(job(tmp_path, ranges="mse"))
    (tmp_path / "evaluation.json").write_text("{}")
    with pytest.raises(KeyboardInterrupt):
        export_denoiser(job(tmp_path, killed_at("quantizing the graph for onnxruntime"), ranges="minmax"))
    left = {path.name for path in tmp_path.iterdir() if path.is_file()}
    assert left == {"step_scales.safetensors"}
    with pytest.raises(PcrExportError, match="or end the export that stopped"):
        read_recipe(tmp_path)
    export_denoiser(job(tmp_path, ranges="minmax"))
    assert read(tmp_path) == fresh("minmax")


def test_a_recipe_that_changes_no_byte_of_the_graph_keeps_its_evaluation(tmp_path: Path) -> None:
    export_denoiser(job(tmp_path))
    (tmp_path / "evaluation.json").write_text("{}")
    export_denoiser(job(tmp_path, calib_size=5))
    assert (tmp_path / "evaluation.json").exists()
    assert read_recipe(tmp_path).calib_size == 5


def test_the_float_graph_is_gone_when_it_was_timed_or_the_timing_stopped(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        export_denoiser(replace(job(tmp_path, killed_at("timing onnxruntime", 1)), validate=True))
    assert list((tmp_path / ".stages").rglob("*.onnx*")) == []
    (tmp_path / ".stages" / "float").mkdir()
    (tmp_path / ".stages" / "float" / "model.onnx").touch()  # of a run that was killed outright
    report = export_denoiser(replace(job(tmp_path), validate=True))
    assert report["engines"][0]["float_latency_ms"]["p50"] > 0
    assert list((tmp_path / ".stages").rglob("*.onnx*")) == []
