"""Denoiser -> float ONNX, by torch.onnx's dynamo exporter."""

from __future__ import annotations

import ast
import errno
import logging
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes import common as cleaning
from onnxscript import opset23
from onnxscript.optimizer import fold_constants
from onnxscript.rewriter import onnx_fusions, rewrite
from onnxscript.rewriter.rules import common as rules
from torch import Tensor, nn

from pcr_export.errors import PcrExportError
from pcr_export.models.denoiser import Denoiser
from pcr_export.write_files import new_folder

OPSET = 23
MODULE_KEY = "pcr.module"  # node metadata: the module path, relative to denoiser.network, that the node comes from
SCOPES_KEY = "pkg.torch.onnx.name_scopes"
WRAPPED = "network"  # the name under which _Call holds the network

# The exporter's own rewrites but for those that search the whole graph at every node (slice_split_rule), and those that
# change a layer's weight or padding, which calibration saw as they are.
REWRITES = (
    *rules.mul_by_1_rule.commute(),
    *rules.add_0_rule.commute(),
    rules.sub_0_rule,
    rules.div_by_1_rule,
    rules.dropout_zero_rule,
    rules.dropout_inference_rule,
    rules.two_reshapes_matmul_reshape_rule,
    rules.one_reshape_matmul_reshape_rule,
    rules.cast_constant_of_shape_rule,
    rules.cast_constant_of_shape_without_value_rule,
    rules.collapse_slice_rule,
    rules.collapse_slice2_rule,
    rules.materialize_reshape_shape_rule,
    rules.cast_cast_rule,
    rules.no_op_cast_rule,
    rules.no_op_expand_rule,
    rules.flatten_to_reshape_rule,
    rules.reshape_reshape_rule,
    rules.no_op_transpose_rule,
    rules.transpose_transpose_rule,
    rules.unsqueeze_unsqueeze_rule,
    rules.squeeze_reshape_1d_rule,
    rules.no_op_dynamic_scatter_nd_rule,
    rules.no_op_static_scatter_nd_rule,
    rules.remove_optional_bias_from_conv_rule,
    rules.remove_optional_bias_from_gemm_rule,
)


def export_float_onnx(denoiser: Denoiser, example: dict[str, Tensor], path: Path) -> None:
    """Write the graph of `trace_float_onnx` to `path`, its weights beside it in `<path>_data`. Same network, same bytes.

    Args:
        denoiser: its network in float32 and eval mode.
        example: every input by name; a dynamic axis needs a size of at least 2.
        path: the file to write, through a temporary name.

    Raises:
        PcrExportError: as `trace_float_onnx` does.
    """
    save_model(trace_float_onnx(denoiser, example), path)


def trace_float_onnx(denoiser: Denoiser, example: dict[str, Tensor]) -> ir.Model:
    """The denoiser's network as a float ONNX graph in memory. Its weights are views of the network's own: nothing is copied.

    Inputs come in the order of `denoiser.dynamic_axes`, the timestep as a rank-0 float32, the output is `denoiser.output`.
    Every node carries the path of its module in its metadata under `pcr.module`. A weight is named by its module path; a
    Linear's stands transposed, [in, out], as `<module>.weight.T` where the graph multiplies by it.

    Args:
        denoiser: its network in float32 and eval mode.
        example: every input by name; a dynamic axis needs a size of at least 2. The graph holds for every size.

    Raises:
        PcrExportError: an input is missing, a dynamic axis has size below 2, or the network cannot be traced with those axes free.
    """
    _check_example(denoiser, example)
    model = _trace(denoiser, example)
    _transpose_weights(model.graph)
    _optimize(model)
    _name_axes(model.graph, denoiser)
    _keep_module_paths(model, denoiser.network)
    _name_weights(model.graph)
    return model


def save_model(model: ir.Model, path: Path) -> None:
    """Write `path` and its external data `<path>_data` through a temporary folder; tensors are streamed one at a time."""
    data_name = path.name + "_data"
    try:
        with new_folder(path) as folder:
            ir.save(model, folder / path.name, external_data=data_name)
            path.unlink(missing_ok=True)  # so that no reader meets the one file of before and the other of now
            for name in (data_name, path.name):
                if (folder / name).exists():
                    os.replace(folder / name, path.parent / name)
    except OSError as error:
        if error.errno is None:  # of numpy's tofile, which does not say why it could not write all
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        raise


class _Call(nn.Module):
    """The network with its inputs in a fixed order, as the exporter wants them."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.network = denoiser.network
        self.denoiser_call = denoiser.call
        self.names = tuple(denoiser.dynamic_axes)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.denoiser_call(self.network, dict(zip(self.names, inputs, strict=True)))


def _check_example(denoiser: Denoiser, example: dict[str, Tensor]) -> None:
    for name, axes in denoiser.dynamic_axes.items():
        if name not in example:
            raise PcrExportError(
                f"the example lacks input {name}: give one tensor for each of {list(denoiser.dynamic_axes)}"
            )
        for axis in axes:
            if example[name].shape[axis] < 2:
                raise PcrExportError(
                    f"axis {axis} of {name} is dynamic: give an example with a size of at least 2 there"
                )
    timestep = example[denoiser.timestep]
    if timestep.ndim or timestep.dtype != torch.float32:
        raise PcrExportError(f"{denoiser.timestep} must be a rank-0 float32 tensor: give torch.tensor(500.0)")


def _trace(denoiser: Denoiser, example: dict[str, Tensor]) -> ir.Model:
    axes = denoiser.dynamic_axes
    shapes = tuple({axis: torch.export.Dim.DYNAMIC for axis in axes[name]} for name in axes)
    try:
        with torch.inference_mode(False), torch.no_grad(), quiet_exporter():
            program = torch.onnx.export(
                _Call(denoiser).eval(),
                tuple(example[name] for name in axes),
                dynamo=True,
                opset_version=OPSET,
                input_names=list(axes),
                output_names=[denoiser.output],
                dynamic_shapes={"inputs": shapes},
                custom_translation_table={torch.ops.aten.scaled_dot_product_attention.default: _attention},
                optimize=False,
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        free = ", ".join(sorted({name for each in axes.values() for name in each.values()}))
        raise PcrExportError(f"the network cannot be exported to ONNX with {free} free: {_innermost(error)}") from error
    assert program is not None
    return program.model


def _transpose_weights(graph: ir.Graph) -> None:
    """Transpose(W) -> W.T, an initializer that is a view of W."""
    for node in list(graph):
        weight = node.inputs[0] if node.op_type == "Transpose" else None
        tensor = weight.const_value if weight is not None and weight.is_initializer() else None
        if weight is None or tensor is None or len(tensor.shape) != 2:
            continue
        name = f"{weight.name}.T"
        if name not in graph.initializers:
            view = torch.from_numpy(tensor.numpy()).T  # of numpy's, ir would write one element at a time
            const = ir.Tensor(view, tensor.dtype, name=name)
            graph.register_initializer(ir.val(name, type=weight.type, shape=const.shape, const_value=const))
        node.outputs[0].replace_all_uses_with(graph.initializers[name])
        graph.remove(node, safe=True)


def _optimize(model: ir.Model) -> None:
    """Fold constants (small ones) and what REWRITES tells, twice; no pass reads a weight."""
    cleaning.InlinePass()(model)
    for _ in range(2):
        fold_constants(model, onnx_shape_inference=True)
        rewrite(model, REWRITES)
    ir.passes.Sequential(
        cleaning.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        cleaning.LiftSubgraphInitializersToMainGraphPass(),
        cleaning.DeduplicateInitializersPass(),
        cleaning.CommonSubexpressionEliminationPass(),
        cleaning.OutputFixPass(),
        cleaning.NameFixPass(),
    )(model)
    onnx_fusions.fuse(model)


def _innermost(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """One Attention node. torch's own translation refuses [batch, tokens, width], which is attention with a single head."""
    heads = {} if len(query.shape or ()) == 4 else {"q_num_heads": 1, "kv_num_heads": 1}
    output, *_ = opset23.Attention(query, key, value, attn_mask, is_causal=int(is_causal), scale=scale, **heads)
    return output


@contextmanager
def quiet_exporter() -> Iterator[None]:
    """The exporter warns about torchvision and its own internals: nothing that a person can act on."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _name_axes(graph: ir.Graph, denoiser: Denoiser) -> None:
    """Give the symbolic axes their names from the denoiser, inside expressions as well."""
    names: dict[str, str] = {}
    for value, axes in zip(graph.inputs, denoiser.dynamic_axes.values(), strict=True):
        for axis, name in axes.items():
            symbol = value.shape[axis] if value.shape is not None else name
            if isinstance(symbol, int):
                raise PcrExportError(
                    f"axis {axis} of {value.name} was fixed to {symbol} by the network: leave it out of dynamic_axes"
                )
            names.setdefault(str(getattr(symbol, "value", symbol)), name)
            value.shape = _renamed_shape(value.shape, {axis: name})
    pattern = re.compile("|".join(rf"\b{re.escape(symbol)}\b" for symbol in sorted(names))) if names else None
    for value in _values(graph):
        if value.shape is None or pattern is None:
            continue
        dims = {i: str(dim.value) for i, dim in enumerate(value.shape) if isinstance(dim, ir.SymbolicDim) and dim.value}
        value.shape = _renamed_shape(
            value.shape, {i: pattern.sub(lambda m: names[m[0]], dim) for i, dim in dims.items()}
        )
    first = next(iter(denoiser.dynamic_axes.values()), {})
    output = graph.outputs[0]
    output.shape = _renamed_shape(output.shape, dict(first if denoiser.output_axes is None else denoiser.output_axes))


def _renamed_shape(shape: ir.Shape | None, names: dict[int, str]) -> ir.Shape | None:
    if shape is None:
        return None
    return ir.Shape([names.get(i, dim) for i, dim in enumerate(shape)])


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    for node in graph:
        yield from node.outputs


def _keep_module_paths(model: ir.Model, network: nn.Module) -> None:
    """Of the exporter's metadata keep the module path alone, a module's first if it has several: stack traces hold this machine's paths."""
    first = {module: name for name, module in network.named_modules()}
    name_of = {name: first[module] for name, module in network.named_modules(remove_duplicate=False)}
    for node in model.graph.all_nodes():
        scopes = ast.literal_eval(node.metadata_props.get(SCOPES_KEY, "[]"))
        node.metadata_props.clear()
        node.doc_string = None
        modules = [scope for scope in scopes[:-1] if scope == WRAPPED or scope.startswith(WRAPPED + ".")]
        if modules:
            path = modules[-1].removeprefix(WRAPPED).removeprefix(".")
            node.metadata_props[MODULE_KEY] = name_of.get(path, path)
    for value in (*_values(model.graph), *model.graph.initializers.values()):
        value.metadata_props.clear()
        value.doc_string = None
    model.graph.metadata_props.clear()
    model.metadata_props.clear()
    model.graph.name = "denoiser"


def _name_weights(graph: ir.Graph) -> None:
    """Initializers are named by module path."""
    for name in list(graph.initializers):
        new = name.removeprefix(WRAPPED + ".")
        if new != name and new not in graph.initializers:
            value = graph.initializers.pop(name)
            value.name = new
            if value.const_value is not None:
                value.const_value.name = new
            graph.register_initializer(value)
