"""TensorRT plans of the UNet for Triton: the graph that they are built from, whose timestep is [1], and where they lie."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from pcr_export.engines.engine_folder import tensorrt_onnx
from pcr_export.engines.flavours import compute_capability
from pcr_export.engines.onnx_files import load_onnx
from pcr_export.errors import PcrExportError
from pcr_export.write_files import write_bytes


def plan_onnx(folder: Path) -> Path:
    """The graph that Triton's plans are built from; it shares the weights of the graph beside it."""
    return tensorrt_onnx(folder).with_name("triton.onnx")


def write_plan_onnx(folder: Path) -> None:
    """Write `plan_onnx`: TensorRT's dialect of the UNet, its timestep taken as [1] and squeezed inside.

    Triton knows no scalars: its core refuses dims [] and a reshape to them, and its TensorRT backend wants as many dims as the plan has.

    Raises:
        PcrExportError: the graph has no input of rank 0.
    """
    path, source = plan_onnx(folder), tensorrt_onnx(folder)
    model = load_onnx(source)
    scalars = [value for value in model.graph.inputs if value.shape is not None and len(value.shape) == 0]
    if len(scalars) != 1:
        raise PcrExportError(f"{source} has {len(scalars)} inputs of rank 0, not the timestep alone: export again")
    (timestep,) = scalars
    name, readers = timestep.name, timestep.uses()
    node = ir.node("Squeeze", [timestep], num_outputs=1, name="triton/timestep")
    node.outputs[0].name = "triton/timestep"
    node.outputs[0].type, node.outputs[0].shape = timestep.type, ir.Shape([])
    for reader, index in readers:
        reader.replace_input_with(index, node.outputs[0])
    timestep.name, timestep.shape = name, ir.Shape([1])
    model.graph.insert_before(model.graph[0], node)
    write_bytes(
        path, ir.to_proto(model).SerializeToString(deterministic=True)
    )  # the weights stay external, in the file of the graph beside it


def find_plans(version: Path) -> dict[str, str]:
    """Compute capability -> file name of the plans in a version's folder, sm89.plan for "8.9".

    Raises:
        PcrExportError: a plan is not named after its GPU.
    """
    return {compute_capability(path.stem): path.name for path in sorted(version.glob("*.plan"))}
