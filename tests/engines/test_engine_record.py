"""A stale engine is refused with the part that differs, both values and the command that rebuilds it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from engines.small_qdq import LAYERS, save_small_graph

from pcr_export.engines.build_request import BuildRequest
from pcr_export.engines.engine_record import (
    EngineRecord,
    check_current,
    differences,
    read_engine_record,
    write_engine_record,
)
from pcr_export.engines.flavours import load_flavour
from pcr_export.engines.tensorrt import build_engine, current_engine
from pcr_export.errors import PcrExportError

REBUILD = "pcr-export tiny-sdxl --backend tensorrt-rtx --target sm89"
AXES = {"batch": (1, 1, 2), "height": (8, 8, 8), "width": (8, 8, 8)}


@pytest.fixture
def request_(tmp_path: Path) -> BuildRequest:
    return BuildRequest(
        onnx_path=save_small_graph(tmp_path / "tensorrt" / "model.onnx"),
        engine_path=tmp_path / "sm89.engine",
        flavour="tensorrt-rtx",
        target="sm89",
        axes=AXES,
        layers=LAYERS,
        rebuild_command=REBUILD,
    )


@pytest.fixture
def record(request_: BuildRequest) -> EngineRecord:
    return build_engine(request_)


def test_what_is_current_passes(request_: BuildRequest, record: EngineRecord) -> None:
    assert differences(record, request_) == []
    rtx = load_flavour("tensorrt-rtx")
    check_current(
        record,
        request_.engine_path,
        flavour=rtx,
        gpu="sm89",
        onnx_path=request_.onnx_path,
        axes=dict(reversed(AXES.items())),
    )


def test_a_record_is_read_as_it_was_written(request_: BuildRequest, record: EngineRecord, tmp_path: Path) -> None:
    write_engine_record(tmp_path / "copy.json", record)
    assert read_engine_record(tmp_path / "copy.json") == record
    assert read_engine_record(request_.engine_path) == record  # by the engine's own name


def test_another_graph_is_told(request_: BuildRequest, record: EngineRecord) -> None:
    data = request_.onnx_path.with_name("model.onnx_data")
    data.write_bytes(data.read_bytes()[:-1] + b"\x55")  # one weight byte, in the external file
    (found,) = differences(record, request_)
    assert found.startswith(f"ONNX file: {record.onnx_sha256[:12]} then, ")
    with pytest.raises(PcrExportError, match=f"stale: built for ONNX file .*, now .*; build it again: {REBUILD}"):
        check_current(record, request_.engine_path, onnx_path=request_.onnx_path)


def test_another_version_is_told(request_: BuildRequest, record: EngineRecord) -> None:
    old = replace(record, version="1.3.0")
    now = load_flavour("tensorrt-rtx")
    assert differences(old, request_) == [f"version: 1.3.0 then, {now.version} now"]
    with pytest.raises(
        PcrExportError,
        match=rf"stale: built for library tensorrt-rtx 1\.3\.0, now tensorrt-rtx {now.version}; .*{REBUILD}",
    ):
        check_current(old, request_.engine_path, flavour=now)


def test_another_gpu_is_told(request_: BuildRequest, record: EngineRecord) -> None:
    assert differences(record, replace(request_, target="sm86")) == ["target: sm89 then, sm86 now"]
    with pytest.raises(PcrExportError, match=f"stale: built for GPU sm89, now sm120; build it again: {REBUILD}"):
        check_current(record, request_.engine_path, gpu="sm120")


def test_other_shapes_are_told(request_: BuildRequest, record: EngineRecord) -> None:
    axes = AXES | {"batch": (1, 2, 4)}
    (found,) = differences(record, replace(request_, axes=axes))
    assert found == (
        "shapes: sample 1x32x8x8/1x32x8x8/2x32x8x8, timestep scalar/scalar/scalar then, "
        "sample 1x32x8x8/2x32x8x8/4x32x8x8, timestep scalar/scalar/scalar now"
    )
    with pytest.raises(PcrExportError, match=r"stale: built for shapes batch 1/1/2, .*, now batch 1/2/4"):
        check_current(record, request_.engine_path, axes=axes)


def test_other_flags_and_layers_are_told(request_: BuildRequest, record: EngineRecord) -> None:
    (flags,) = differences(replace(record, flags=("weakly typed",)), request_)
    assert flags.startswith("flags: weakly typed then, strongly typed")
    (layers,) = differences(record, replace(request_, layers=("conv1",)))
    assert layers.startswith("layers: 2 (")


def test_a_missing_or_damaged_engine_is_told(request_: BuildRequest, record: EngineRecord) -> None:
    engine = request_.engine_path
    content = engine.read_bytes()
    engine.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(
        PcrExportError, match=f"can't be used, engine file: {record.engine_sha256[:12]} then, .*{REBUILD}"
    ):
        check_current(record, engine)
    engine.write_bytes(content[:-1])
    assert differences(record, request_) == [f"engine file: {len(content)} bytes then, {len(content) - 1} now"]
    engine.unlink()
    with pytest.raises(PcrExportError, match="engine file: missing"):
        check_current(record, engine)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"format_version": 1}', '{"format_version": 1, "axes": 3}'])
def test_a_damaged_record_is_refused_in_one_line(request_: BuildRequest, record: EngineRecord, text: str) -> None:
    request_.record_path.write_text(text)
    with pytest.raises(
        PcrExportError, match=r"(is damaged|can't be read|holds no JSON object).*build the engine again"
    ) as caught:
        read_engine_record(request_.record_path)
    assert "\n" not in str(caught.value)
    assert current_engine(request_)[0] is None


def test_fields_of_the_wrong_shape_are_damage(request_: BuildRequest, record: EngineRecord) -> None:
    content = json.loads(request_.record_path.read_text())
    content["axes"]["batch"] = [1, 2]
    request_.record_path.write_text(json.dumps(content))
    with pytest.raises(PcrExportError, match="is damaged"):
        read_engine_record(request_.record_path)


def test_another_format_is_refused(request_: BuildRequest, record: EngineRecord) -> None:
    content = json.loads(request_.record_path.read_text()) | {"format_version": 99}
    request_.record_path.write_text(json.dumps(content))
    with pytest.raises(PcrExportError, match="has format 99, this version reads 1: build the engine again"):
        read_engine_record(request_.record_path)


def test_an_engine_that_was_never_built(request_: BuildRequest) -> None:
    assert current_engine(request_) == (None, ["not built yet"])
    with pytest.raises(PcrExportError, match="does not exist: build the engine first"):
        read_engine_record(request_.record_path)
