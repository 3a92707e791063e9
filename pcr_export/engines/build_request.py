"""What an engine is to be built from and for, and the command line that builds it without this package."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pcr_export.engine_settings import Range
from pcr_export.engines.flavours import compute_capability
from pcr_export.engines.onnx_files import input_axes, input_shapes

FLAGS = ("strongly typed", "detailed profiling verbosity", "decomposable attention", "one optimization profile")


@dataclass(frozen=True, kw_only=True)
class BuildRequest:
    """One engine to be built.

    Args:
        onnx_path: the quantized graph; its external data lies beside it.
        engine_path: where the engine goes; its record goes beside it, as .json.
        flavour: "tensorrt" or "tensorrt-rtx".
        target: the GPU, such as "sm89", as `check_targets` gave it.
        axes: minimum, optimum and maximum of each symbolic axis of the inputs (batch, height, width; latent pixels).
        layers: the module paths whose products must run in INT8.
        allow_float_fallback: whether an engine with some of them in float is kept, and recorded as such.
        timing_cache: TensorRT's measured tactics, read and written; TensorRT-RTX has none.
        rebuild_command: what a person types to build this engine again; None: the trtexec line.
    """

    onnx_path: Path
    engine_path: Path
    flavour: str
    target: str
    axes: Mapping[str, Range]
    layers: tuple[str, ...] = ()
    allow_float_fallback: bool = False
    timing_cache: Path | None = None
    rebuild_command: str | None = None

    @property
    def record_path(self) -> Path:
        """The JSON beside the engine."""
        return self.engine_path.with_suffix(".json")


def trtexec_line(request: BuildRequest) -> str:
    """The exact command that builds the engine of `request` with the library's own tool; nothing need be installed here.

    `trtexec` (TensorRT 10.14 or newer) or `tensorrt_rtx`.

    Raises:
        PcrExportError: as `input_shapes`.
    """
    shapes = input_shapes(request.onnx_path, request.axes)
    inputs = input_axes(request.onnx_path)
    dynamic = {name: shapes[name] for name, dims in inputs.items() if any(isinstance(dim, str) for dim in dims)}
    words = ["tensorrt_rtx" if request.flavour == "tensorrt-rtx" else "trtexec", f"--onnx={request.onnx_path}"]
    if request.flavour == "tensorrt":
        words += ["--stronglyTyped", "--decomposableAttentions=*"]
        words += [f"--timingCacheFile={request.timing_cache}"] if request.timing_cache else []
    else:
        words.append(f"--computeCapabilities={compute_capability(request.target).replace('.', '')}")
    for index, option in enumerate(("minShapes", "optShapes", "maxShapes")):
        sizes = [f"{name}:{'x'.join(map(str, ranges[index]))}" for name, ranges in dynamic.items()]
        words += [f"--{option}={','.join(sizes)}"] if sizes else []
    words += [f"--saveEngine={request.engine_path}", "--profilingVerbosity=detailed", "--skipInference"]
    return shlex.join(words)
