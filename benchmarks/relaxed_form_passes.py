"""Other forms in which one graph can hold 8-bit and relaxed steps, as passes: what `relaxed_forms.py` compares with ChoosePlanes."""

from __future__ import annotations

from itertools import chain

import numpy as np
import onnx_ir as ir

from pcr_export.graph.job import DOMAIN, Emitter, Job, Pass, attribute, replace_value, static_dim
from pcr_export.graph.passes import DIALECTS, TENSORRT_PASSES
from pcr_export.graph.passes.branch_on_relaxed import BranchOnRelaxed
from pcr_export.graph.passes.choose_planes import ChoosePlanes
from pcr_export.graph.passes.expand_group_norm import ExpandGroupNorm
from pcr_export.graph.passes.find_layers import FindLayers
from pcr_export.graph.passes.find_step import FindStep
from pcr_export.graph.passes.gather_qdq_scales import GatherQdqScales
from pcr_export.graph.passes.lower_to_qdq import _Lowering
from pcr_export.graph.passes.tidy import Tidy
from pcr_export.graph.passes.to_half import ToHalf

NORMAL, RELAXED = "normal", "relaxed"  # branches
PLANES = "planes"  # input of the form with two profiles, and its axis


class ChoosePlanesApart:
    """ChoosePlanes, but the rows of the tables are read at step, not at step + planes[0]."""

    def apply(self, job: Job) -> int:
        """Choose; returns the number of relaxed steps."""
        count = ChoosePlanes().apply(job)
        if count:
            assert job.step is not None
            add = job.step.producer()
            assert add is not None
            job.step.replace_all_uses_with(add.inputs[0])
            job.step = add.inputs[0]
        return count


class PlanesAsInput:
    """ChoosePlanes with an input in place of the If: planes, int64 [1] = [0] or int64 [2] = [0, 1], is the caller's choice."""

    def apply(self, job: Job) -> int:
        """Add the input; returns the number of relaxed steps."""
        count = ChoosePlanes().apply(job)
        if count:
            assert job.planes is not None
            given = ir.Value(name=PLANES, shape=ir.Shape([PLANES]), type=ir.TensorType(ir.DataType.INT64))
            job.graph.inputs.append(given)
            job.planes.replace_all_uses_with(given)
            job.planes = given
        return count


class SpellOutAttention:
    """Attention(q, k, v) -> Softmax((q * scale) k^T) v: TensorRT-RTX 1.7 does not build Attention in the branch of an If."""

    def apply(self, job: Job) -> int:
        """Replace every Attention; returns how many."""
        nodes = [node for node in job.graph if node.op_type == "Attention"]
        for node in nodes:
            q, k, v = node.inputs[:3]
            assert q is not None
            assert k is not None
            rank, width = len(q.shape or ()), static_dim(q, -1)
            assert width is not None
            emit = Emitter(job, node)
            factor = np.array(attribute(node, "scale", width**-0.5), np.float32)
            scaled = _typed(emit("Mul", [q, emit.constant(factor, "attention/scale")], name="scaled"), q)
            order = [*range(rank - 2), rank - 1, rank - 2]
            turned = _typed(emit("Transpose", [k], {"perm": order}, name="turned"), k)
            scores = _typed(emit("MatMul", [scaled, turned], name="scores"), q)
            shares = _typed(emit("Softmax", [scores], {"axis": -1}, name="shares"), q)
            mixed = _typed(emit("MatMul", [shares, v], name="mixed"), q)
            mixed.shape = node.outputs[0].shape
            replace_value(node.outputs[0], mixed)
            job.graph.remove(node, safe=True)
        return len(nodes)


def _typed(value: ir.Value, like: ir.Value) -> ir.Value:
    assert like.dtype is not None
    value.type = ir.TensorType(like.dtype)
    return value


class SortNodes:
    """The same nodes in an order in which each stands behind what it reads."""

    def apply(self, job: Job) -> int:
        """Sort; returns the number of nodes."""
        job.graph.sort()
        return len(job.graph)


class LowerBranches:
    """LowerToQdq in both branches of BranchOnRelaxed: one digit in the normal one, two in the relaxed one.

    The DQ of a weight stands in front of the If, since TensorRT takes an integer constant in a branch for no weight.
    """

    def apply(self, job: Job) -> int:
        """Lower every marked layer of both branches; returns how many."""
        outer = job.behind_step()
        outer.prefix = "planes"
        assert job.fineness is not None
        job.low_digit = outer("Cast", [job.fineness], {"to": int(ir.DataType.FLOAT16)}, name="low_digit")
        two = outer.constant([0, 1], "planes/two")
        (chosen,) = (node for node in job.graph if node.op_type == "If")
        weights: dict[str, ir.Value] = {}
        count = 0
        for name, branch in ((NORMAL, chosen.attributes["else_branch"]), (RELAXED, chosen.attributes["then_branch"])):
            job.planes = two if name == RELAXED else None
            count += _lower_branch(job, name, branch.as_graph(), chosen, weights)
        job.graph.sort()
        return count


class _BranchLowering(_Lowering):
    """One branch's layers; their weights are dequantized in front of `chosen`, once for both branches."""

    def __init__(self, job: Job, chosen: ir.Node, weights: dict[str, ir.Value]) -> None:
        super().__init__(job)
        self.chosen = chosen
        self.dequantized = weights

    def _product(self, emit: Emitter, node: ir.Node, q: ir.Value, integers: np.ndarray, unit: float) -> ir.Value:
        layer = attribute(node, "layer")
        if layer in self.dequantized:
            return _product_node(emit, node, q, self.dequantized[layer])
        outer = Emitter(self.job, self.chosen, prefix=layer)
        stored = integers if node.op_type == "Conv" else np.ascontiguousarray(integers.T)
        weight, scale = self.job.initializer(stored, f"{layer}.weight_q"), np.array(unit, np.float16)
        scaled = outer("DequantizeLinear", [weight, outer.constant(scale, f"unit_{unit}")], name="weight_dq")
        self.dequantized[layer] = scaled
        return _product_node(emit, node, q, scaled)


def _product_node(emit: Emitter, node: ir.Node, q: ir.Value, weight: ir.Value) -> ir.Value:
    if node.op_type != "Conv":
        return emit("MatMul", [q, weight], name="product")
    kept = {name: found.value for name, found in node.attributes.items() if name not in ("layer", "digits")}
    return emit("Conv", [q, weight], kept, name="product")


def _lower_branch(job: Job, name: str, branch: ir.Graph, chosen: ir.Node, weights: dict[str, ir.Value]) -> int:
    lowering = _BranchLowering(job, chosen, weights)
    nodes = [node for node in branch if node.domain == DOMAIN]
    for node in nodes:
        lowering.lower(node)
    job.quantizers += lowering.quantizers
    for node in branch:
        if not str(node.name).startswith(f"{name}/"):
            node.name = f"{name}/{node.name}"
    for value in chain.from_iterable(node.outputs for node in branch):
        if not str(value.name).startswith(f"{name}/"):
            value.name = f"{name}/{value.name}"
    return len(nodes)


LENGTH_APART, TWO_PROFILES, WHOLE_IF = "length apart", "two profiles", "whole If"


def _with(choose: type[Pass]) -> tuple[type[Pass], ...]:
    passes = tuple(choose if each is ChoosePlanes else each for each in TENSORRT_PASSES)
    return (*passes[:-1], SortNodes, passes[-1])


FORMS: dict[str, tuple[type[Pass], ...]] = {
    LENGTH_APART: _with(ChoosePlanesApart),
    TWO_PROFILES: _with(PlanesAsInput),
    WHOLE_IF: (
        SpellOutAttention,
        FindLayers,
        ToHalf,
        ExpandGroupNorm,
        FindStep,
        GatherQdqScales,
        BranchOnRelaxed,
        LowerBranches,
        Tidy,
    ),
}


def register_forms() -> None:
    """Let `quantize_onnx` know these forms as dialects of their own."""
    DIALECTS.update(FORMS)
