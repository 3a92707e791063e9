"""Mark every layer that will be quantized."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import onnx_ir as ir

from pcr_export.errors import PcrExportError
from pcr_export.graph.job import DOMAIN, MODULE_KEY, Emitter, Job, attribute, replace_value

CONV_ATTRIBUTES = ("kernel_shape", "strides", "pads", "dilations")


def check_layers_have_nodes(graph: ir.Graph, layers: Collection[str]) -> None:
    """Raise PcrExportError where the float graph computes nothing for a layer that is to be quantized."""
    products = ("Conv", "Gemm", "MatMul")
    found = {node.metadata_props.get(MODULE_KEY) for node in graph if node.op_type in products} & set(layers)
    _refuse(sorted(set(layers) - found), found)


def _refuse(missing: Sequence[str], found: Collection[str | None]) -> None:
    if missing or not found:
        shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise PcrExportError(
            f"no node of the float graph computes {shown or 'any layer'}, which the network calls: leave it float (--skip), or, "
            "where graph and scales come from elsewhere, take both from the same network"
        )


class FindLayers:
    """Nodes of a quantized module -> one node that knows its layer, by the module path in the node's metadata:

    1. Conv(x, W, b)                            -> pcr.Conv(x, W, b)
    2. Gemm(x, W, b, transB=1)                  -> pcr.Linear(x, W, b)         W [out, in]
    3. MatMul(x, W) or Add(MatMul(x, W), b)     -> pcr.Linear(x, W, b)         W [in, out], transposed=1

    Afterwards every layer of `scales.layers` is marked, or the pass has raised PcrExportError with the missing names.
    """

    def apply(self, job: Job) -> int:
        """Mark the layers; returns how many."""
        found: set[str] = set()
        for node in list(job.graph):
            layer = node.metadata_props.get(MODULE_KEY)
            if layer is None or layer not in job.scales.layers or node.graph is None:
                continue
            if self._mark(job, node, layer):
                found.add(layer)
        _refuse(sorted(set(job.scales.layers) - found), found)
        return len(found)

    def _mark(self, job: Job, node: ir.Node, layer: str) -> bool:
        if node.op_type == "Conv":
            if attribute(node, "group", 1) != 1:
                raise PcrExportError(
                    f"{layer} is a grouped convolution, which has no integer form here: leave it float"
                )
            attributes = {name: list(attribute(node, name)) for name in CONV_ATTRIBUTES if name in node.attributes}
            self._replace(job, node, node, "Conv", [*node.inputs], {"layer": layer, **attributes})
            return True
        if node.op_type == "Gemm" and attribute(node, "transB", 0) == 1:
            self._replace(job, node, node, "Linear", [*node.inputs], {"layer": layer, "transposed": 0})
            return True
        weight = node.inputs[1] if node.op_type == "MatMul" else None
        if weight is not None and weight.is_initializer():
            last, bias = self._bias(node, layer)
            self._replace(job, node, last, "Linear", [node.inputs[0], weight, bias], {"layer": layer, "transposed": 1})
            return True
        return False

    def _bias(self, matmul: ir.Node, layer: str) -> tuple[ir.Node, ir.Value | None]:
        """The Add of the same layer that follows the product, and the bias that it adds."""
        uses = matmul.outputs[0].uses()
        if len(uses) == 1:
            add, index = next(iter(uses))
            bias = add.inputs[1 - index] if add.op_type == "Add" else None
            same = add.metadata_props.get(MODULE_KEY) == layer
            if same and bias is not None and bias.is_initializer() and len(bias.shape or ()) == 1:
                return add, bias
        return matmul, None

    def _replace(
        self,
        job: Job,
        first: ir.Node,
        last: ir.Node,
        op: str,
        inputs: list[ir.Value | None],
        attributes: dict[str, object],
    ) -> None:
        emit = Emitter(job, last, prefix=str(attributes["layer"]))
        shape = last.outputs[0].shape
        new = emit(op, inputs, attributes, domain=DOMAIN, shape=None if shape is None else list(shape))
        new.type = last.outputs[0].type
        replace_value(last.outputs[0], new)
        assert last.graph is not None
        last.graph.remove([last] if first is last else [last, first], safe=True)
