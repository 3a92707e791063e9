"""What of the TensorRT runner needs no GPU: every refusal, and that the installed library has what it calls. With a GPU: it runs."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from engines.small_qdq import LAYERS, save_small_graph

from pcr_export.engines.build_request import BuildRequest
from pcr_export.engines.flavours import gpu_target, load_flavour
from pcr_export.engines.onnxruntime import OnnxRuntimeEngine
from pcr_export.engines.tensorrt import build_engine
from pcr_export.engines.tensorrt_runner import DTYPES, TensorRtEngine, _make_log, require_gpu
from pcr_export.errors import PcrExportError

trt = pytest.importorskip("tensorrt_rtx")

GPU = gpu_target()
RUNS = GPU in load_flavour("tensorrt-rtx").targets
TARGET = str(GPU) if RUNS else "sm89"
without_gpu = pytest.mark.skipif(GPU is not None, reason="this machine has a GPU")
AXES = {"batch": (1, 2, 2), "height": (8, 16, 32), "width": (8, 16, 16)}
CALLS = {  # every member that the runner uses
    "Runtime": ("deserialize_cuda_engine",),
    "ICudaEngine": (
        "create_execution_context",
        "create_runtime_config",
        "get_tensor_dtype",
        "get_tensor_location",
        "get_tensor_mode",
        "get_tensor_name",
        "get_tensor_profile_shape",
        "num_io_tensors",
        "num_optimization_profiles",
    ),
    "IExecutionContext": (
        "execute_async_v3",
        "get_tensor_shape",
        "infer_shapes",
        "set_input_shape",
        "set_optimization_profile_async",
        "set_tensor_address",
    ),
    "IRuntimeConfig": (
        "create_runtime_cache",
        "cuda_graph_strategy",
        "dynamic_shapes_kernel_specialization_strategy",
        "set_runtime_cache",
    ),
    "IRuntimeCache": ("deserialize", "serialize"),
    "CudaGraphStrategy": ("DISABLED", "WHOLE_GRAPH_CAPTURE"),
    "DynamicShapesKernelSpecializationStrategy": ("EAGER",),
    "TensorIOMode": ("OUTPUT",),
    "TensorLocation": ("HOST",),
    "ILogger": ("ERROR", "INTERNAL_ERROR"),
}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unet")
    request = BuildRequest(
        onnx_path=save_small_graph(folder / "tensorrt" / "model.onnx"),
        engine_path=folder / f"{TARGET}.engine",
        flavour="tensorrt-rtx",
        target=TARGET,
        axes=AXES,
        layers=LAYERS,
        rebuild_command="pcr-export model --target sm89",
    )
    build_engine(request)
    return request.engine_path


@pytest.fixture
def engine(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built.parent, tmp_path / "unet")) / built.name


def onnx_of(engine: Path) -> Path:
    return engine.parent / "tensorrt" / "model.onnx"


def refuse(engine: Path, message: str) -> None:
    with pytest.raises(PcrExportError, match=message) as caught, TensorRtEngine(engine, onnx_of(engine)):
        pass
    assert "\n" not in str(caught.value)


@without_gpu
def test_a_machine_without_a_gpu_is_told_what_to_do(engine: Path) -> None:
    refuse(engine, "no CUDA GPU here: run the onnxruntime engine, or copy the folder to a GPU host")


@without_gpu
def test_a_torch_that_cannot_use_the_gpu_is_refused() -> None:
    with pytest.raises(PcrExportError, match=r"torch .* can't use this machine's sm89: install its CUDA build"):
        require_gpu("sm89")


def test_a_stale_engine_is_refused_before_anything_else(engine: Path) -> None:
    data = onnx_of(engine).with_name("model.onnx_data")
    data.write_bytes(data.read_bytes()[:-1] + b"\x55")
    refuse(engine, "stale.* ONNX file .* build it again: pcr-export model --target sm89")


def test_an_engine_of_another_version_is_refused(engine: Path) -> None:
    record = engine.with_suffix(".json")
    record.write_text(record.read_text().replace(f'"{trt.__version__}"', '"1.0.0"'))
    refuse(engine, rf"stale.*1\.0\.0, now .*{trt.__version__}.*; build it again: pcr-export model")


def test_a_damaged_engine_is_refused(engine: Path) -> None:
    engine.write_bytes(engine.read_bytes()[:-1])
    refuse(engine, "build it again: pcr-export model")


@pytest.mark.parametrize("suffix", [".engine", ".json"])
def test_a_missing_file_is_refused(engine: Path, suffix: str) -> None:
    engine.with_suffix(suffix).unlink()
    refuse(engine, "build")


def test_a_library_that_is_not_installed_is_named(engine: Path) -> None:
    code = (
        "import sys; sys.modules['tensorrt_rtx'] = None\n"
        "from pathlib import Path\n"
        "from pcr_export.engines.tensorrt_runner import TensorRtEngine\n"
        "from pcr_export.errors import PcrExportError\n"
        "try:\n    TensorRtEngine(Path(sys.argv[1])).__enter__()\n"
        "except PcrExportError as error:\n    print(error)"
    )
    said = subprocess.run([sys.executable, "-c", code, str(engine)], capture_output=True, text=True, check=True).stdout
    assert said == "tensorrt-rtx is not installed: pip install 'pcr-export[rtx]'\n"


def test_an_engine_outside_with_is_a_mistake(engine: Path) -> None:
    with pytest.raises(RuntimeError, match="inside `with`"):
        TensorRtEngine(engine).run({})


@pytest.mark.parametrize("name", CALLS)
def test_the_installed_library_has_what_the_runner_calls(name: str) -> None:
    assert [member for member in CALLS[name] if not hasattr(getattr(trt, name), member)] == []


def test_every_type_has_a_name_that_the_library_knows() -> None:
    assert set(DTYPES) <= set(trt.DataType.__members__)


def test_the_library_says_why_in_one_line() -> None:
    log = _make_log(trt)
    assert log.last() == "no reason given"
    assert trt.Runtime(log).deserialize_cuda_engine(b"no engine at all" * 10) is None
    assert "deserialize" in log.errors[0].lower()
    assert "\n" not in log.last()


@pytest.mark.skipif(not RUNS, reason="needs a GPU that TensorRT-RTX builds for")
def test_it_runs_as_onnxruntime_does(built: Path) -> None:
    rng = np.random.default_rng(0)
    with TensorRtEngine(built, onnx_of(built)) as engine, OnnxRuntimeEngine(onnx_of(built)) as reference:
        for shape in ((2, 32, 16, 16), (1, 32, 32, 8), (2, 32, 16, 16)):
            sample = rng.standard_normal(shape).astype(np.float32)
            for timestep in (0.5, 2.0):
                inputs = {"sample": sample, "timestep": np.float32(timestep)}
                expected = reference.run(inputs)
                # float16 around the integer products: values next to a rounding edge fall to either side
                np.testing.assert_allclose(engine.run(inputs), expected, atol=0.02 * np.abs(expected).max())
        assert 0 < engine.latency(inputs, 5).p50 < 1000
        with pytest.raises(PcrExportError, match=r"takes 1..2: rebuild it with a --batch MIN:OPT:MAX"):
            engine.run({"sample": np.zeros((3, 32, 16, 16), np.float32), "timestep": np.float32(1)})
