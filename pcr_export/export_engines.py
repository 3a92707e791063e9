"""TensorRT engines of an export: its dialect of the graph, an engine per target, and what each turned out to be."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from pcr_export.engine_settings import EngineSettings, Range
from pcr_export.engines.engine_folder import FLOAT_SUFFIX, tensorrt_onnx
from pcr_export.engines.flavours import compute_capability
from pcr_export.engines.tensorrt import (
    BuildRequest,
    EngineRecord,
    build_engine,
    check_targets,
    current_engine,
    trtexec_line,
)
from pcr_export.errors import PcrExportError
from pcr_export.export_results import forget_report
from pcr_export.graph.quantize import write_half_onnx
from pcr_export.progress import Track
from pcr_export.report import finite
from pcr_export.stages import Facts
from pcr_export.write_files import write_text

if TYPE_CHECKING:
    import onnx_ir as ir

COMMANDS = "build_commands.txt"


@dataclass(frozen=True, kw_only=True)
class EngineJob:
    """The engines of one quantized graph."""

    settings: EngineSettings
    folder: Path  # the export's
    axes: Mapping[str, Range]  # of the graph's inputs
    layers: tuple[str, ...]  # that must run in INT8
    track: Track
    log: Callable[[str], None]

    def request(self, target: str) -> BuildRequest:
        """What is built for `target`."""
        return BuildRequest(
            onnx_path=tensorrt_onnx(self.folder),
            engine_path=self.folder / "unet" / f"{target}.engine",
            flavour=self.settings.backend,
            target=target,
            axes=self.axes,
            layers=self.layers,
            allow_float_fallback=self.settings.allow_float_fallback,
            timing_cache=self.folder / "unet" / "tensorrt" / f"{target}.timing_cache",
            rebuild_command=self.settings.rebuild_command,
        )


def check_engines(settings: EngineSettings) -> None:
    """Refuse what can't be built on this machine, or has no command to be built elsewhere. Cheap: called before a long calibration.

    Raises:
        PcrExportError: as `check_targets`; without a build, a GPU that TensorRT-RTX's command has to name is missing or none.
    """
    if settings.wants_tensorrt and settings.build:
        check_targets(settings.backend, settings.targets)
    elif settings.backend == "tensorrt-rtx":
        if not settings.targets:
            raise PcrExportError("tensorrt-rtx builds ahead of time: name the GPUs, --target sm86,sm89,sm120")
        for target in settings.targets:
            compute_capability(target)


def make_engines(job: EngineJob) -> list[Facts]:
    """Build the engines that are not there yet, or not as they should be; with build=False only write down how.

    Returns one entry of the report per engine, built or not. Raises PcrExportError as `build_engine` does; engines built before stay.
    """
    settings = job.settings
    targets = check_targets(settings.backend, settings.targets) if settings.build else settings.targets or ("current",)
    requests = [job.request(target) for target in targets]
    lines = [trtexec_line(request) for request in requests]
    write_text(tensorrt_onnx(job.folder).with_name(COMMANDS), "\n".join(lines) + "\n")
    if not settings.build:
        pairs = zip(requests, lines, strict=True)
        return [_entry(request) | {"built": False, "ran": False, "trtexec": line} for request, line in pairs]
    return [_facts(_build(job, request), request) for request in requests]


def measure_on_gpu(job: EngineJob, gpu: str | None, float_graph: Callable[[], ir.Model]) -> Facts:
    """What the engine for this machine's GPU computes and how fast, beside the network without quantization in FP16.

    Args:
        gpu: this machine's, as `gpu_target` tells.
        float_graph: the network.

    Returns:
        Empty where no engine is for that GPU. The FP16 engine stays beside the other, to be timed again.
    """
    if gpu is None or not (job.folder / "unet" / f"{gpu}.engine").is_file():
        return {}
    request = job.request(gpu)
    half = replace(
        request,
        onnx_path=job.folder / ".stages" / "half" / "model.onnx",
        engine_path=request.engine_path.with_name(f"{gpu}{FLOAT_SUFFIX}.engine"),
        layers=(),
    )
    write_half_onnx(float_graph(), half.onnx_path)
    _build(job, half)
    from pcr_export.engines.compare import compare_folder  # polygraphy comes with the extras of TensorRT alone

    comparison = compare_folder(job.folder, [gpu], track=job.track)
    return {
        "target": gpu,
        "ran": gpu in comparison.timings,
        "distances": [{**asdict(row), "sqnr_db": finite(row.sqnr_db)} for row in comparison.rows],
        **comparison.timings.get(gpu, {}),
    }


def _build(job: EngineJob, request: BuildRequest) -> EngineRecord:
    record, reasons = current_engine(request)
    if record is not None:
        job.log(f"{request.target}: built before, nothing changed")
        return record
    job.log(f"{request.target}: building, {'; '.join(reasons)}")
    forget_report(job.folder)
    return build_engine(request, job.track)


def _facts(record: EngineRecord, request: BuildRequest) -> Facts:
    names = (
        "version",
        "built",
        "ran",
        "axes",
        "kernels",
        "pointwise_kernels",
        "weight_bytes",
        "activation_bytes",
        "engine_bytes",
        "build_seconds",
        "trtexec",
    )
    return {
        **_entry(request),
        "int8_layers": len(record.sites) - len(record.floats),
        "float_layers": record.floats,
        **{name: getattr(record, name) for name in names},
    }


def _entry(request: BuildRequest) -> Facts:
    return {"backend": request.flavour, "target": request.target, "file": request.engine_path.name}
