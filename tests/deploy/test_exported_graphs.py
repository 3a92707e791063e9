"""The exported ONNX files in other people's tools: Polygraphy reads and runs them, and the trtexec line fits the file that it names."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import onnx
import pytest

from pcr_export.engine_settings import Range
from pcr_export.engines.build_request import BuildRequest, trtexec_line
from pcr_export.engines.engine_record import read_engine_record

AXES: dict[str, Range] = {"batch": (2, 2, 8), "height": (8, 12, 16), "width": (8, 8, 16), "tokens": (16, 16, 16)}
DIALECT = "unet/tensorrt/model.onnx"
# what `trtexec --help` of TensorRT 10.14 and `tensorrt_rtx --help` of 1.x list, as far as a build can need it
SHAPES = {"--minShapes", "--optShapes", "--maxShapes"}
COMMON = {"--onnx", "--saveEngine", "--profilingVerbosity", "--skipInference", *SHAPES}
FLAGS = {
    "trtexec": {*COMMON, "--stronglyTyped", "--decomposableAttentions", "--timingCacheFile"},
    "tensorrt_rtx": {*COMMON, "--computeCapabilities", "--useGpu"},
}


def polygraphy(*words: object) -> str:
    code = "from polygraphy.tools import main; main()"
    ran = subprocess.run([sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def graph_inputs(path: Path) -> dict[str, list[int | str]]:
    """Sizes, or names of the free axes, of each input."""
    graph = onnx.load(path, load_external_data=False).graph
    return {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in graph.input
    }


@pytest.mark.parametrize("file", ["unet/model.onnx", DIALECT])
def test_polygraphy_inspects(file: str, exported: Path) -> None:
    said = polygraphy("inspect", "model", exported / file)
    assert "5 Graph Input(s)" in said
    assert "sample [dtype=float32, shape=('batch', 4, 'height', 'width')]" in said
    assert "timestep [dtype=float32, shape=()]" in said


@pytest.mark.parametrize("file", ["unet/model.onnx", pytest.param(DIALECT, marks=pytest.mark.slow)])
def test_polygraphy_runs_on_onnxruntime(file: str, exported: Path) -> None:
    sizes = {"batch": 2, "height": 8, "width": 8, "tokens": 16}
    inputs = {name: [sizes.get(str(dim), dim) for dim in dims] for name, dims in graph_inputs(exported / file).items()}
    shapes = [f"{name}:{str(dims).replace(' ', '')}" for name, dims in inputs.items() if dims]
    said = polygraphy("run", exported / file, "--onnxrt", "--input-shapes", *shapes)
    assert "out_sample [dtype=float32, shape=(2, 4, 8, 8)]" in said
    assert "PASSED" in said


@pytest.mark.parametrize(("flavour", "tool"), [("tensorrt", "trtexec"), ("tensorrt-rtx", "tensorrt_rtx")])
def test_the_build_line_fits_the_graph(flavour: str, tool: str, exported: Path, tmp_path: Path) -> None:
    onnx_path = exported / "unet" / "tensorrt" / "model.onnx"
    request = BuildRequest(
        onnx_path=onnx_path,
        engine_path=tmp_path / "sm89.engine",
        flavour=flavour,
        target="sm89",
        axes=AXES,
        timing_cache=tmp_path / "cache",
    )
    program, *words = shlex.split(trtexec_line(request))
    assert program == tool
    options = dict(word.partition("=")[::2] for word in words)
    assert options.keys() <= FLAGS[tool]
    assert Path(options["--onnx"]).is_file()
    ranges = [_shapes(options[name]) for name in ("--minShapes", "--optShapes", "--maxShapes")]
    free = {name: dims for name, dims in graph_inputs(onnx_path).items() if any(isinstance(dim, str) for dim in dims)}
    for index, shapes in enumerate(ranges):
        expected = {
            name: [AXES[dim][index] if isinstance(dim, str) else dim for dim in dims] for name, dims in free.items()
        }
        assert shapes == expected


def test_the_line_of_the_export_is_that_of_its_engine(exported: Path) -> None:
    (line,) = (exported / "unet" / "tensorrt" / "build_commands.txt").read_text().splitlines()
    record = read_engine_record(exported / "unet" / "sm89.engine")
    assert line == record.trtexec
    (shapes,) = re.findall(r"--optShapes=(\S+)", line)
    recorded = {name: list(best) for name, (_, best, _) in record.inputs.items() if best}
    assert _shapes(shapes) == recorded


def _shapes(text: str) -> dict[str, list[int]]:
    """sample:2x4x8x8,... by name."""
    pairs = (part.split(":") for part in text.split(","))
    return {name: [int(size) for size in sizes.split("x")] for name, sizes in pairs}
