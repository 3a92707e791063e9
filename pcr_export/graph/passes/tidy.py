"""The last pass: what nothing reads goes, and every name is made unique."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from pcr_export.graph.job import DOMAIN, Job


class Tidy:
    """Unread nodes and initializers go; names become unique over the graph and its branches, in order of appearance."""

    def apply(self, job: Job) -> int:
        """Tidy; returns how many nodes went. Raises ValueError where an operator of the passes' own domain is left."""
        before = len(job.graph)
        RemoveUnusedNodesPass()(ir.Model(job.graph, ir_version=10))
        left = sorted({f"{node.op_type} {node.name}" for node in job.graph.all_nodes() if node.domain == DOMAIN})
        if left:
            raise ValueError(f"no pass has lowered {left}")
        used = {str(value.name) for value in (*job.graph.inputs, *job.graph.outputs)} | set(job.graph.initializers)
        kept = set(job.graph.outputs)
        for number, node in enumerate(job.graph.all_nodes()):
            node.name = f"{node.name or node.op_type}#{number}"
            for value in node.outputs:
                if value in kept or value.name == "":
                    continue
                value.shape = None  # sizes that the rewrites left stale or untyped; engines infer their own
                name, count = value.name or f"{node.name}", 1
                while name in used:
                    count += 1
                    name = f"{value.name or node.name}.{count}"
                value.name = name
                used.add(name)
        return before - len(job.graph)
