"""Engines of TensorRT and TensorRT-RTX: built in a process of their own, proven INT8, recorded."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import tempfile
from collections.abc import Mapping
from typing import IO, Any

from pcr_export.engines.build_process import advice
from pcr_export.engines.build_request import FLAGS, BuildRequest, trtexec_line
from pcr_export.engines.child_process import child_command, child_environment
from pcr_export.engines.engine_record import (
    INT8_SITE,
    EngineRecord,
    differences,
    read_engine_record,
    write_engine_record,
)
from pcr_export.engines.flavours import (
    FLAVOURS,
    Flavour,
    check_targets,
    compute_capability,
    gpu_target,
    load_flavour,
)
from pcr_export.engines.onnx_files import input_shapes, onnx_sha256
from pcr_export.errors import PcrExportError
from pcr_export.progress import Advance, Track, silent
from pcr_export.write_files import temporary_beside

__all__ = [
    "FLAVOURS",
    "BuildRequest",
    "EngineRecord",
    "Flavour",
    "build_engine",
    "check_targets",
    "current_engine",
    "gpu_target",
    "load_flavour",
    "trtexec_line",
]

NAMED = 3  # float layers that an error names
PERCENT = 100


def build_engine(request: BuildRequest, track: Track = silent, *, stream: bool = True) -> EngineRecord:
    """Build the engine of `request` and write it and its record.

    The builder runs in a process of its own: it holds nothing of this one's memory, and Ctrl-C ends it at once, which
    the library's own way does not (nearly all the time sits in one of its steps). Nothing is left behind by a build
    that fails or is stopped; an engine that lay there before is replaced only by one that is proven.

    Args:
        request: what to build.
        track: shows the percent of the build that is done. It stands still for long: show the elapsed time as well.
        stream: whether the library writes the engine piece by piece, where it can; it then holds one copy less.

    Raises:
        PcrExportError: the library is not installed or can't build for the target, an axis is missing, the parser or
            the builder refuses, or a layer that was to be INT8 is not.
    """
    (target,) = check_targets(request.flavour, (request.target,))
    shapes = input_shapes(request.onnx_path, request.axes)
    request.engine_path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_beside(request.engine_path)
    job = {
        "flavour": request.flavour,
        "target": target,
        "onnx": str(request.onnx_path),
        "engine": str(temporary),
        "inputs": shapes,
        "layers": request.layers,
        "timing_cache": str(request.timing_cache) if request.timing_cache and request.flavour == "tensorrt" else None,
        "stream": stream,
    }
    try:
        with track(f"building {target}", PERCENT) as advance:
            built = _run(job, advance)
        sites = {layer: reason or INT8_SITE for layer, reason in built.pop("sites").items()}
        _refuse_float(request, sites)
        record = _record(request, target, sites, built)
        request.record_path.unlink(missing_ok=True)
        os.replace(temporary, request.engine_path)
        write_engine_record(request.record_path, record)
    finally:
        temporary.unlink(missing_ok=True)
    return record


def current_engine(request: BuildRequest) -> tuple[EngineRecord | None, list[str]]:
    """The record of an engine that is there already and just as `request` wants it, or None and why not.

    A record that is missing or damaged is a reason as any other. Reads the ONNX files and the engine once, to hash them.
    """
    if not request.record_path.exists() and not request.engine_path.exists():
        return None, ["not built yet"]
    try:
        record = read_engine_record(request.record_path)
    except PcrExportError as error:
        return None, [str(error)]
    found = differences(record, request)
    return (None, found) if found else (record, [])


def _record(request: BuildRequest, target: str, sites: Mapping[str, str], built: Mapping[str, Any]) -> EngineRecord:
    line = trtexec_line(request)
    return EngineRecord(
        flavour=request.flavour,
        target=target,
        compute_capability=compute_capability(target),
        axes=dict(request.axes),
        inputs=input_shapes(request.onnx_path, request.axes),
        flags=FLAGS,
        onnx_sha256=onnx_sha256(request.onnx_path),
        sites=sites,
        built=True,
        ran=False,
        trtexec=line,
        rebuild_command=request.rebuild_command or line,
        **{**built, "kernel_table": tuple(tuple(row) for row in built["kernel_table"])},
    )


def _refuse_float(request: BuildRequest, sites: Mapping[str, str]) -> None:
    floats = [f"{layer} ({reason})" for layer, reason in sites.items() if reason != INT8_SITE]
    if not floats or request.allow_float_fallback:
        return
    more = f" and {len(floats) - NAMED} more" if len(floats) > NAMED else ""
    raise PcrExportError(
        f"{request.target}: {len(floats)} of {len(sites)} layers would not run in INT8: {', '.join(floats[:NAMED])}{more}; "
        "--allow-float-fallback keeps such an engine"
    )


def _run(job: Mapping[str, Any], advance: Advance) -> dict[str, Any]:
    """Run the job in a process of its own and follow it; what it says of the engine."""
    command, pipe = child_command("pcr_export.engines.build_process"), subprocess.PIPE
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=errors, env=child_environment(), encoding="utf-8"
        ) as process,
    ):
        try:
            _send(process, job)
            return _follow(process, job, advance, errors)
        finally:
            process.kill()  # `with` closes the pipes and waits


def _send(process: subprocess.Popen[str], job: Mapping[str, Any]) -> None:
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # a process that died at once is told of by its exit code
        process.stdin.write(json.dumps(job))
    with contextlib.suppress(BrokenPipeError):
        process.stdin.close()


def _follow(
    process: subprocess.Popen[str], job: Mapping[str, Any], advance: Advance, errors: IO[bytes]
) -> dict[str, Any]:
    assert process.stdout is not None
    percent = 0
    for line in process.stdout:
        message = json.loads(line)
        if "error" in message:
            raise PcrExportError(message["error"])
        if "result" in message:
            advance(PERCENT - percent)
            return dict(message["result"])
        advance(message["percent"] - percent)
        percent = message["percent"]
    code = process.wait()
    errors.seek(0)
    last = errors.read().decode("utf-8", "replace").strip().splitlines()[-1:]
    said = f", its last words: {last[0][:300]}" if last else ""
    raise PcrExportError(
        f"the builder of {job['flavour']} crashed on {job['onnx']} (exit code {code}){said}{advice(job)}"
    )
