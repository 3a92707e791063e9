"""StepScales + float ONNX -> quantized ONNX in the dialect of an engine: the whole job."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from pcr_export.calibrate.weights.rounding import NEAREST_8, RoundWeight
from pcr_export.engines.onnx_files import load_onnx
from pcr_export.errors import PcrExportError
from pcr_export.graph.job import MICROSOFT, Job
from pcr_export.graph.passes import DIALECTS, HALF_PASSES
from pcr_export.graph.weight_file import WeightFile
from pcr_export.sites import Layer
from pcr_export.step_scales import StepScales

IR_VERSION = 10
NOTHING_QUANTIZED = StepScales(
    scale=np.zeros((1, 0), np.float32),
    zero_point=np.zeros((1, 0), np.uint8),
    bits=np.array([8], np.uint8),
    timesteps=np.zeros(1, np.float32),
    sites=(),
    layers={},
)


@dataclass(frozen=True, kw_only=True)
class GraphReport:
    """What the quantizing job made."""

    onnx_bytes: int  # model file and its external data
    float_bytes: int  # of the float graph's weights
    quantizers: int  # quantized tensors
    layers: tuple[str, ...]  # module paths of the quantized layers
    rewrites: dict[str, int]  # pass -> places that it rewrote


def quantize_onnx(
    source: Path | ir.Model,
    scales: StepScales,
    layers: Sequence[Layer],
    out_path: Path,
    dialect: str = "onnxruntime",
    round_weight: RoundWeight = NEAREST_8,
) -> GraphReport:
    """Write the integer form of the float graph to `out_path`, its external data beside it in `<out_path>_data`.

    The result has the float graph's inputs and output. Weights are read and written one layer at a time. Same input, same bytes.

    Args:
        source: what `export_float_onnx` wrote, or what `trace_float_onnx` returned, of which nothing is changed.
        scales: the activation quantizers; their layers' weights are quantized per output channel, as `round_weight` does it.
        layers: every Linear and Conv2d of the network; one with a reason stays float.
        out_path: the model file to write.
        dialect: "onnxruntime" (integer products of uint8 and int8) or "tensorrt" (Q/DQ around float16 operators).

    Raises:
        PcrExportError: the float file is unreadable, no layer is quantized, or a layer of `scales` is not in the graph.
    """
    _check_layers(scales, layers)
    model = load_onnx(source) if isinstance(source, Path) else source.clone()
    float_bytes = _bytes(source) if isinstance(source, Path) else _weight_bytes(model)
    with WeightFile(out_path) as weights:
        job = Job(
            graph=model.graph,
            scales=scales,
            timestep=_timestep(model.graph),
            weights=weights,
            round_weight=round_weight,
        )
        rewrites = {each.__name__: each().apply(job) for each in DIALECTS[dialect]}
        _move_weights(job)
        if dialect == "onnxruntime":
            model.graph.opset_imports[MICROSOFT] = 1
        model.ir_version = IR_VERSION
        weights.commit(model)
    return GraphReport(
        onnx_bytes=_bytes(out_path),
        float_bytes=float_bytes,
        quantizers=job.quantizers,
        layers=tuple(sorted(scales.layers)),
        rewrites=rewrites,
    )


def write_half_onnx(source: Path | ir.Model, out_path: Path) -> None:
    """Write the float graph in float16, with nothing quantized: what an INT8 engine is timed against.

    Args:
        source: as in `quantize_onnx`.
        out_path: the model file to write; its external data goes beside it.

    Raises:
        PcrExportError: the float file is unreadable, or a constant lies beyond float16.
    """
    model = load_onnx(source) if isinstance(source, Path) else source.clone()
    with WeightFile(out_path) as weights:
        job = Job(graph=model.graph, scales=NOTHING_QUANTIZED, timestep=_timestep(model.graph), weights=weights)
        for each in HALF_PASSES:
            each().apply(job)
        _move_weights(job)
        model.ir_version = IR_VERSION
        weights.commit(model)


def _check_layers(scales: StepScales, layers: Sequence[Layer]) -> None:
    if not scales.layers:
        raise PcrExportError("the scales name no layer to quantize: calibrate again")
    float_layers = {layer.name: layer.reason for layer in layers if layer.reason is not None}
    for name in scales.layers:
        if name in float_layers:
            raise PcrExportError(f"{name} has scales but is to stay float ({float_layers[name]}): calibrate again")


def _timestep(graph: ir.Graph) -> str:
    scalars = [str(value.name) for value in graph.inputs if value.shape is not None and len(value.shape) == 0]
    if len(scalars) != 1:
        raise PcrExportError(
            f"the float graph must have one rank-0 input, the timestep; it has {scalars}: export it again"
        )
    return scalars[0]


def _move_weights(job: Job) -> None:
    """Weights that stayed float go from the float graph's file to the new one."""
    read = {value for node in job.graph.all_nodes() for value in node.inputs}
    for name, value in list(job.graph.initializers.items()):
        tensor = value.const_value
        if value not in read or tensor is None:
            del job.graph.initializers[name]
        elif value not in job.own:
            value.const_value = job.weights.store(tensor.numpy(), name)
            if isinstance(tensor, ir.ExternalTensor):
                tensor.release()


def _weight_bytes(model: ir.Model) -> int:
    tensors = (value.const_value for value in model.graph.initializers.values())
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def _bytes(path: Path) -> int:
    data = path.with_name(path.name + "_data")
    return path.stat().st_size + (data.stat().st_size if data.exists() else 0)
