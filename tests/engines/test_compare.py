"""compare on a folder of both dialects, run by onnxruntime through Polygraphy; no engine runs without a GPU."""

from __future__ import annotations

import math
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from graph.min_max import min_max_scales
from graph.small_denoisers import unet_denoiser, unet_inputs
from shared_folder import make_once

from pcr_export.engines.build_request import BuildRequest
from pcr_export.engines.compare import (
    DIALECT,
    NOT_RUN,
    ONNXRUNTIME,
    Comparison,
    FolderComparison,
    compare_folder,
    steps_to_compare,
    table_rows,
)
from pcr_export.engines.engine_folder import engine_targets, find_engine, float_engine
from pcr_export.engines.flavours import gpu_target
from pcr_export.engines.latency import Latency
from pcr_export.engines.onnxruntime import OnnxRuntimeEngine
from pcr_export.engines.polygraphy_runs import measure_distance
from pcr_export.engines.tensorrt import build_engine
from pcr_export.engines.timing import timing_facts
from pcr_export.errors import PcrExportError
from pcr_export.graph.quantize import quantize_onnx
from pcr_export.graph.to_onnx import export_float_onnx
from pcr_export.step_scales import read_step_scales, write_step_scales

TIMESTEPS, BITS = (900.0, 500.0, 300.0, 100.0), (10, 8, 8, 8)
AXES = {"batch": (2, 2, 2), "height": (16, 16, 16), "width": (16, 16, 16)}


def write_float(folder: Path) -> None:
    """What tests/graph/exported_cases.py writes for "sdxl": the first of them to need it makes it for both."""
    denoiser = unet_denoiser("sdxl")
    export_float_onnx(denoiser, unet_inputs(denoiser, 2, 8), folder / "model.onnx")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    denoiser = unet_denoiser("sdxl")
    float_path = make_once(tmp_path_factory, "float-sdxl", write_float) / "model.onnx"
    scales, layers = min_max_scales(denoiser, unet_inputs(denoiser, 2, 8), TIMESTEPS, bits=BITS)
    unet = folder / "unet"
    quantize_onnx(float_path, scales, layers, unet / "model.onnx")
    quantize_onnx(float_path, scales, layers, unet / "tensorrt" / "model.onnx", "tensorrt")
    write_step_scales(scales, folder / "step_scales.safetensors")
    (unet / "config.json").write_text('{"sample_size": 8}', "utf-8")
    return folder


@pytest.fixture(scope="module")
def comparison(exported: Path) -> FolderComparison:
    return compare_folder(exported, threads=1)


@pytest.fixture
def copy(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "copy"))


def test_the_two_dialects_agree_at_an_8_bit_and_at_a_relaxed_step(comparison: FolderComparison) -> None:
    assert [(row.what, row.against) for row in comparison.rows] == [(DIALECT, ONNXRUNTIME)] * 2
    assert [(row.timestep, row.bits) for row in comparison.rows] == [(300.0, 8), (900.0, 10)]
    plain, relaxed = (row.sqnr_db or 0 for row in comparison.rows)
    assert 20 < plain < relaxed < math.inf  # float16 moves values over rounding edges: one unit of 256, or of 1024
    assert all(0 < (row.max_abs or 0) < 1 for row in comparison.rows)
    assert comparison.timings == {}


def test_the_figures_are_those_of_the_same_inputs_by_hand(exported: Path, comparison: FolderComparison) -> None:
    rng = np.random.default_rng(0)
    with OnnxRuntimeEngine(exported / "unet" / "model.onnx", threads=1) as engine:
        shapes = {
            each.name: [{"batch": 2}.get(axis, axis) for axis in each.shape] for each in engine.session.get_inputs()
        }
        shapes["sample"][2:] = [8, 8]
        inputs = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
        inputs["timestep"] = np.array(300, np.float32)
        exact = engine.run(inputs)
    with OnnxRuntimeEngine(exported / "unet" / "tensorrt" / "model.onnx", threads=1) as engine:
        output = engine.run(inputs)
    assert comparison.rows[0].max_abs == pytest.approx(float(np.abs(exact - output).max()))


@pytest.mark.slow
@pytest.mark.skipif(gpu_target() is not None, reason="this machine has a GPU")
def test_an_engine_without_a_gpu_is_built_not_run(copy: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    onnx_path, engine_path = copy / "unet" / "tensorrt" / "model.onnx", copy / "unet" / "sm89.engine"
    request = BuildRequest(
        onnx_path=onnx_path, engine_path=engine_path, flavour="tensorrt-rtx", target="sm89", axes=AXES
    )
    build_engine(request)
    (copy / "unet" / "sm86.engine").write_bytes(engine_path.read_bytes()[:-1])
    shutil.copy(engine_path.with_suffix(".json"), copy / "unet" / "sm86.json")
    *_, damaged, whole = compare_folder(copy, threads=1).rows
    assert whole == Comparison(what="engine sm89", against=DIALECT, note=NOT_RUN)
    assert damaged.what == "engine sm86"
    assert "build it again" in damaged.note
    with pytest.raises(
        PcrExportError, match=r"no engine for sm120 \(there: sm86, sm89\): export again with .*--target sm120"
    ):
        compare_folder(copy, ["sm120"])


def test_a_folder_without_the_tensorrt_dialect_is_refused(copy: Path) -> None:
    shutil.rmtree(copy / "unet" / "tensorrt")
    with pytest.raises(PcrExportError, match="export again with --backend tensorrt-rtx"):
        compare_folder(copy)


def test_a_damaged_graph_is_named(copy: Path) -> None:
    (copy / "unet" / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(PcrExportError, match=r"cannot load .*unet/model\.onnx .*export the model again"):
        compare_folder(copy)


@pytest.mark.parametrize(("bits", "steps"), [((8, 8, 8, 8), [2]), ((10, 8, 8, 8), [2, 0]), ((9, 9, 9, 9), [2])])
def test_the_middle_step_of_each_kind(exported: Path, bits: tuple[int, ...], steps: list[int]) -> None:
    scales = read_step_scales(exported / "step_scales.safetensors")
    assert steps_to_compare(replace(scales, bits=np.array(bits, np.uint8))) == steps


def test_engines_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    for name in ("sm89.engine", "sm120.engine", "sm89-fp16.engine", "sm89.json"):
        (tmp_path / "unet" / name).touch()
    assert engine_targets(tmp_path) == ("sm120", "sm89")
    assert float_engine(find_engine(tmp_path, "sm89")) == tmp_path / "unet" / "sm89-fp16.engine"
    assert float_engine(find_engine(tmp_path, "sm120")) is None


@pytest.mark.parametrize(
    ("exact", "other", "sqnr", "max_abs"),
    [
        ([3.0, 4.0], [3.0, 4.0], math.inf, 0.0),
        ([3.0, 4.0], [3.0, 4.5], 20.0, 0.5),
        ([0.0, 0.0], [0.0, 1.0], -3000.0, 1.0),
        ([3.0, 4.0], [3.0, math.inf], -math.inf, math.inf),
    ],
)
def test_distance(exact: list[float], other: list[float], sqnr: float, max_abs: float) -> None:
    results = {"out_sample": np.array(exact, np.float32)}, {"output": np.array(other, np.float32)}
    (distance,) = measure_distance(*results).values()
    assert distance.sqnr_db == pytest.approx(sqnr)
    assert distance.max_abs == max_abs
    assert bool(distance)


def test_the_table_says_what_ran_and_how_fast() -> None:
    rows = [
        Comparison(what=DIALECT, against=ONNXRUNTIME, timestep=300.0, bits=8, sqnr_db=31.25, max_abs=0.0123),
        Comparison(what="engine sm89", against=DIALECT, note=NOT_RUN),
    ]
    slow = timing_facts(Latency(p50=4, p95=5), Latency(p50=8, p95=9), Latency(p50=3, p95=3.5), relaxed_share=0.25)
    table = table_rows(FolderComparison(rows=rows, timings={"sm120": slow}))
    assert table[0] == (DIALECT, ONNXRUNTIME, "timestep 300, 8 bit", "31.2 dB, max abs 0.012")
    assert table[1] == ("engine sm89", DIALECT, "", NOT_RUN)
    assert table[2] == ("engine sm120", "", "8-bit step", "4.00 ms, p95 5.00 ms")
    assert table[-2] == ("engine sm120", "FP16 engine", "mean step", "0.60 times as fast")
    assert table[-1][-1].startswith("INT8 is slower than FP16 on this GPU (5.00 ms against 3.00 ms)")


def test_without_polygraphy_compare_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['polygraphy'] = None\n"
        "from pcr_export.errors import PcrExportError\n"
        "try:\n    import pcr_export.engines.compare\n"
        "except PcrExportError as error:\n    print(error)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said == "compare needs polygraphy: pip install polygraphy\n"
