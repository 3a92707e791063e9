"""What a builder needs to know of an ONNX file without parsing it: its inputs' axes, its files, their hash."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import onnx_ir as ir

from pcr_export.engine_settings import Range
from pcr_export.errors import PcrExportError, first_line
from pcr_export.path_inside import path_inside
from pcr_export.read_files import check_regular

ShapeRange = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]  # minimum, optimum, maximum of every axis
Ports = Mapping[str, tuple[str, tuple[int | str, ...]]]  # name -> data type such as FLOAT, and axes
AGAIN = "export the model again"
MOST_BYTES = 2**31  # of a model without its weights: what protobuf reads
CHUNK = 1 << 22  # bytes read at a time


def input_axes(path: Path) -> dict[str, tuple[int | str, ...]]:
    """The axes of each input: a size, or the name of a symbolic axis such as batch.

    Raises:
        PcrExportError: the file is missing or damaged.
    """
    return {name: axes for name, (_, axes) in onnx_ports(path)[0].items()}


def onnx_ports(path: Path) -> tuple[Ports, Ports]:
    """Inputs and outputs in their order.

    Raises:
        PcrExportError: the file is missing or damaged, or does not tell the rank of one.
    """
    graph = load_onnx(path).graph
    return _ports(path, graph.inputs), _ports(path, graph.outputs)


def input_shapes(path: Path, axes: Mapping[str, Range]) -> dict[str, ShapeRange]:
    """Minimum, optimum and maximum shape of each input, its symbolic axes replaced by `axes`.

    Raises:
        PcrExportError: the file is missing, an axis is not in `axes`, or a range does not ascend from 1.
    """
    shapes = {}
    for name, dims in input_axes(path).items():
        sizes = [_range(name, dim, axes) for dim in dims]
        shapes[name] = (
            tuple(low for low, _, _ in sizes),
            tuple(best for _, best, _ in sizes),
            tuple(high for _, _, high in sizes),
        )
    return shapes


def onnx_sha256(path: Path) -> str:
    """sha256 over the ONNX file and, in the order of their names, the files of its external data.

    Raises:
        PcrExportError: one of them is missing.
    """
    model = load_onnx(path)
    names = external_files(model)
    digest = hashlib.sha256()
    for file in (path, *(path_inside(path.parent, name, path) for name in names)):
        add_file(digest, file)
    return digest.hexdigest()


def external_files(model: ir.Model) -> list[str]:
    """The files of a model's external data as it names them, sorted."""
    return sorted({str(tensor.location) for tensor in _external_tensors(model)})


def _external_tensors(model: ir.Model) -> list[ir.ExternalTensor]:
    graphs = (model.graph, *model.graph.subgraphs())
    tensors = (value.const_value for graph in graphs for value in graph.initializers.values())
    return [tensor for tensor in tensors if isinstance(tensor, ir.ExternalTensor)]


def add_file(digest: hashlib._Hash, path: Path) -> None:
    """Feed the bytes of `path` to `digest`.

    Raises:
        PcrExportError: the file is missing.
    """
    try:
        with path.open("rb") as file:
            while chunk := file.read(CHUNK):
                digest.update(chunk)
    except FileNotFoundError as error:
        raise PcrExportError(f"{path} does not exist: export the model again") from error


def _ports(path: Path, values: Iterable[ir.Value]) -> Ports:
    ports = {}
    for value in values:
        if value.shape is None:
            raise PcrExportError(f"{path} does not tell the shape of {value.name}: export the model again")
        kind = value.dtype.name if value.dtype is not None else "no type"
        ports[str(value.name)] = (kind, tuple(dim if isinstance(dim, int) else str(dim.value) for dim in value.shape))
    return ports


def load_onnx(path: Path) -> ir.Model:
    """The graph in `path`, its weights where they are.

    Raises:
        PcrExportError: the file is missing or damaged, or the file of its weights is missing, cut short or elsewhere.
    """
    check_regular(path, most=MOST_BYTES, advice=AGAIN)
    try:
        model = ir.load(path)
        tensors = _external_tensors(model)
        ends = [(str(tensor.location), (tensor.offset or 0), tensor.nbytes) for tensor in tensors]
    except Exception as error:  # whatever a damaged file makes of protobuf and onnx-ir
        raise PcrExportError(f"{path} is no ONNX file ({first_line(error)}): {AGAIN}") from error
    sizes = {}
    for name, offset, size in ends:
        if name not in sizes:
            data = path_inside(path.parent, name, path)
            check_regular(data, advice=AGAIN)
            sizes[name] = data.stat().st_size
        if offset < 0 or sizes[name] < offset + size:
            raise PcrExportError(f"{path.parent / name}, the weights of {path.name}, is cut short: {AGAIN}")
    return model


def check_model_files(path: Path) -> None:
    """Look at an ONNX file and at what may be its weights, before a library opens them: files, no pipes and no devices.

    Raises:
        PcrExportError: one is something else, or the model is larger than protobuf reads.
    """
    check_regular(path, most=MOST_BYTES, advice=AGAIN)
    for file in path.parent.rglob("*"):
        if file.exists() and not file.is_dir():
            check_regular(file, advice=AGAIN)


def _range(name: str, axis: int | str, axes: Mapping[str, Range]) -> Range:
    if isinstance(axis, int):
        return axis, axis, axis
    if axis not in axes:
        known = ", ".join(axes) or "none"
        raise PcrExportError(f"input {name} has the axis {axis}: give it as min/opt/max (given: {known})")
    low, best, high = axes[axis]
    if not 1 <= low <= best <= high:
        raise PcrExportError(f"{axis} {low}/{best}/{high} is no range: write min/opt/max in ascending order, from 1")
    return low, best, high
