"""Engines built by the real TensorRT-RTX builder, which needs no GPU."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import onnx_ir as ir
import pytest
from engines.small_qdq import LAYERS, save_small_graph

from pcr_export.engines.build_process import load_timing_cache, save_timing_cache
from pcr_export.engines.build_request import BuildRequest, trtexec_line
from pcr_export.engines.builder_callbacks import Phases, Sink
from pcr_export.engines.engine_record import read_engine_record
from pcr_export.engines.flavours import Flavour, check_targets, compute_capability, load_flavour, resolve_targets
from pcr_export.engines.tensorrt import build_engine, current_engine
from pcr_export.errors import PcrExportError

AXES = {"batch": (1, 2, 2), "height": (8, 16, 32), "width": (8, 16, 16)}
HEADER = '<ir_version: 10, opset_import: ["" : 23]>'
UNKNOWN_OPERATOR = f"{HEADER} odd (int8[2, 8] x, int8[8, 2] w) => (int32[2, 2] y) {{ y = MatMulInteger(x, w) }}"
MIXED_TYPES = f"{HEADER} odd (float[2, 8] x, float16[2, 2] w) => (float[2, 10] y) {{ y = Concat<axis = 1>(x, w) }}"


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_graph(tmp_path_factory.mktemp("small") / "model.onnx")


@pytest.fixture(scope="session")
def half_float(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_graph(tmp_path_factory.mktemp("half_float") / "model.onnx", float_proj=True)


def request_for(onnx_path: Path, folder: Path, target: str = "sm89", **changes: object) -> BuildRequest:
    settings: dict = {"axes": AXES, "layers": LAYERS} | changes
    return BuildRequest(
        onnx_path=onnx_path, engine_path=folder / f"{target}.engine", flavour="tensorrt-rtx", target=target, **settings
    )


@contextmanager
def collect(seen: list[int], act: Callable[[], None] = lambda: None) -> Iterator[Callable[[int], None]]:
    def advance(count: int) -> None:
        seen.append(count)
        act()

    yield advance


@pytest.mark.parametrize("target", ["sm86", "sm89", "sm120"])
def test_an_engine_is_built_proven_int8_and_recorded(small: Path, tmp_path: Path, target: str) -> None:
    request = request_for(small, tmp_path, target)
    seen: list[int] = []
    record = build_engine(request, lambda _description, total: collect(seen))
    assert record.sites == dict.fromkeys(LAYERS, "int8")
    assert ("correlation", "Int8 x Int8", "Half", 2) in record.kernel_table
    assert record.kernels == sum(row[-1] for row in record.kernel_table) > record.pointwise_kernels > 0
    assert record.target == target
    assert record.inputs["sample"] == ((1, 32, 8, 8), (2, 32, 16, 16), (2, 32, 32, 16))
    assert (record.weight_bytes or 0) >= 32 * 32 * 10  # the integer weights themselves
    assert record.built
    assert not record.ran
    assert sum(seen) == 100
    assert min(seen) >= 0
    assert record.engine_bytes == request.engine_path.stat().st_size
    assert read_engine_record(request.record_path) == record
    assert current_engine(request) == (record, [])
    assert sorted(os.listdir(tmp_path)) == [f"{target}.engine", f"{target}.json"]


def test_the_whole_engine_at_once_is_the_same(small: Path, tmp_path: Path) -> None:
    pieces = build_engine(request_for(small, tmp_path))
    whole = build_engine(request_for(small, tmp_path), stream=False)
    assert (whole.sites, whole.kernel_table, whole.weight_bytes) == (
        pieces.sites,
        pieces.kernel_table,
        pieces.weight_bytes,
    )


def test_a_float_layer_is_refused_and_leaves_nothing(half_float: Path, tmp_path: Path) -> None:
    with pytest.raises(
        PcrExportError, match=r"1 of 2 layers .* mid.proj \(the builder chose Half x Half\).*--allow-float"
    ):
        build_engine(request_for(half_float, tmp_path))
    assert os.listdir(tmp_path) == []


def test_a_refused_build_keeps_the_engine_that_was_there(small: Path, half_float: Path, tmp_path: Path) -> None:
    kept = request_for(small, tmp_path)
    record = build_engine(kept)
    with pytest.raises(PcrExportError, match="--allow-float-fallback"):
        build_engine(request_for(half_float, tmp_path))
    assert current_engine(kept) == (record, [])


def test_a_float_layer_that_is_allowed_is_recorded(half_float: Path, tmp_path: Path) -> None:
    record = build_engine(request_for(half_float, tmp_path, allow_float_fallback=True))
    assert record.sites == {"conv1": "int8", "mid.proj": "the builder chose Half x Half"}
    assert record.floats == {"mid.proj": "the builder chose Half x Half"}
    _, why = current_engine(request_for(half_float, tmp_path))
    assert why == ["float layers: 1 then, none allowed now"]


def test_a_layer_that_the_graph_does_not_have_is_named(small: Path, tmp_path: Path) -> None:
    with pytest.raises(PcrExportError, match=r"up\.conv \(no kernel names it\)"):
        build_engine(request_for(small, tmp_path, layers=(*LAYERS, "up.conv")))


def test_an_axis_without_a_range_is_refused(small: Path, tmp_path: Path) -> None:
    with pytest.raises(PcrExportError, match="input sample has the axis width: give it as min/opt/max"):
        build_engine(request_for(small, tmp_path, axes={"batch": (1, 1, 1), "height": (8, 8, 8)}))


def test_a_range_that_does_not_ascend_is_refused(small: Path, tmp_path: Path) -> None:
    with pytest.raises(PcrExportError, match="batch 2/1/4 is no range: write min/opt/max in ascending order"):
        build_engine(request_for(small, tmp_path, axes=AXES | {"batch": (2, 1, 4)}))


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C as a terminal gives it: a process that was started in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_ends_the_build_and_leaves_nothing(small: Path, tmp_path: Path) -> None:
    track = lambda _description, _total: collect([], lambda: signal.raise_signal(signal.SIGINT))  # noqa: E731
    with pytest.raises(KeyboardInterrupt):
        build_engine(request_for(small, tmp_path), track)
    assert os.listdir(tmp_path) == []


def crash_the_builder() -> None:
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    for each in children:  # a child that is dead already has no command line
        with suppress(OSError):
            if b"build_process" in Path(f"/proc/{each}/cmdline").read_bytes():
                os.kill(int(each), signal.SIGSEGV)


def test_a_builder_that_crashes_is_an_error_in_one_line(small: Path, tmp_path: Path) -> None:
    """Some graphs end the library with a segmentation fault; that must not end the job."""
    with pytest.raises(
        PcrExportError, match=r"the builder of tensorrt-rtx crashed on .*model\.onnx .exit code -11.*one size"
    ) as caught:
        build_engine(request_for(small, tmp_path), lambda _description, _total: collect([], crash_the_builder))
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("graph", "why"),
    [
        (UNKNOWN_OPERATOR, "MatMulInteger node '', UNSUPPORTED_NODE"),
        (MIXED_TYPES, "Concat node '', INVALID_NODE: .* inputs.1. is of type Half but inputs.0. is of type Float"),
    ],
)
def test_the_parsers_first_error_is_told(tmp_path: Path, graph: str, why: str) -> None:
    ir.save(ir.from_onnx_text(graph), tmp_path / "odd.onnx")
    with pytest.raises(PcrExportError, match=f"is not parsed: {why}") as caught:
        build_engine(request_for(tmp_path / "odd.onnx", tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [None, b"no graph at all"])
def test_a_missing_or_broken_graph_is_refused(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "model.onnx").write_bytes(content)
    with pytest.raises(PcrExportError, match="export the model"):
        build_engine(request_for(tmp_path / "model.onnx", tmp_path))


def test_what_can_not_be_written_is_told() -> None:
    def full(_data: bytes) -> int:
        raise OSError("no space left")

    sink = Sink(full)
    assert sink.take(b"abc") == 0
    assert str(sink.error) == "no space left"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("content", [None, b"", b"no cache"])
def test_a_timing_cache_is_read_and_written(tmp_path: Path, content: bytes | None) -> None:
    """TensorRT-RTX keeps the calls and stores nothing; they are TensorRT's."""
    trt = load_flavour("tensorrt-rtx").module
    config = trt.Builder(trt.Logger(trt.Logger.INTERNAL_ERROR)).create_builder_config()
    path = tmp_path / "caches" / "sm89"
    if content is not None:
        path.parent.mkdir()
        path.write_bytes(content)
    load_timing_cache(config, path)
    assert config.get_timing_cache() is not None
    save_timing_cache(config, path)
    assert path.stat().st_size > len(content or b"")
    assert os.listdir(path.parent) == ["sm89"]


def test_percent_grows_through_nested_phases() -> None:
    phases = Phases()
    phases.start("outer", 4)
    assert phases.step("outer") == 25
    phases.start("inner", 2)
    assert phases.step("inner") == 37
    assert phases.step("inner") == 50
    phases.finish("inner")
    assert phases.step("outer") == 50
    assert phases.step("unknown") == 50


def test_targets_are_known_by_the_library() -> None:
    assert check_targets("tensorrt-rtx", ["SM86", " sm89", "sm86", "sm120"]) == ("sm86", "sm89", "sm120")
    assert compute_capability("sm120") == "12.0"


@pytest.mark.parametrize(
    ("target", "why"),
    [
        ("sm75", "sm75 is refused: its builder runs the INT8 pattern silently in FP16"),
        ("sm90", "does not build for sm90: it builds for .*sm86, sm89, sm120"),
        ("rtx4090", "does not build for rtx4090"),
        ("", "name the GPUs, --target .*sm86,sm89,sm120"),
    ],
)
def test_a_wrong_target_is_refused(target: str, why: str) -> None:
    with pytest.raises(PcrExportError, match=why):
        check_targets("tensorrt-rtx", [target])


def test_an_unknown_flavour_is_refused() -> None:
    with pytest.raises(PcrExportError, match="the builders are tensorrt, tensorrt-rtx"):
        load_flavour("openvino")


def test_the_current_gpu_is_a_target_where_there_is_one() -> None:
    rtx = load_flavour("tensorrt-rtx")
    assert resolve_targets(rtx, ["current", "sm86"], "sm89") == ("sm89", "sm86")
    with pytest.raises(PcrExportError, match="this machine has no GPU: name the GPUs"):
        resolve_targets(rtx, ["current"], None)


def test_tensorrt_builds_for_this_machines_gpu_alone() -> None:
    tensorrt = Flavour(name="tensorrt", module=None, version="10.14", targets=())
    assert resolve_targets(tensorrt, [], "sm89") == ("sm89",)
    assert resolve_targets(tensorrt, ["current"], "sm90") == ("sm90",)
    assert resolve_targets(tensorrt, ["sm89"], "sm89") == ("sm89",)
    with pytest.raises(PcrExportError, match="only for this machine's GPU, sm89, not for sm86: use tensorrt-rtx"):
        resolve_targets(tensorrt, ["sm86"], "sm89")
    with pytest.raises(PcrExportError, match="this machine has none: use tensorrt-rtx"):
        resolve_targets(tensorrt, [], None)
    with pytest.raises(PcrExportError, match="sm75 is refused"):
        resolve_targets(tensorrt, [], "sm75")


@pytest.mark.parametrize(
    ("module", "flavour", "advice"),
    [
        ("tensorrt_rtx", "tensorrt-rtx", "tensorrt-rtx is not installed: pip install 'pcr-export[rtx]'"),
        (
            "tensorrt",
            "tensorrt",
            "pip install 'pcr-export[tensorrt]', or build on another machine with the trtexec line",
        ),
    ],
)
def test_a_library_that_is_not_installed_is_told(module: str, flavour: str, advice: str) -> None:
    code = f"""import sys; sys.modules[{module!r}] = None
from pcr_export.engines.tensorrt import check_targets
from pcr_export.errors import PcrExportError
try:
    check_targets({flavour!r}, ["sm89"])
except PcrExportError as error:
    print(error)"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert advice in ran.stdout


def test_the_line_for_people_who_build_elsewhere(small: Path, tmp_path: Path) -> None:
    request = request_for(small, tmp_path)
    assert trtexec_line(request) == (
        f"tensorrt_rtx --onnx={small} --computeCapabilities=89 --minShapes=sample:1x32x8x8 --optShapes=sample:2x32x16x16 "
        f"--maxShapes=sample:2x32x32x16 --saveEngine={tmp_path}/sm89.engine --profilingVerbosity=detailed --skipInference"
    )
    elsewhere = BuildRequest(
        onnx_path=small,
        engine_path=tmp_path / "sm89.engine",
        flavour="tensorrt",
        target="sm89",
        axes=AXES,
        timing_cache=tmp_path / "cache",
    )
    assert trtexec_line(elsewhere).startswith(f"trtexec --onnx={small} --stronglyTyped '--decomposableAttentions=*'")
    assert f"--timingCacheFile={tmp_path}/cache" in trtexec_line(elsewhere)
