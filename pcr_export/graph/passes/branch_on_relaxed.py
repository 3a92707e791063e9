"""Two forms of the network behind one signature: a single If around everything that a relaxed step changes."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import onnx_ir as ir

from pcr_export.graph.job import DOMAIN, Emitter, Job


class BranchOnRelaxed:
    """core(x) -> If(bits[step] > 8, core with digits=2 (x), core(x))

    The core is every marked layer and every node on a path between two of them. Weights and tables stay in the main graph,
    so both forms read one copy. Does not fire where no step is relaxed.
    """

    def apply(self, job: Job) -> int:
        """Branch; returns the number of nodes in the core, 0 where no step is relaxed."""
        if not (job.scales.bits > 8).any():
            return 0
        core = _core(job.graph)
        inside = set(core)
        anchor = core[-1]
        emit = Emitter(job, anchor, prefix="relaxed")
        emit.module = None
        fineness = np.exp2(8 - job.scales.bits.astype(np.float32)).astype(np.float32)[:, None]
        job.fineness = emit(
            "Gather", [emit.constant(fineness, "step/fineness"), job.step], {"axis": 0}, name="fineness", shape=[1]
        )
        relaxed = emit(
            "Gather", [emit.constant(job.scales.bits > 8, "step/is_relaxed"), job.step], {"axis": 0}, name="is_relaxed"
        )
        outputs = [value for node in core for value in node.outputs if _read_outside(value, inside)]
        branches = {name: _copy(core, outputs, name) for name in ("relaxed", "normal")}
        attributes = {
            "then_branch": ir.AttrGraph("then_branch", branches["relaxed"]),
            "else_branch": ir.AttrGraph("else_branch", branches["normal"]),
        }
        chosen = ir.node("If", [relaxed], attributes, num_outputs=len(outputs), name="relaxed_or_normal")
        job.graph.insert_after(anchor, chosen)
        for old, new in zip(outputs, chosen.outputs, strict=True):
            new.name, new.shape, new.type = old.name, old.shape, old.type
            old.name = None
            old.replace_all_uses_with(new, replace_graph_outputs=True)
        job.graph.remove(reversed(core), safe=False)
        job.graph.sort()  # a reader of the core may have stood before its last node
        return len(core)


def _core(graph: ir.Graph) -> list[ir.Node]:
    layers = [node for node in graph if node.domain == DOMAIN]
    after = _reach(layers, lambda node: [use.node for value in node.outputs for use in value.uses()])
    before = _reach(layers, lambda node: [value.producer() for value in node.inputs if value is not None])
    return [node for node in graph if node in after and node in before]


def _reach(start: Iterable[ir.Node], neighbours: Callable[[ir.Node], Iterable[ir.Node | None]]) -> set[ir.Node]:
    seen: set[ir.Node] = set()
    waiting: list[ir.Node | None] = list(start)
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting.extend(neighbours(node))
    return seen


def _read_outside(value: ir.Value, inside: set[ir.Node]) -> bool:
    return value.is_graph_output() or any(use.node not in inside for use in value.uses())


def _copy(core: list[ir.Node], outputs: list[ir.Value], name: str) -> ir.Graph:
    """The core as a graph of its own; values get the branch's name in front, since ONNX scopes may not shadow."""
    twin: dict[ir.Value, ir.Value] = {}
    nodes = []
    for node in core:
        attributes = {key: found.value for key, found in node.attributes.items()}
        if name == "relaxed" and node.domain == DOMAIN:
            attributes["digits"] = 2
        inputs = [twin.get(value, value) if value is not None else None for value in node.inputs]
        copy = ir.node(
            node.op_type,
            inputs,
            attributes,
            domain=node.domain,
            num_outputs=len(node.outputs),
            name=f"{name}/{node.name}",
        )
        copy.metadata_props.update(node.metadata_props)
        for old, new in zip(node.outputs, copy.outputs, strict=True):
            new.name, new.shape, new.type = f"{name}/{old.name}", old.shape, old.type
            twin[old] = new
        nodes.append(copy)
    return ir.Graph([], [twin[value] for value in outputs], nodes=nodes, name=name)
