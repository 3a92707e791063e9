"""The JSON beside an engine: what it was built from, with and for, and what is refused because that no longer holds."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec

from pcr_export.engine_settings import Range
from pcr_export.engines.build_request import FLAGS, BuildRequest
from pcr_export.engines.flavours import Flavour, load_flavour
from pcr_export.engines.onnx_files import ShapeRange, add_file, input_shapes, onnx_sha256
from pcr_export.errors import PcrExportError
from pcr_export.read_files import MissingFileError, read_json
from pcr_export.write_files import write_json

FORMAT_VERSION = 1
INT8_SITE = "int8"


@dataclass(frozen=True, kw_only=True)
class EngineRecord:
    """What is known of one engine.

    Args:
        flavour, version: of the library that built it.
        target, compute_capability: the GPU, "sm89" and "8.9".
        axes, inputs: minimum, optimum, maximum of the symbolic axes and of every input's shape.
        flags: how it was built, in words.
        onnx_sha256: over the ONNX file and its external data.
        engine_sha256, engine_bytes: of the engine file.
        kernels, pointwise_kernels: how many, and how many of them are generated kernels between the products.
        kernel_table: (type, data types read, data types written, count).
        data_dependent: whether the host reads a value back before it knows what to launch: no single CUDA graph holds it.
        weight_bytes, activation_bytes: device memory, as the builder tells; None where it doesn't.
        parse_seconds, build_seconds: wall time.
        peak_bytes: the most memory that the building process had resident; None where the system doesn't tell.
        sites: module path of each layer that was to be INT8 -> "int8" or the reason why not.
        built, ran: it was built; whether it ever ran on a GPU is for the one who runs it to say.
        trtexec: the command line that builds it without this package.
        rebuild_command: what to type to build it again.
    """

    flavour: str
    version: str
    target: str
    compute_capability: str
    axes: Mapping[str, Range]
    inputs: Mapping[str, ShapeRange]
    flags: tuple[str, ...]
    onnx_sha256: str
    engine_sha256: str
    engine_bytes: int
    kernels: int
    pointwise_kernels: int
    kernel_table: tuple[tuple[str, str, str, int], ...]
    data_dependent: bool
    weight_bytes: int | None
    activation_bytes: int | None
    parse_seconds: float
    build_seconds: float
    peak_bytes: int | None
    sites: Mapping[str, str]
    built: bool
    ran: bool
    trtexec: str
    rebuild_command: str

    @property
    def floats(self) -> dict[str, str]:
        """The layers that were to be INT8 and are not, with the reasons."""
        return {layer: reason for layer, reason in self.sites.items() if reason != INT8_SITE}


def write_engine_record(path: Path, record: EngineRecord) -> None:
    """Write `record` as indented JSON, through a temporary name."""
    write_json(path, {"format_version": FORMAT_VERSION, **asdict(record)})


def read_engine_record(path: Path) -> EngineRecord:
    """The record of the engine in `path`; `path` may be the engine's or the record's own.

    Raises:
        PcrExportError: it is missing, damaged, or of a format that this version does not read.
    """
    path = path.with_suffix(".json")
    try:
        content = read_json(path, advice="build the engine again")
    except MissingFileError as error:
        raise PcrExportError(f"{path} does not exist: build the engine first") from error
    version = content.pop("format_version", None)
    if version != FORMAT_VERSION:
        raise PcrExportError(
            f"{path} has format {version}, this version reads {FORMAT_VERSION}: build the engine again"
        )
    try:
        return msgspec.convert(content, EngineRecord)
    except msgspec.ValidationError as error:
        raise PcrExportError(f"{path} is damaged ({error}): build the engine again") from error


def differences(record: EngineRecord, request: BuildRequest) -> list[str]:
    """What of `record` and its engine file is not as `request` wants it, in words; empty: the engine is current.

    Reads the ONNX files and the engine once, to hash them.
    """
    pairs = [
        ("built by", record.flavour, request.flavour),
        ("target", record.target, request.target),
        ("version", record.version, load_flavour(request.flavour).version),
        ("shapes", _words(record.inputs), _words(input_shapes(request.onnx_path, request.axes))),
        ("flags", ", ".join(record.flags), ", ".join(FLAGS)),
        ("layers", _digest(record.sites), _digest(request.layers)),
        ("ONNX file", _short(record.onnx_sha256), _short(onnx_sha256(request.onnx_path))),
    ]
    found = [f"{part}: {was} then, {now} now" for part, was, now in pairs if was != now]
    if record.floats and not request.allow_float_fallback:
        found.append(f"float layers: {len(record.floats)} then, none allowed now")
    damage = file_damage(record, request.engine_path)
    return found + ([damage] if damage else [])


def check_current(
    record: EngineRecord,
    engine_path: Path,
    *,
    flavour: Flavour | None = None,
    gpu: str | None = None,
    onnx_path: Path | None = None,
    axes: Mapping[str, Range] | None = None,
) -> None:
    """Refuse an engine that is stale. Only what is given is compared, and the engine file always.

    Args:
        record: of the engine.
        engine_path: the engine file; read once, to hash it.
        flavour: the library that is to run it.
        gpu: this machine's, such as "sm89".
        onnx_path: the ONNX file that it should be built from.
        axes: minimum, optimum and maximum of the symbolic axes that it should take.

    Raises:
        PcrExportError: one line with the part that differs, both values and the command that rebuilds it.
    """
    pairs = [
        ("library", f"{record.flavour} {record.version}", flavour and f"{flavour.name} {flavour.version}"),
        ("GPU", record.target, gpu),
        ("shapes", _words(record.axes), None if axes is None else _words(axes)),
        ("ONNX file", _short(record.onnx_sha256), None if onnx_path is None else _short(onnx_sha256(onnx_path))),
    ]
    for part, was, now in pairs:
        if now is not None and was != now:
            raise PcrExportError(
                f"{engine_path} is stale: built for {part} {was}, now {now}; build it again: {record.rebuild_command}"
            )
    if damage := file_damage(record, engine_path):
        raise PcrExportError(f"{engine_path} can't be used, {damage}; build it again: {record.rebuild_command}")


def file_damage(record: EngineRecord, engine_path: Path) -> str | None:
    """What is wrong with the engine file, in words; None: it is the one of the record, byte for byte."""
    if not engine_path.is_file():
        return "engine file: missing"
    size = engine_path.stat().st_size
    if size != record.engine_bytes:
        return f"engine file: {record.engine_bytes} bytes then, {size} now"
    digest = hashlib.sha256()
    add_file(digest, engine_path)
    if digest.hexdigest() != record.engine_sha256:
        return f"engine file: {_short(record.engine_sha256)} then, {_short(digest.hexdigest())} now"
    return None


def _words(ranges: Mapping[str, Any]) -> str:
    """ "batch 1/2/4, height 32/32/64", or shapes in place of the sizes."""
    return ", ".join(f"{name} {'/'.join(map(_x, values))}" for name, values in sorted(ranges.items()))


def _x(value: int | Sequence[int]) -> str:
    return str(value) if isinstance(value, int) else "x".join(map(str, value)) or "scalar"


def _short(sha256: str) -> str:
    return sha256[:12]


def _digest(layers: Mapping[str, str] | Sequence[str]) -> str:
    names = sorted(layers)
    return f"{len(names)} ({_short(hashlib.sha256(json.dumps(names).encode()).hexdigest())})"
